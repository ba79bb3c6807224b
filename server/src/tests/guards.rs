//! Who gets in: keys over every route, names of this machine only, ids on every answer, an end to slow connections.

use std::time::Duration;

use axum::body::Body;
use http::{Request, StatusCode, header};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::support::{Answer, CHAT, COMPLETIONS, Plan, TestServer, json_request, server};
use crate::auth::ApiKeys;
use crate::config::ServerConfig;

fn guarded() -> TestServer {
    let api_keys = ApiKeys::new(["key-one".to_owned(), "key-two".to_owned()]).expect("fine keys");
    Plan { config: ServerConfig { api_keys, ..ServerConfig::default() }, ..Plan::default() }.start()
}

async fn get_with(server: &TestServer, path: &str, name: &str, value: &str) -> Answer {
    server.send(Request::get(path).header(name, value).body(Body::empty()).expect("a request")).await
}

#[tokio::test]
async fn every_route_asks_for_a_key() {
    let server = guarded();
    let gets = [
        "/v1/models",
        "/v1/models/org/test-model",
        "/tokenizer_info",
        "/health",
        "/ping",
        "/ready",
        "/version",
        "/metrics",
        "/openapi.json",
        "/v1/nothing",
        "/nothing",
        "/ui/nothing",
    ];
    for path in gets {
        let answer = server.get(path).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(answer.error()["code"], "missing_api_key");
        assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
        for wrong in ["Bearer key-on", "Bearer KEY-ONE", "Bearer ", "Basic key-one", "key-one"] {
            let answer = get_with(&server, path, "authorization", wrong).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path} {wrong}");
        }
    }
    for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/admin/reset_prefix_cache"] {
        assert_eq!(server.post(path, &json!({})).await.status, StatusCode::UNAUTHORIZED, "{path}");
        // Refused before the body is looked at.
        assert_eq!(server.post_raw(path, "nonsense").await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
}

#[tokio::test]
async fn either_key_opens_by_either_header() {
    let server = guarded();
    for (name, value) in
        [("authorization", "Bearer key-one"), ("authorization", "bearer key-two"), ("x-api-key", "key-two")]
    {
        assert_eq!(get_with(&server, "/v1/models", name, value).await.status, StatusCode::OK, "{name} {value}");
    }
    let mut request = json_request(COMPLETIONS, json!({"prompt": "Hi", "max_tokens": 2}).to_string());
    request.headers_mut().insert(header::AUTHORIZATION, "Bearer key-one".parse().expect("a value"));
    assert_eq!(server.send(request).await.status, StatusCode::OK);
}

#[tokio::test]
async fn keys_do_not_share_a_prefix_cache() {
    let server = guarded();
    let body = json!({"prompt": "a long text ".repeat(10), "max_tokens": 2, "temperature": 0}).to_string();
    let cached = async |key: &str| {
        let mut request = json_request(COMPLETIONS, body.clone());
        request.headers_mut().insert("x-api-key", key.parse().expect("a value"));
        server.send(request).await.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64()
    };
    assert_eq!(cached("key-one").await, Some(0));
    assert!(cached("key-one").await >= Some(32));
    assert_eq!(cached("key-two").await, Some(0), "another caller cannot tell what was sent before");
}

#[tokio::test]
async fn the_page_and_the_pulse_are_public() {
    let server = guarded();
    for path in ["/", "/ui/style.css", "/ui/app.js", "/live"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    let page = server.get("/").await;
    let policy = page.headers[header::CONTENT_SECURITY_POLICY].to_str().expect("text");
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    assert!(page.text().contains("Cupola"));
}

#[tokio::test]
async fn a_loopback_server_answers_to_its_own_names() {
    let allowed_hosts = vec!["box.lan".to_owned()];
    let config = ServerConfig { allowed_hosts, ..ServerConfig::default() };
    let server = Plan { config, loopback_only: true, ..Plan::default() }.start();
    for host in ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "app.localhost", "box.lan:8000"] {
        assert_eq!(get_with(&server, "/v1/models", "host", host).await.status, StatusCode::OK, "{host}");
    }
    for host in ["evil.example:8000", "localhost.evil.example", "192.168.1.2"] {
        for path in ["/v1/models", "/", "/metrics"] {
            let answer = get_with(&server, path, "host", host).await;
            assert_eq!(answer.status, StatusCode::FORBIDDEN, "{host} {path}");
            assert_eq!(answer.error()["code"], "host_not_allowed");
        }
    }
    let public = super::support::server();
    assert_eq!(get_with(&public, "/v1/models", "host", "gpu.example").await.status, StatusCode::OK);
}

#[tokio::test]
async fn every_answer_carries_a_request_id() {
    let server = guarded();
    for path in ["/live", "/v1/models", "/nothing"] {
        let answer = get_with(&server, path, "x-request-id", "trace-42").await;
        assert_eq!(answer.headers["x-request-id"], "trace-42", "{path}");
        let made_up = server.get(path).await.headers["x-request-id"].clone();
        assert!(made_up.to_str().expect("text").starts_with("req-"));
    }
    let hostile = get_with(&server, "/live", "x-request-id", "a b\tc").await;
    assert!(hostile.headers["x-request-id"].to_str().expect("text").starts_with("req-"));
}

#[tokio::test]
async fn slow_and_huge_heads_are_cut_off() {
    let config = ServerConfig { header_timeout: Duration::from_millis(100), ..ServerConfig::default() };
    let server = Plan { config, ..Plan::default() }.start();
    let addr = server.listen().await;

    let mut slow = TcpStream::connect(addr).await.expect("connects");
    slow.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-Slow: ").await.expect("writes");
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), slow.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "a head that never ends is not waited for");
    assert!(!String::from_utf8_lossy(&rest).starts_with("HTTP/1.1 200"));

    let mut huge = TcpStream::connect(addr).await.expect("connects");
    let head = format!("GET /live HTTP/1.1\r\nHost: localhost\r\nX-Big: {}\r\n\r\n", "x".repeat(100_000));
    // The server may close before it has read everything.
    huge.write_all(head.as_bytes()).await.ok();
    let mut answer = [0; 64];
    let read = huge.read(&mut answer).await.unwrap_or(0);
    let status = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(status.is_empty() || status.starts_with("HTTP/1.1 431"), "{status}");
}

#[tokio::test]
async fn connections_are_limited() {
    let config = ServerConfig { max_connections: 2, ..ServerConfig::default() };
    let server = Plan { config, ..Plan::default() }.start();
    let addr = server.listen().await;
    let ask = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut buffer = [0; 512];
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut socket = TcpStream::connect(addr).await.expect("connects");
        socket.write_all(ask).await.expect("writes");
        assert!(socket.read(&mut buffer).await.expect("an answer") > 0);
        held.push(socket);
    }
    let mut third = TcpStream::connect(addr).await.expect("the system's backlog takes it");
    third.write_all(ask).await.expect("writes");
    let early = tokio::time::timeout(Duration::from_millis(100), third.read(&mut buffer)).await;
    assert!(early.is_err(), "the third waits");
    held.pop();
    let read = tokio::time::timeout(Duration::from_secs(5), third.read(&mut buffer)).await;
    assert!(read.expect("its turn came").expect("an answer") > 0);
}

#[tokio::test]
async fn an_open_server_serves_without_a_key() {
    assert_eq!(server().get("/v1/models").await.status, StatusCode::OK);
    assert_eq!(get_with(&server(), "/v1/models", "authorization", "Bearer whatever").await.status, StatusCode::OK);
}
