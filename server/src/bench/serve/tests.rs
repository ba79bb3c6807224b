//! Load against a stand-in server that streams a fixed number of chunks.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::report::{Metric, Report, Selection};
use super::*;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};

/// What the stand-in does wrong, and what it has seen.
#[derive(Default)]
struct Stub {
    tokenizer: bool,
    /// The tokenizer is asked as llama-server's is.
    content_shape: bool,
    /// Every n-th completion is refused with 429; 0 refuses none.
    refuse_every: usize,
    /// Streams end without their last chunk.
    cut: bool,
    /// No usage at the end.
    silent: bool,
    seen: AtomicUsize,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

/// A word is a token, and one special token goes before them; `mountain` is three tokens.
fn count_tokens(text: &str, special: bool) -> usize {
    let words = text.split_whitespace().map(|word| if word == "mountain" { 3 } else { 1 });
    words.sum::<usize>() + usize::from(special)
}

async fn tokenize(State(stub): State<Arc<Stub>>, Json(body): Json<Value>) -> Response {
    if !stub.tokenizer {
        return (StatusCode::NOT_FOUND, Json(json!({"error": {"message": "no such route"}}))).into_response();
    }
    if stub.content_shape {
        let special = body["add_special"].as_bool().unwrap_or(false);
        let count = body["content"].as_str().map_or(0, |text| count_tokens(text, special));
        return Json(json!({"tokens": vec![7; count]})).into_response();
    }
    let special = body["add_special_tokens"].as_bool().expect("always sent");
    let count = count_tokens(body["prompt"].as_str().expect("text"), special);
    Json(json!({"count": count, "max_model_len": 4096, "tokens": vec![7; count]})).into_response()
}

async fn complete(State(stub): State<Arc<Stub>>, Json(body): Json<Value>) -> Response {
    let number = stub.seen.fetch_add(1, SeqCst) + 1;
    if stub.refuse_every > 0 && number % stub.refuse_every == 0 {
        let error = json!({"error": {"message": "queue full", "type": "overloaded", "param": null, "code": null}});
        return (StatusCode::TOO_MANY_REQUESTS, Json(error)).into_response();
    }
    let running = stub.running.fetch_add(1, SeqCst) + 1;
    stub.most_running.fetch_max(running, SeqCst);
    let chat = body.get("messages").is_some();
    let prompt = if chat { &body["messages"][0]["content"] } else { &body["prompt"] };
    let prompt_tokens = count_tokens(prompt.as_str().expect("text"), true);
    let asked = if chat { &body["max_completion_tokens"] } else { &body["max_tokens"] };
    let tokens = asked.as_u64().expect("a number");
    assert_eq!(body["stream_options"]["include_usage"], true);

    let mut events = vec![": hello\n\n".to_owned()];
    if chat {
        events.push(format!(
            "data: {}\n\n",
            json!({"choices": [{"delta": {"role": "assistant"}, "finish_reason": null}]})
        ));
    }
    for i in 0..tokens {
        let finish = (i + 1 == tokens && !stub.cut).then_some("length");
        let choice = if chat {
            json!({"index": 0, "delta": {"content": " é"}, "finish_reason": finish})
        } else {
            json!({"index": 0, "text": " é", "finish_reason": finish})
        };
        events.push(format!("data: {}\n\n", json!({"choices": [choice], "usage": null})));
    }
    if !stub.cut {
        if !stub.silent {
            let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": 0,
                               "prompt_tokens_details": {"cached_tokens": 2}});
            events.push(format!("data: {}\n\n", json!({"choices": [], "usage": usage})));
        }
        events.push("data: [DONE]\n\n".to_owned());
    }
    // Cut at odd places, as networks do.
    let bytes: Vec<u8> = events.concat().into_bytes();
    let pieces: Vec<Result<Vec<u8>, Infallible>> = bytes.chunks(37).map(|piece| Ok(piece.to_vec())).collect();
    let stream = futures_util::stream::unfold((pieces.into_iter(), stub), |(mut pieces, stub)| async move {
        tokio::time::sleep(std::time::Duration::from_micros(200)).await;
        match pieces.next() {
            Some(piece) => Some((piece, (pieces, stub))),
            None => {
                stub.running.fetch_sub(1, SeqCst);
                None
            }
        }
    });
    ([("content-type", "text/event-stream")], Body::from_stream(stream)).into_response()
}

