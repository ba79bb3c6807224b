//! Overload, clients that leave, an engine that fails, a server that is told to stop: nothing leaks, others go on.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::routing::get;
use axum::{Router, middleware};
use cupola_engine::EngineConfig;
use http::{StatusCode, header};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use super::support::{CHAT, COMPLETIONS, MODEL, Plan, TestServer, server, wait_until};
use crate::config::ServerConfig;
use crate::lifecycle::Phase;
use crate::{listen, observe};

/// A request that would run until the context is full.
fn endless(prompt: &str, stream: bool) -> Value {
    json!({
        "model": MODEL, "prompt": prompt, "temperature": 0, "stream": stream, "ignore_eos": true, "max_tokens": 200,
    })
}

fn slow_server(engine: EngineConfig) -> TestServer {
    let server = Plan { engine: EngineConfig { max_model_len: Some(256), ..engine }, ..Plan::default() }.start();
    server.controls.step_micros.store(10_000, Relaxed);
    server
}

async fn open(addr: SocketAddr, body: &Value) -> TcpStream {
    let mut socket = TcpStream::connect(addr).await.expect("connects");
    let body = body.to_string();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.expect("writes");
    socket.write_all(body.as_bytes()).await.expect("writes");
    socket
}

#[tokio::test]
async fn clients_that_leave_free_their_place() {
    let server = slow_server(EngineConfig { max_num_seqs: 2, ..EngineConfig::default() });
    let addr = server.listen().await;
    let metrics = server.model().engine.metrics();

    let mut streaming = open(addr, &endless("One two three", true)).await;
    let whole = open(addr, &endless("Four five six", false)).await;
    wait_until("two run", || metrics.running.get() == 2).await;
    let queued = [open(addr, &endless("Seven", true)).await, open(addr, &endless("Eight", false)).await];
    wait_until("two wait", || metrics.waiting.get() == 2).await;
    let mut buffer = [0; 256];
    assert!(streaming.read(&mut buffer).await.expect("the stream began") > 0);

    drop((streaming, whole, queued));
    server.settles().await;
    assert_eq!(metrics.cancelled_running.get() + metrics.cancelled_waiting.get(), 4);
    wait_until("the HTTP side knows too", || server.app.meter.in_flight() == 0).await;
    assert_eq!(server.app.meter.client_gone(), 4);

    server.controls.step_micros.store(0, Relaxed);
    assert_eq!(server.post(COMPLETIONS, &json!({"prompt": "Hi", "max_tokens": 3})).await.status, StatusCode::OK);
}

