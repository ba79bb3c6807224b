//! The HTTP contract on the real model: what clients rely on.

use serde_json::{Value, json};

use crate::support::default_model;
use crate::support::server::Server;

fn chat(extra: Value) -> Value {
    let mut body = json!({
        "model": "test-model", "temperature": 0, "max_tokens": 24,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "The capital of France is"},
        ],
    });
    merge(&mut body, extra);
    body
}

fn completion(extra: Value) -> Value {
    let mut body = json!({"model": "test-model", "temperature": 0, "max_tokens": 24, "prompt": "Once upon a time"});
    merge(&mut body, extra);
    body
}

fn merge(body: &mut Value, extra: Value) {
    let (Value::Object(body), Value::Object(extra)) = (body, extra) else { panic!("both are objects") };
    body.extend(extra);
}

fn deltas(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
}

fn texts(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect()
}

/// One server for the whole contract: starting it costs more than asking it.
#[test]
fn openai_contract() {
    let Some(model) = default_model() else { return };
    let server = Server::start(&model, &[]);
    models_are_listed(&server);
    chat_answers_and_streams_the_same(&server);
    completions_stream_the_same(&server);
    usage_says_what_was_cached(&server);
    several_choices_and_seeds(&server);
    stops(&server);
    logprobs(&server);
    tokens_round_trip(&server);
    health_and_metrics(&server);
    bad_input_is_named(&server);
}

fn models_are_listed(server: &Server) {
    let (status, models) = server.get("/v1/models");
    assert_eq!(status, 200);
    let model = &models["data"][0];
    assert_eq!(model["id"], "test-model");
    assert!(model["root"].is_string() && model["max_model_len"].is_u64(), "{model}");
    let (status, one) = server.get("/v1/models/test-model");
    assert_eq!((status, &one["id"]), (200, &json!("test-model")));
    let (status, missing) = server.get("/v1/models/some/one");
    assert_eq!((status, &missing["error"]["code"]), (404, &json!("model_not_found")));
}

fn chat_answers_and_streams_the_same(server: &Server) {
    let (status, whole) = server.post("/v1/chat/completions", &chat(json!({})));
    assert_eq!(status, 200, "{whole}");
    let text = whole["choices"][0]["message"]["content"].as_str().expect("an answer");
    assert!(text.contains("Paris"), "{text}");

    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = server.stream("/v1/chat/completions", &body);
    assert_eq!(deltas(&events), text);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_ne!(events[0]["choices"][0]["delta"]["content"], "", "the role comes with the first token");
    let (usage, rest) = events.split_last().expect("events");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert!(rest.iter().all(|e| e["usage"].is_null()));
    assert_eq!(rest.last().expect("a last chunk")["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
}

fn completions_stream_the_same(server: &Server) {
    for sampling in [json!({}), json!({"temperature": 0.8, "top_p": 0.9, "seed": 7}), json!({"stop": [" the", "."]})] {
        let (_, whole) = server.post("/v1/completions", &completion(sampling.clone()));
        let mut body = completion(sampling);
        merge(&mut body, json!({"stream": true}));
        assert_eq!(
            texts(&server.stream("/v1/completions", &body)),
            whole["choices"][0]["text"].as_str().expect("text")
        );
    }
    let (_, echoed) = server.post("/v1/completions", &completion(json!({"echo": true})));
    assert!(echoed["choices"][0]["text"].as_str().expect("text").starts_with("Once upon a time"));
    let (status, by_ids) = server.post("/v1/completions", &completion(json!({"prompt": [[28, 29, 30], [31, 32]]})));
    assert_eq!((status, by_ids["choices"].as_array().map(Vec::len)), (200, Some(2)), "{by_ids}");
}

fn usage_says_what_was_cached(server: &Server) {
    let prompt = "A long walk along the river ".repeat(20);
    let ask = || server.post("/v1/completions", &completion(json!({"prompt": prompt, "max_tokens": 12}))).1;
    let (cold, warm) = (ask(), ask());
    assert_eq!(cold["choices"][0]["text"], warm["choices"][0]["text"], "warm and cold prefix give the same answer");
    assert_eq!(cold["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert!(warm["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() >= Some(64), "{}", warm["usage"]);
    let (status, _) = server.post("/admin/reset_prefix_cache", &json!({}));
    assert_eq!(status, 200);
    assert_eq!(ask()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
}

fn several_choices_and_seeds(server: &Server) {
    let body = completion(json!({"n": 4, "temperature": 1.0, "seed": 11}));
    let (first, second) = (server.post("/v1/completions", &body).1, server.post("/v1/completions", &body).1);
    let choices = |answer: &Value| -> Vec<String> {
        answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].to_string()).collect()
    };
    assert_eq!(choices(&first), choices(&second), "a seed reproduces every choice");
    let mut distinct = choices(&first);
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 1, "choices of one request differ from each other");
}

fn stops(server: &Server) {
    let (_, plain) = server.post("/v1/completions", &completion(json!({})));
    let text = plain["choices"][0]["text"].as_str().expect("text");
    let word = text.split_whitespace().nth(4).expect("five words");
    let (_, stopped) = server.post("/v1/completions", &completion(json!({"stop": word})));
    assert_eq!(stopped["choices"][0]["text"].as_str(), text.split(word).next());
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let (_, forced) = server.post("/v1/completions", &completion(json!({"max_tokens": 64, "ignore_eos": true})));
    assert_eq!(forced["usage"]["completion_tokens"], 64);
    assert_eq!(forced["choices"][0]["finish_reason"], "length");
}

fn logprobs(server: &Server) {
    let (_, answer) = server.post("/v1/chat/completions", &chat(json!({"logprobs": true, "top_logprobs": 3})));
    for token in answer["choices"][0]["logprobs"]["content"].as_array().expect("logprobs") {
        let top = token["top_logprobs"].as_array().expect("top_logprobs");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], token["token"], "greedy takes the most likely token");
        assert!(token["logprob"].as_f64().expect("a number") <= 0.0);
    }
    let body = completion(json!({"echo": true, "logprobs": 1, "max_tokens": 1}));
    let (_, echoed) = server.post("/v1/completions", &body);
    let values = &echoed["choices"][0]["logprobs"];
    assert!(values["token_logprobs"][0].is_null() && values["token_logprobs"][1].is_f64(), "{values}");
}

