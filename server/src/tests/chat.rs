//! `/v1/chat/completions`: bodies, streams, and that the two agree.

use serde_json::{Value, json};

use super::support::{CHAT, MODEL, Plan, TestServer, server, with};

fn ask(extra: Value) -> Value {
    let base = json!({
        "model": MODEL, "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Paris?"}],
    });
    with(base, extra)
}

/// The parts of a stream put together as a client would: one message, finish reason and logprobs list a choice.
fn assemble(events: &[Value], choices: usize) -> Vec<Value> {
    let mut whole = vec![json!({"content": "", "finish": null, "logprobs": [], "role": null, "tokens": []}); choices];
    for event in events {
        for choice in event["choices"].as_array().expect("choices") {
            let one = &mut whole[usize::try_from(choice["index"].as_u64().expect("an index")).expect("small")];
            assert!(one["finish"].is_null(), "nothing follows the end of a choice: {event}");
            if let Some(text) = choice["delta"]["content"].as_str() {
                one["content"] = format!("{}{text}", one["content"].as_str().expect("text")).into();
            }
            for (to, from) in [("logprobs", &choice["logprobs"]["content"]), ("tokens", &choice["token_ids"])] {
                let more = from.as_array().cloned().unwrap_or_default();
                one[to].as_array_mut().expect("a list").extend(more);
            }
            if !choice["delta"]["role"].is_null() {
                assert!(one["role"].is_null(), "the role comes once");
                one["role"] = choice["delta"]["role"].clone();
            }
            one["finish"] = choice["finish_reason"].clone();
        }
    }
    whole
}

async fn streamed_equals_whole(server: &TestServer, extra: Value) {
    let whole = server.post(CHAT, &ask(extra.clone())).await.json();
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = server.post(CHAT, &with(ask(extra.clone()), options)).await.events();
    let (last, chunks) = events.split_last().expect("events");
    let choices = whole["choices"].as_array().unwrap_or_else(|| panic!("{whole}"));
    for (streamed, choice) in assemble(chunks, choices.len()).iter().zip(choices) {
        assert_eq!(streamed["content"], choice["message"]["content"], "{extra}");
        assert_eq!(streamed["role"], "assistant");
        assert_eq!(streamed["finish"], choice["finish_reason"], "{extra}");
        let logprobs = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        assert_eq!(streamed["logprobs"], json!(logprobs), "{extra}");
        if extra.get("return_token_ids").is_some() {
            assert_eq!(streamed["tokens"], choice["token_ids"], "{extra}");
        }
    }
    assert_eq!(last["choices"], json!([]));
    for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][key], whole["usage"][key], "{extra}");
    }
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
}

#[tokio::test]
async fn streamed_and_whole_answers_agree() {
    let server = server();
    for extra in [
        json!({}),
        json!({"temperature": 0.9, "seed": 3}),
        json!({"temperature": 1.3, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "seed": 5, "n": 3}),
        json!({"stop": ["e", "zz"]}),
        json!({"stop": "a", "include_stop_str_in_output": true}),
        json!({"logprobs": true, "top_logprobs": 4}),
        json!({"logprobs": true, "temperature": 0.7, "seed": 1, "n": 2}),
        json!({"return_token_ids": true, "max_tokens": 60, "ignore_eos": true}),
        json!({"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}),
        json!({"max_completion_tokens": 1}),
    ] {
        streamed_equals_whole(&server, extra).await;
    }
    server.settles().await;
}

#[tokio::test]
async fn a_body_has_openais_shape() {
    let server = server();
    let body = server.post(CHAT, &ask(json!({}))).await.json();
    assert!(body["id"].as_str().expect("an id").starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], MODEL);
    assert!(body["created"].as_u64() > Some(1_600_000_000));
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["index"], 0);
    assert!(choice["logprobs"].is_null());
    let usage = &body["usage"];
    let count = |key: &str| usage[key].as_u64().expect(key);
    assert_eq!(count("prompt_tokens") + count("completion_tokens"), count("total_tokens"));
    assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
}

#[tokio::test]
async fn the_role_comes_with_the_first_token() {
    let events = server().post(CHAT, &ask(json!({"stream": true}))).await.events();
    let first = &events[0]["choices"][0];
    assert_eq!(first["delta"]["role"], "assistant");
    assert!(first["delta"]["content"].is_string());
    assert!(events.iter().skip(1).all(|event| event["choices"][0]["delta"].get("role").is_none()));
    assert!(events.iter().all(|event| event.get("usage").is_none()), "usage was not asked for");
    assert!(events.iter().all(|event| event["id"] == events[0]["id"] && event["object"] == "chat.completion.chunk"));
    let ends: Vec<&Value> = events.iter().filter(|event| !event["choices"][0]["finish_reason"].is_null()).collect();
    assert_eq!(ends.len(), 1);
}

#[tokio::test]
async fn usage_can_come_with_every_chunk() {
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = ask(json!({"stream": true, "stream_options": options, "ignore_eos": true, "max_tokens": 8}));
    let events = server().post(CHAT, &body).await.events();
    let counts: Vec<u64> =
        events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().expect("usage")).collect();
    assert!(counts.is_sorted(), "{counts:?}");
    assert_eq!(counts.last(), Some(&8));
    assert!(events.iter().all(|event| event["usage"]["prompt_tokens"] == events[0]["usage"]["prompt_tokens"]));
}