#[tokio::test]
async fn others_go_on_when_one_leaves() {
    let server = slow_server(EngineConfig { max_num_seqs: 4, ..EngineConfig::default() });
    server.controls.step_micros.store(2_000, Relaxed);
    let addr = server.listen().await;
    let body = json!({"prompt": "The one who stays", "temperature": 0, "max_tokens": 40, "ignore_eos": true});
    let alone = server.post(COMPLETIONS, &body).await.json();
    let leaving = open(addr, &endless("The one who leaves", true)).await;
    let metrics = server.model().engine.metrics();
    wait_until("it runs", || metrics.running.get() == 1).await;
    let leave = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        drop(leaving);
    };
    let (stayed, ()) = tokio::join!(server.post(COMPLETIONS, &body), leave);
    assert_eq!(stayed.json()["choices"], alone["choices"]);
    server.settles().await;
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let server = slow_server(EngineConfig { max_num_seqs: 1, max_queued_requests: 2, ..EngineConfig::default() });
    let addr = server.listen().await;
    let metrics = server.model().engine.metrics();
    let first = open(addr, &endless("first", true)).await;
    wait_until("it runs", || metrics.running.get() == 1).await;
    let held = [open(addr, &endless("second", true)).await, open(addr, &endless("third", false)).await];
    wait_until("two wait", || metrics.waiting.get() == 2).await;

    let answer = server.post(COMPLETIONS, &endless("one too many", true)).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS, "{}", answer.text());
    let wait: u64 = answer.headers[header::RETRY_AFTER].to_str().expect("text").parse().expect("seconds");
    assert!(wait >= 1);
    let error = answer.error();
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("server_overloaded")));
    // More choices than places are refused together, and give back the places they got.
    let many = json!({"prompt": "x", "n": 3, "max_tokens": 1});
    assert_eq!(server.post(COMPLETIONS, &many).await.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(server.model().engine.backlog().0, 2);

    drop((first, held));
    server.settles().await;
    server.controls.step_micros.store(0, Relaxed);
    assert_eq!(server.post(COMPLETIONS, &json!({"prompt": "x", "max_tokens": 1})).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_failed_step_fails_its_requests_only() {
    let server = server();
    server.controls.fail.store(true, Relaxed);
    let whole = server.post(COMPLETIONS, &endless("Hi", false)).await;
    assert_eq!(whole.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(whole.error()["type"], "server_error");

    let streamed = server.post(COMPLETIONS, &endless("Hi", true)).await;
    let text = streamed.text();
    let last = text.trim_end().rsplit("\n\n").next().expect("an event");
    let event: Value = serde_json::from_str(last.strip_prefix("data: ").expect("an event")).expect("JSON");
    assert_eq!(event["error"]["code"], "generation_failed");
    assert!(!text.contains("[DONE]"), "a failed stream must not look complete");

    server.controls.fail.store(false, Relaxed);
    server.settles().await;
    assert_eq!(server.post(COMPLETIONS, &json!({"prompt": "Hi", "max_tokens": 2})).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_dead_engine_is_told() {
    let server = server();
    server.controls.panic.store(true, Relaxed);
    let answer = server.post(COMPLETIONS, &endless("Hi", false)).await;
    assert!(answer.status.is_server_error(), "{}", answer.text());
    answer.error();
    wait_until("the engine is dead", || !server.model().engine.is_alive()).await;
    for path in ["/live", "/ready", "/health"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(answer.error()["code"], "engine_dead");
    }
    let refused = server.post(CHAT, &json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(refused.error()["code"], "engine_dead");
    assert_eq!(server.metric("cupola_engine_up").await, 0.0);
}

#[tokio::test]
async fn a_handler_that_panics_is_an_internal_error() {
    let server = server();
    async fn boom() -> &'static str {
        panic!("told to panic")
    }
    let router = Router::new()
        .route("/boom", get(boom))
        .layer(middleware::from_fn_with_state(server.app.clone(), observe::observe));
    let request = http::Request::get("/boom").body(axum::body::Body::empty()).expect("a request");
    let response = router.oneshot(request).await.expect("an answer");
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert!(response.headers().contains_key("x-request-id"));
    drop(response);
    assert_eq!(server.app.meter.in_flight(), 0);
}

#[tokio::test]
async fn a_draining_server_finishes_and_takes_nothing_new() {
    let server = slow_server(EngineConfig::default());
    server.controls.step_micros.store(3_000, Relaxed);
    let addr = server.listen().await;
    let mut running = open(addr, &json!({"prompt": "Hi", "stream": true, "ignore_eos": true, "max_tokens": 60})).await;
    let metrics = server.model().engine.metrics();
    wait_until("it runs", || metrics.running.get() == 1).await;

    let drained = tokio::spawn({
        let app = server.app.clone();
        async move { listen::drain(&app).await }
    });
    wait_until("it drains", || server.app.lifecycle.phase() == Phase::Draining).await;
    for path in ["/ready", "/health"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
        assert_eq!(answer.error()["code"], "server_draining");
    }
    assert_eq!(server.get("/live").await.status, StatusCode::OK);
    let refused = server.post(COMPLETIONS, &endless("late", false)).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers[header::CONNECTION], "close");
    assert!(refused.headers.contains_key(header::RETRY_AFTER));

    let mut rest = String::new();
    running.read_to_string(&mut rest).await.expect("the whole answer, then the end of the connection");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    drained.await.expect("drained");
    assert_eq!(server.app.lifecycle.phase(), Phase::Stopping);
    assert_eq!(server.app.meter.connections(), 0);
}

#[tokio::test]
async fn what_outlasts_the_timeout_is_cut_off_with_an_error() {
    let config = ServerConfig { shutdown_timeout: Duration::from_millis(80), ..ServerConfig::default() };
    let server = Plan { config, ..Plan::default() }.start();
    server.controls.step_micros.store(20_000, Relaxed);
    let addr = server.listen().await;
    let mut streaming = open(addr, &endless("One", true)).await;
    let mut whole = open(addr, &endless("Two", false)).await;
    let metrics = server.model().engine.metrics();
    wait_until("both run", || metrics.running.get() == 2).await;
    listen::drain(&server.app).await;
    let (mut stream_text, mut whole_text) = (String::new(), String::new());
    streaming.read_to_string(&mut stream_text).await.expect("an end");
    whole.read_to_string(&mut whole_text).await.expect("an end");
    assert!(stream_text.contains("server_shutdown") && !stream_text.contains("[DONE]"), "{stream_text}");
    assert!(whole_text.starts_with("HTTP/1.1 503") && whole_text.contains("server_shutdown"), "{whole_text}");
    server.settles().await;
}

#[tokio::test]
async fn a_connection_serves_several_requests() {
    let server = server();
    let addr = server.listen().await;
    let mut socket = TcpStream::connect(addr).await.expect("connects");
    for _ in 0..3 {
        socket.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n").await.expect("writes");
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut buffer = [0; 512];
            let read = socket.read(&mut buffer).await.expect("an answer");
            assert!(read > 0, "kept open");
            answer.extend_from_slice(&buffer[..read]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"));
    }
    assert_eq!(server.app.meter.connections(), 1);
}
