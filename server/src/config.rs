//! The settings of the HTTP server, checked once before anything listens.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::time::Duration;

use crate::auth::ApiKeys;

/// Everything that can be set about the HTTP side. `validate` runs once; inner code takes plain values from here.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Address or name to listen on. Default 127.0.0.1.
    pub host: String,
    /// Port to listen on; 0 lets the system choose. Default 8000.
    pub port: u16,
    /// Keys that open every route; none: the server is open to whoever reaches it.
    pub api_keys: ApiKeys,
    /// Allow an address other machines reach without a key. Default false.
    pub insecure: bool,
    /// `Host` names accepted beside `localhost` and loopback addresses while listening on loopback.
    pub allowed_hosts: Vec<String>,
    /// Threads that serve HTTP. Default 2.
    pub http_threads: usize,
    /// Open connections at most; further ones wait in the system's backlog. Default 1,024.
    pub max_connections: usize,
    /// Largest request body in bytes. Default 16 MiB.
    pub max_body_bytes: usize,
    /// Largest request head (request line and headers) in bytes. Default 64 KiB.
    pub max_header_bytes: usize,
    /// A request head must arrive within this time; idle connections close after it too. Default 60 s.
    pub header_timeout: Duration,
    /// A request body must arrive within this time. Default 30 s.
    pub body_timeout: Duration,
    /// A client that takes no byte of its answer for this long is dropped. Default 60 s.
    pub write_stall_timeout: Duration,
    /// A quiet stream sends a comment this often, so that proxies keep it open. Default 15 s.
    pub sse_keep_alive: Duration,
    /// Time that running requests have to finish after the first signal. Default 30 s.
    pub shutdown_timeout: Duration,
    /// Answers that one request may ask for with `n`. Default 16.
    pub max_choices: usize,
    /// Prompts that one completion request may carry. Default 64.
    pub max_prompts: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: Ipv4Addr::LOCALHOST.to_string(),
            port: 8000,
            api_keys: ApiKeys::default(),
            insecure: false,
            allowed_hosts: Vec::new(),
            http_threads: 2,
            max_connections: 1024,
            max_body_bytes: 16 << 20,
            max_header_bytes: 64 << 10,
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(30),
            write_stall_timeout: Duration::from_secs(60),
            sse_keep_alive: Duration::from_secs(15),
            shutdown_timeout: Duration::from_secs(30),
            max_choices: 16,
            max_prompts: 64,
        }
    }
}

/// What is wrong with a setting, in one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The host does not name an address of this machine's resolver.
    #[error("--host {host} names no address ({reason}); use an IP address such as 127.0.0.1")]
    Host {
        /// The name as given.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// A public address without a key.
    #[error(
        "{addr} can be reached by other machines and no API key is set; set one with --api-key or --api-key-file, \
         listen on 127.0.0.1, or pass --insecure to serve without a key"
    )]
    PublicWithoutKey {
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// A number outside its range.
    #[error("{name} must be at least {least}, got {got}")]
    TooSmall {
        /// The setting.
        name: &'static str,
        /// Smallest value that works.
        least: usize,
        /// The value as given.
        got: usize,
    },
    /// The key file cannot be used.
    #[error("the API key file {path} cannot be used: {reason}")]
    KeyFile {
        /// The file.
        path: String,
        /// Why not.
        reason: String,
    },
    /// A key that no client could send.
    #[error("an API key must be 1 to 512 visible ASCII characters; key number {position} is not")]
    Key {
        /// Its place among the keys given, from 1.
        position: usize,
    },
}

impl ServerConfig {
    /// Checks every setting and resolves the address to listen on.
    ///
    /// # Errors
    /// The first setting that cannot work.
    pub fn validate(&self) -> Result<SocketAddr, ConfigError> {
        for (name, least, got) in [
            ("the number of HTTP threads", 1, self.http_threads),
            ("--max-connections", 1, self.max_connections),
            ("the request body limit", 1024, self.max_body_bytes),
            ("the request head limit", 8192, self.max_header_bytes),
            ("the number of choices", 1, self.max_choices),
            ("the number of prompts", 1, self.max_prompts),
        ] {
            if got < least {
                return Err(ConfigError::TooSmall { name, least, got });
            }
        }
        let addr = resolve(&self.host, self.port)?;
        if !addr.ip().is_loopback() && self.api_keys.is_empty() && !self.insecure {
            return Err(ConfigError::PublicWithoutKey { addr });
        }
        Ok(addr)
    }
}

fn resolve(host: &str, port: u16) -> Result<SocketAddr, ConfigError> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let failed = |reason: String| ConfigError::Host { host: host.to_owned(), reason };
    let found: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(|e| failed(e.to_string()))?.collect();
    // A name often has both families; the older one is what clients on the same machine try first.
    let best = found.iter().find(|addr| addr.is_ipv4()).or(found.first());
    best.copied().ok_or_else(|| failed("no address found".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_host(host: &str) -> ServerConfig {
        ServerConfig { host: host.to_owned(), ..ServerConfig::default() }
    }

    #[test]
    fn loopback_needs_no_key() {
        for host in ["127.0.0.1", "::1", "[::1]", "127.8.9.1", "localhost"] {
            let addr = with_host(host).validate().expect(host);
            assert!(addr.ip().is_loopback(), "{host} gave {addr}");
        }
    }

    #[test]
    fn a_public_address_needs_a_key_or_consent() {
        let refused = with_host("0.0.0.0").validate().expect_err("open to the world");
        assert!(refused.to_string().contains("--api-key"), "{refused}");
        assert!(with_host("::").validate().is_err());
        assert!(ServerConfig { insecure: true, ..with_host("0.0.0.0") }.validate().is_ok());
        let api_keys = ApiKeys::new(["secret".to_owned()]).expect("a fine key");
        assert!(ServerConfig { api_keys, ..with_host("0.0.0.0") }.validate().is_ok());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(matches!(with_host("no such host").validate(), Err(ConfigError::Host { .. })));
        let none = ServerConfig { max_choices: 0, ..ServerConfig::default() };
        assert!(matches!(none.validate(), Err(ConfigError::TooSmall { .. })));
    }
}