async fn serve(stub: Stub) -> (SocketAddr, Arc<Stub>) {
    let stub = Arc::new(stub);
    let models = || async { Json(json!({"object": "list", "data": [{"id": "stub", "root": "stub"}]})) };
    let app = Router::new()
        .route("/v1/models", get(models))
        .route("/tokenize", post(tokenize))
        .route("/v1/completions", post(complete))
        .route("/v1/chat/completions", post(complete))
        .with_state(Arc::clone(&stub));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move { axum::serve(listener, app).await.expect("the stand-in serves") });
    (address, stub)
}

fn options(address: SocketAddr) -> Options {
    Options {
        base_url: format!("http://{address}"),
        endpoint: "/v1/completions".to_owned(),
        dialect: Dialect::Completions,
        api_key: Some("key".to_owned()),
        model: None,
        num_prompts: 12,
        num_warmups: 2,
        max_concurrency: Some(3),
        request_rate: f64::INFINITY,
        burstiness: 1.0,
        input_len: 40,
        output_len: 6,
        range_ratio: 0.0,
        prefix_len: 8,
        ignore_eos: true,
        sampling: Map::new(),
        extra_body: Map::new(),
        seed: 0,
        ready_timeout: Duration::ZERO,
        request_timeout: Duration::from_secs(20),
    }
}

fn everything() -> Selection {
    Selection {
        metrics: Metric::NAMED.iter().map(|(_, metric)| *metric).collect(),
        percentiles: vec![50.0, 99.9],
        goodput: vec![(Metric::E2el, 1e6)],
        detailed: true,
    }
}

#[tokio::test]
async fn a_closed_loop_counts_tokens_exactly() {
    let (address, stub) = serve(Stub { tokenizer: true, ..Stub::default() }).await;
    let mut standings = Vec::new();
    let run = run(options(address), &mut |standing| standings.push(standing)).await.expect("the stand-in answers");
    assert_eq!(standings.last(), Some(&Standing { total: 12, done: 12, failed: 0, output_tokens: 72 }));
    assert!((2..=3).contains(&stub.most_running.load(SeqCst)), "at most --max-concurrency at once");
    assert!(run.exact_prompts);
    for outcome in &run.outcomes {
        assert_eq!(
            (outcome.prompt_tokens, outcome.planned_prompt),
            (48, 48),
            "prefix and input, special token included"
        );
        assert_eq!((outcome.output_tokens, outcome.gaps.len()), (6, 5));
        assert_eq!(outcome.text, " é".repeat(6));
        assert!(outcome.ttft > 0.0 && outcome.latency >= outcome.ttft);
    }

    let selection = everything();
    let report = Report::new(&run, &selection);
    assert!(!report.all_failed());
    let json = report.json(Map::new());
    for (key, value) in [("completed", 12), ("failed", 0), ("total_input_tokens", 576), ("total_output_tokens", 72)] {
        assert_eq!(json[key], value, "{key}");
    }
    assert_eq!(json["request_rate"], "inf");
    assert_eq!(json["model_id"], "stub");
    assert_eq!(json["ttfts"].as_array().map(Vec::len), Some(12));
    assert_eq!(json["cupola"]["cached_tokens"], 24);
    for metric in ["ttft", "tpot", "itl", "e2el"] {
        for statistic in ["mean", "median", "std", "p50", "p99.9"] {
            assert!(json[format!("{statistic}_{metric}_ms")].is_f64(), "{statistic}_{metric}_ms");
        }
    }
    assert_eq!(json["request_goodput"], json["request_throughput"], "every request is fast enough");
    let block = report.block();
    for line in [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     12        ",
        "Maximum request concurrency:             3         ",
        "---------------Time to First Token----------------",
        "-----Time per Output Token (excl. 1st token)------",
        "---------------Inter-token Latency----------------",
        "==================================================",
    ] {
        assert!(block.lines().any(|found| found == line), "{line:?} is not in\n{block}");
    }
    assert!(block.contains("P99.9 TPOT (ms):") && block.contains("tpot = (e2el - ttft)"), "{block}");
}

#[tokio::test]
async fn a_seed_makes_the_same_prompts_and_another_one_others() {
    let (address, _) = serve(Stub { tokenizer: true, ..Stub::default() }).await;
    let client = Client::new(&format!("http://{address}"), None).expect("a URL");
    let make = async |seed| {
        let options = Options { seed, range_ratio: 0.3, ..options(address) };
        let prompts = prompts::make(&options, &client, "stub").await.expect("the stand-in counts");
        prompts.measured.into_iter().map(|prompt| prompt.text).collect::<Vec<_>>()
    };
    let (first, again, other) = (make(1).await, make(1).await, make(2).await);
    assert_eq!(first, again);
    assert_ne!(first, other);
    let prefix: Vec<&str> = first[0].split(' ').take(7).collect();
    for text in &first {
        assert!(text.starts_with(&prefix.join(" ")), "a shared prefix: {text}");
        let tokens = count_tokens(text, true);
        assert!((8 + 28..=8 + 52).contains(&tokens), "{tokens} tokens");
    }
}