#[tokio::test]
async fn several_choices_share_a_prompt() {
    let server = server();
    let body = ask(json!({"n": 4, "temperature": 1.0, "seed": 9, "ignore_eos": true, "max_tokens": 10}));
    let answer = server.post(CHAT, &body).await.json();
    let texts: Vec<&Value> =
        answer["choices"].as_array().expect("choices").iter().map(|c| &c["message"]["content"]).collect();
    assert_eq!(texts.len(), 4);
    assert!(texts.iter().any(|text| *text != texts[0]), "choices differ: {texts:?}");
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    let alone = server.post(CHAT, &ask(json!({}))).await.json();
    assert_eq!(answer["usage"]["prompt_tokens"], alone["usage"]["prompt_tokens"], "a prompt counts once");
    let again = server.post(CHAT, &body).await.json();
    assert_eq!(answer["choices"], again["choices"], "a seed reproduces every choice");
}

#[tokio::test]
async fn logprobs_have_tokens_and_bytes() {
    let server = server();
    let answer = server.post(CHAT, &ask(json!({"logprobs": true, "top_logprobs": 3}))).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("logprobs").clone();
    assert!(!content.is_empty());
    for entry in &content {
        assert!(entry["logprob"].as_f64().expect("a number") <= 0.0);
        assert!(entry["bytes"].is_array() && entry["token"].is_string());
        let top = entry["top_logprobs"].as_array().expect("top");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], entry["token"], "greedy takes the best");
    }
    let none = server.post(CHAT, &ask(json!({"logprobs": true}))).await.json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn token_ids_and_timings_come_on_request() {
    let server = server();
    let extra = json!({"return_token_ids": true, "timings": true});
    let response = server.post(CHAT, &ask(extra.clone())).await;
    assert!(response.headers["server-timing"].to_str().expect("text").contains("prefill;dur="));
    let body = response.json();
    let prompt_tokens = body["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert_eq!(body["prompt_token_ids"].as_array().map(|ids| ids.len() as u64), Some(prompt_tokens));
    assert_eq!(body["timings"]["predicted_n"], body["usage"]["completion_tokens"]);
    let events = server.post(CHAT, &with(ask(extra), json!({"stream": true}))).await.events();
    assert_eq!(events[0]["prompt_token_ids"], body["prompt_token_ids"]);
    assert!(events[1..].iter().all(|event| event.get("prompt_token_ids").is_none()));
    assert!(events.last().expect("events")["timings"]["predicted_ms"].is_f64());
}

#[tokio::test]
async fn prompts_are_rendered_by_the_template() {
    let server = server();
    let prompt = |extra: Value| {
        let body = ask(with(json!({"return_token_ids": true}), extra));
        let server = &server;
        async move {
            let ids = server.post(CHAT, &body).await.json()["prompt_token_ids"].clone();
            server.post("/detokenize", &json!({"tokens": ids})).await.json()["prompt"]
                .as_str()
                .expect("text")
                .to_owned()
        }
    };
    assert_eq!(prompt(json!({})).await, "<system>Be brief.\n<user>Where is Paris?\n<assistant>");
    let no_tools = json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"});
    assert!(prompt(no_tools).await.contains("tools:1"), "tools reach the template when none is to be called");
    assert!(!prompt(json!({"add_generation_prompt": false})).await.contains("<assistant>"));
    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]});
    assert_eq!(prompt(parts).await, "<user>ab\n<assistant>");
}

#[tokio::test]
async fn a_repeated_prompt_comes_from_the_cache() {
    let server = server();
    let long = "A long walk along the river. ".repeat(5);
    let body = ask(json!({"messages": [{"role": "user", "content": long}], "max_tokens": 4}));
    let cached = |answer: Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
    let cold = server.post(CHAT, &body).await.json();
    assert_eq!(cached(cold.clone()), 0);
    let warm = server.post(CHAT, &body).await.json();
    assert_eq!(cold["choices"], warm["choices"]);
    assert!(cached(warm) >= 64);
    let salted = with(body.clone(), json!({"cache_salt": "mine"}));
    assert_eq!(cached(server.post(CHAT, &salted).await.json()), 0, "another salt, another cache");
    assert!(cached(server.post(CHAT, &salted).await.json()) >= 64);
    let without = with(body.clone(), json!({"cache_prompt": false}));
    assert_eq!(cached(server.post(CHAT, &without).await.json()), 0);
    assert_eq!(server.post("/admin/reset_prefix_cache", &json!({})).await.status, 200);
    assert_eq!(cached(server.post(CHAT, &body).await.json()), 0);
}

#[tokio::test]
async fn a_model_without_a_template_says_what_to_do() {
    let server = Plan { template: false, ..Plan::default() }.start();
    let answer = server.post(CHAT, &ask(json!({}))).await;
    assert_eq!(answer.status, 400);
    assert!(answer.error()["message"].as_str().expect("text").contains("--chat-template"));
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).await.status, 200);
}
