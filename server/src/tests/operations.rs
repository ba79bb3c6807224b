//! What operators and tools ask: models, tokens, health, metrics.

use std::collections::BTreeSet;

use http::{StatusCode, header};
use serde_json::json;

use super::support::{CHAT, COMPLETIONS, CONTEXT, MODEL, server};

#[tokio::test]
async fn models_are_listed_under_every_name() {
    let server = server();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&str> =
        list["data"].as_array().expect("data").iter().map(|model| model["id"].as_str().expect("an id")).collect();
    assert_eq!(ids, [MODEL, "alias"]);
    for model in list["data"].as_array().expect("data") {
        assert_eq!((&model["object"], &model["root"]), (&json!("model"), &json!(MODEL)));
        assert_eq!(model["max_model_len"], CONTEXT);
        assert!(model["created"].is_u64() && model["owned_by"].is_string());
    }
    let one = server.get(&format!("/v1/models/{MODEL}")).await;
    assert_eq!((one.status, &one.json()["id"]), (StatusCode::OK, &json!(MODEL)));
    let none = server.get("/v1/models/some/one").await;
    assert_eq!((none.status, &none.error()["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
}

#[tokio::test]
async fn texts_go_to_tokens_and_back() {
    let server = server();
    for text in ["Hello, world", "naïve façade — 東京 🗼", ""] {
        let body = json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true});
        let cut = server.post("/tokenize", &body).await.json();
        let tokens = cut["tokens"].as_array().expect("tokens").clone();
        assert_eq!(cut["count"], tokens.len());
        assert_eq!(cut["token_strs"].as_array().map(Vec::len), Some(tokens.len()));
        assert_eq!(cut["max_model_len"], CONTEXT);
        let back = server.post("/detokenize", &json!({"tokens": tokens, "model": MODEL})).await.json();
        assert_eq!(back["prompt"], text);
    }
    let messages = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let tokens = server.post("/tokenize", &messages).await.json()["tokens"].clone();
    let text = server.post("/detokenize", &json!({"tokens": tokens})).await.json();
    assert_eq!(text["prompt"], "<user>Hi\n<assistant>");
    let info = server.get("/tokenizer_info").await.json();
    assert!(info["eos_token"].is_string() && info["chat_template"].is_string(), "{info}");
}

#[tokio::test]
async fn a_text_that_fits_may_be_long() {
    // Long enough to be tokenised on another thread.
    let server = server();
    let body = json!({"prompt": "x".repeat(6000), "max_tokens": 1});
    let answer = server.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let cut = server.post("/tokenize", &json!({"prompt": "word ".repeat(900), "add_special_tokens": false})).await;
    assert!(cut.status == StatusCode::OK || cut.error()["code"] == "context_length_exceeded", "{}", cut.text());
}

#[tokio::test]
async fn health_has_four_names_and_a_version() {
    let server = server();
    for path in ["/health", "/ping", "/ready", "/live"] {
        let answer = server.get(path).await;
        assert_eq!((answer.status, answer.json()), (StatusCode::OK, json!({"status": "ok"})), "{path}");
    }
    assert_eq!(server.get("/version").await.json()["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn metrics_follow_the_text_format() {
    let server = server();
    server.post(CHAT, &json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})).await;
    server.post(CHAT, &json!({"messages": []})).await;
    let page = server.get("/metrics").await;
    assert!(page.headers[header::CONTENT_TYPE].to_str().expect("text").starts_with("text/plain; version=0.0.4"));
    let text = page.text();
    let mut families = BTreeSet::new();
    let mut samples = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("name and kind");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(families.insert(name.to_owned()), "{name} has one TYPE line");
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').expect("series and value");
            value.parse::<f64>().unwrap_or_else(|e| panic!("{e}: {line}"));
            assert!(samples.insert(series.to_owned()), "{series} comes once");
            let name = series.split('{').next().expect("a name");
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(families.contains(name) || families.contains(base), "{name} has a TYPE line before it");
        }
    }
    for name in [
        "vllm:e2e_request_latency_seconds",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:inter_token_latency_seconds",
        "vllm:time_to_first_token_seconds",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:request_success_total",
        "vllm:request_queue_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:prefix_cache_hits_total",
    ] {
        assert!(families.contains(name), "{name}");
    }
    assert!(text.contains("model_name=\"org/test-model\""));
    assert!(
        text.contains("http_requests_total{handler=\"/v1/chat/completions\",method=\"POST\",status=\"200\"} 1"),
        "{text}"
    );
    assert!(text.contains("cupola_requests_rejected_total{reason=\"invalid_value\"} 1"));
    assert!(server.metric("vllm:generation_tokens_total").await >= 1.0);
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
}