fn tokens_round_trip(server: &Server) {
    let text = "naïve façade — 東京 🗼";
    let (_, tokens) = server.post("/tokenize", &json!({"model": "test-model", "prompt": text}));
    assert_eq!(tokens["count"].as_u64(), tokens["tokens"].as_array().map(|t| t.len() as u64));
    let (_, back) = server.post("/detokenize", &json!({"model": "test-model", "tokens": tokens["tokens"]}));
    assert_eq!(back["prompt"], text);
}

fn health_and_metrics(server: &Server) {
    for path in ["/health", "/live", "/ready", "/version"] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
    assert!(server.metric("vllm:generation_tokens_total") > 0.0);
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);
}

fn bad_input_is_named(server: &Server) {
    let chat_path = "/v1/chat/completions";
    let cases = [
        (chat_path, chat(json!({"model": "nobody"})), 404, "nobody"),
        (chat_path, chat(json!({"messages": []})), 400, "messages"),
        (chat_path, chat(json!({"temperature": -0.5})), 400, "temperature"),
        (chat_path, chat(json!({"temperature": "hot"})), 400, "temperature"),
        (chat_path, chat(json!({"messages": [{"role": "user", "content": 5}]})), 400, "messages[0]"),
        (chat_path, chat(json!({"n": 100_000})), 400, "n"),
        (chat_path, chat(json!({"stop": vec!["x"; 1000]})), 400, "stop"),
        (chat_path, chat(json!({"logit_bias": {"99999999": 1}})), 400, "logit_bias"),
        ("/v1/completions", completion(json!({"prompt": "word ".repeat(9000)})), 400, "maximum context length"),
        ("/v1/completions", completion(json!({"prompt": [4_000_000]})), 400, "4000000"),
        ("/v1/completions", completion(json!({"prompt": []})), 400, "prompt"),
    ];
    for (path, body, wanted, word) in cases {
        let (status, answer) = server.post(path, &body);
        let error = &answer["error"];
        assert_eq!(status, wanted, "{answer}");
        assert!(error["message"].as_str().is_some_and(|m| m.contains(word)), "{word:?} in {answer}");
        assert!(error["code"].is_string() || error["code"].is_null(), "{answer}");
    }
    let (_, long) = server.post("/v1/completions", &completion(json!({"prompt": "word ".repeat(9000)})));
    assert_eq!(long["error"]["code"], "context_length_exceeded");
    for (body, wanted) in [(&b"{\"model\":"[..], 400), (b"\xff\xfe{}", 400), (&vec![b' '; 16 * 1024 * 1024 + 1], 413)] {
        let (status, answer) = server.post_raw(chat_path, body);
        assert_eq!(status, wanted, "{answer}");
        assert!(answer["error"]["message"].is_string(), "{answer}");
    }
    assert_eq!(server.get("/v1/nothing").0, 404);
    assert_eq!(server.get(chat_path).0, 405);
}
