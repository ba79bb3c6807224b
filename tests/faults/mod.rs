//! Clients that go away, servers that are told to stop: nothing leaks and the others go on.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::support::default_model;
use crate::support::server::Server;

/// Sends a request on a raw socket, so that the test decides when the connection dies.
fn open(server: &Server, body: &serde_json::Value) -> TcpStream {
    let address = server.url.strip_prefix("http://").expect("a plain URL");
    let mut socket = TcpStream::connect(address).expect("the server accepts");
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).and_then(|()| socket.write_all(body.as_bytes())).expect("the request is sent");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a read timeout");
    socket
}

fn endless(prompt: &str, stream: bool) -> serde_json::Value {
    json!({"model": "test-model", "prompt": prompt, "max_tokens": 1900, "ignore_eos": true, "stream": stream, "temperature": 0})
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let Some(model) = default_model() else { return };
    // Two sequences run, the others wait: clients leave in the stream, before the first token, and in the queue.
    let server = Server::start(&model, &["--max-num-seqs", "2"]);
    let used = "vllm:kv_cache_usage_perc";
    assert_eq!(server.metric(used), 0.0);
    let mut streaming = open(&server, &endless("One two three", true));
    let whole = open(&server, &endless("Four five six", false));
    let queued = [open(&server, &endless("Seven", true)), open(&server, &endless("Eight", false))];
    let mut byte = [0; 512];
    assert!(streaming.read(&mut byte).expect("the stream starts") > 0);
    server.wait_for_metric("vllm:num_requests_waiting", 2.0);
    drop((streaming, whole, queued));
    server.wait_for_metric("vllm:num_requests_waiting", 0.0);
    server.wait_for_metric("vllm:num_requests_running", 0.0);
    server.wait_for_metric(used, 0.0);
    let (status, answer) =
        server.post("/v1/completions", &json!({"model": "test-model", "prompt": "Hello", "max_tokens": 4}));
    assert_eq!(status, 200, "{answer}");
}

#[test]
fn a_full_queue_refuses_at_once() {
    let Some(model) = default_model() else { return };
    let server = Server::start(&model, &["--max-num-seqs", "1", "--max-queued-requests", "2"]);
    // One runs before the others come: a request that arrives waits until a step takes it in, and three would not fit.
    let runs = open(&server, &endless("Number 0", true));
    server.wait_for_metric("vllm:num_requests_running", 1.0);
    let held = [open(&server, &endless("Number 1", true)), open(&server, &endless("Number 2", true))];
    server.wait_for_metric("vllm:num_requests_waiting", 2.0);
    let mut refused = open(&server, &endless("One too many", true));
    let mut answer = String::new();
    // The connection stays open after the answer, so read until the body is there.
    let mut buffer = [0; 4096];
    while !answer.contains("\"error\"") {
        let n = refused.read(&mut buffer).expect("an answer");
        assert!(n > 0, "the server closed without an answer: {answer}");
        answer.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert!(answer.starts_with("HTTP/1.1 429"), "{answer}");
    assert!(answer.to_lowercase().contains("retry-after:"), "{answer}");
    drop((runs, held));
    server.wait_for_metric("vllm:num_requests_waiting", 0.0);
}

#[test]
fn sigterm_lets_running_answers_finish() {
    let Some(model) = default_model() else { return };
    let mut server = Server::start(&model, &[]);
    let body = json!({"model": "test-model", "prompt": "Hello", "max_tokens": 100, "ignore_eos": true, "stream": true});
    let mut socket = open(&server, &body);
    let mut answer = vec![0; 256];
    let n = socket.read(&mut answer).expect("the stream starts");
    answer.truncate(n);
    assert!(Command::new("kill").args(["-TERM", &server.id().to_string()]).status().expect("kill runs").success());
    socket.read_to_end(&mut answer).expect("the rest of the stream");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains("data: [DONE]"), "{answer}");
    assert!(server.wait().success(), "a drained server ends with 0");
}