#[tokio::test]
async fn a_tokenizer_of_the_other_shape_counts_as_well() {
    let (address, _) = serve(Stub { tokenizer: true, content_shape: true, ..Stub::default() }).await;
    let run = run(options(address), &mut |_| {}).await.expect("the stand-in answers");
    assert!(run.exact_prompts);
    assert!(run.outcomes.iter().all(|outcome| (outcome.prompt_tokens, outcome.failure.as_ref()) == (48, None)));
}

/// Answers one request a connection and promises nothing about the next one, which it reads and then hangs up.
async fn serve_once_a_connection() -> (SocketAddr, Arc<AtomicUsize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, SeqCst);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                assert!(stream.read(&mut buffer).await.expect("a request") > 0);
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.expect("the client reads");
                assert!(stream.read(&mut buffer).await.expect("another request, or the end") < buffer.len());
            });
        }
    });
    (address, connections)
}

#[tokio::test]
async fn a_connection_closed_between_two_requests_costs_no_request() {
    let (address, connections) = serve_once_a_connection().await;
    let client = Client::new(&format!("http://{address}"), None).expect("a URL");
    for expected in 1..=3 {
        assert_eq!(client.post_json("/x", &json!({})).await.expect("answered"), json!({}));
        assert_eq!(connections.load(SeqCst), expected, "each answer came over a connection of its own");
    }
}

#[tokio::test]
async fn refusals_are_counted_by_status() {
    let (address, _) = serve(Stub { refuse_every: 4, ..Stub::default() }).await;
    let options = Options { num_warmups: 0, ..options(address) };
    let run = run(options, &mut |_| {}).await.expect("the stand-in answers");
    let selection = everything();
    let report = Report::new(&run, &selection);
    let json = report.json(Map::new());
    assert_eq!((&json["completed"], &json["failed"]), (&json!(9), &json!(3)));
    assert_eq!(json["cupola"]["failures"], json!({"HTTP 429": 3}));
    assert_eq!(json["cupola"]["prompt_lengths_exact"], false, "no /tokenize here");
    assert!(
        report.block().contains("failed, HTTP 429: 3, such as: the server answered 429 Too Many Requests: queue full")
    );
}

#[tokio::test]
async fn a_stream_that_ends_early_is_a_failure() {
    let (address, _) = serve(Stub { cut: true, ..Stub::default() }).await;
    let run = run(options(address), &mut |_| {}).await.expect("the stand-in answers");
    let selection = everything();
    let report = Report::new(&run, &selection);
    assert!(report.all_failed());
    assert_eq!(report.json(Map::new())["cupola"]["failures"], json!({"connection broke": 12}));
    report.block();
}

#[tokio::test]
async fn chat_ignores_the_role_chunk_and_counts_chunks_without_usage() {
    let (address, _) = serve(Stub { silent: true, ..Stub::default() }).await;
    let options = Options {
        dialect: Dialect::Chat,
        endpoint: "/v1/chat/completions".to_owned(),
        model: Some("mine".to_owned()),
        ..options(address)
    };
    let run = run(options, &mut |_| {}).await.expect("the stand-in answers");
    assert_eq!(run.model, "mine");
    assert!(
        run.outcomes.iter().all(|outcome| outcome.gaps.len() == 5 && outcome.output_tokens == 6 && !outcome.counted)
    );
}

#[tokio::test]
async fn nobody_listening_is_one_error() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let error = run(options(address), &mut |_| {}).await.expect_err("nobody listens");
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    assert!(error.to_string().starts_with(&format!("cannot connect to {address}")), "{error}");
}

#[test]
fn arrivals_fill_exactly_the_time_of_their_rate() {
    let base = options(([127, 0, 0, 1], 1).into());
    for burstiness in [0.5, 1.0, f64::INFINITY] {
        let options = Options { num_prompts: 200, request_rate: 8.0, burstiness, ..base.clone() };
        let times = arrivals(&options);
        assert!((times[199] - 25.0).abs() < 1e-9 && times.is_sorted(), "burstiness {burstiness}");
        let steady = times.windows(2).all(|pair| (pair[1] - pair[0] - 0.125).abs() < 1e-9);
        assert_eq!(steady, burstiness.is_infinite());
    }
    assert_eq!(arrivals(&Options { num_prompts: 3, ..base }), [0.0; 3]);
}
