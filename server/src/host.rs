//! The `Host` header check: a server on a loopback address answers only requests that name this machine.
//!
//! Without it a web page could point its own name at 127.0.0.1 (DNS rebinding) and read answers as its own origin.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{Uri, header};

use crate::app::AppState;
use crate::error::ApiError;

/// The layer that refuses foreign names; it does nothing when the server listens on a public address.
pub(crate) async fn check_host(State(app): State<AppState>, request: Request, next: Next) -> Response {
    if !app.loopback_only {
        return next.run(request).await;
    }
    let from_header = request.headers().get(header::HOST).map(|value| String::from_utf8_lossy(value.as_bytes()));
    // Without the header (HTTP/1.0) no browser is asking.
    let named = from_header.as_deref().or_else(|| authority(request.uri()));
    match named {
        Some(host) if !is_local(host, &app.config.allowed_hosts) => {
            ApiError::Host { host: host.to_owned() }.into_response()
        }
        _ => next.run(request).await,
    }
}

fn authority(uri: &Uri) -> Option<&str> {
    uri.authority().map(|authority| authority.as_str())
}

fn is_local(host: &str, allowed: &[String]) -> bool {
    let name = without_port(host);
    let bare = name.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
    let known = |other: &str| bare.eq_ignore_ascii_case(other);
    let under_localhost = || bare.to_ascii_lowercase().ends_with(".localhost");
    known("localhost")
        || under_localhost()
        || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
        || allowed.iter().any(|entry| known(entry) || host.eq_ignore_ascii_case(entry))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // An IPv6 address has colons of its own; only what follows the bracket is a port.
        Some((name, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (!name.contains(':') || name.ends_with(']')) =>
        {
            name
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_its_loopback_names() {
        for host in ["localhost", "LOCALHOST:8000", "app.localhost:1", "127.0.0.1:8000", "127.1.2.3", "[::1]:80", "::1"]
        {
            assert!(is_local(host, &[]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:80", "10.0.0.1", "192.168.1.4:8000", "", "notlocalhost"] {
            assert!(!is_local(host, &[]), "{host}");
        }
    }

    #[test]
    fn more_names_can_be_allowed() {
        let allowed = ["gpu.lan".to_owned()];
        assert!(is_local("gpu.lan:8000", &allowed) && is_local("GPU.lan", &allowed));
        assert!(!is_local("other.lan", &allowed));
    }
}
