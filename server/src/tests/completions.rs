//! `/v1/completions`: four kinds of prompt, echo, the legacy logprobs, streams that agree with bodies.

use serde_json::{Value, json};

use super::support::{COMPLETIONS, MODEL, TestServer, server, with};

fn ask(extra: Value) -> Value {
    with(json!({"model": MODEL, "temperature": 0, "max_tokens": 20, "prompt": "Once upon a time"}), extra)
}

async fn text(server: &TestServer, extra: Value) -> String {
    let answer = server.post(COMPLETIONS, &ask(extra)).await.json();
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

async fn streamed_equals_whole(server: &TestServer, extra: Value) {
    let whole = server.post(COMPLETIONS, &ask(extra.clone())).await.json();
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = server.post(COMPLETIONS, &with(ask(extra.clone()), options)).await.events();
    let (last, chunks) = events.split_last().expect("events");
    for choice in whole["choices"].as_array().unwrap_or_else(|| panic!("{whole}")) {
        let pieces = || chunks.iter().flat_map(|c| c["choices"].as_array().expect("choices"));
        let mine: Vec<&Value> = pieces().filter(|piece| piece["index"] == choice["index"]).collect();
        let text: String = mine.iter().map(|piece| piece["text"].as_str().expect("text")).collect();
        assert_eq!(choice["text"], text, "{extra}");
        assert_eq!(mine.last().expect("an end")["finish_reason"], choice["finish_reason"], "{extra}");
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let joined: Vec<&Value> =
                mine.iter().filter_map(|piece| piece["logprobs"][list].as_array()).flatten().collect();
            let expected: Vec<&Value> = choice["logprobs"][list].as_array().into_iter().flatten().collect();
            assert_eq!(joined, expected, "{list} {extra}");
        }
    }
    assert_eq!(last["usage"]["total_tokens"], whole["usage"]["total_tokens"], "{extra}");
}

#[tokio::test]
async fn streamed_and_whole_answers_agree() {
    let server = server();
    for extra in [
        json!({}),
        json!({"temperature": 0.8, "top_p": 0.9, "seed": 7}),
        json!({"stop": [" ", "q"]}),
        json!({"echo": true}),
        json!({"echo": true, "logprobs": 2}),
        json!({"echo": true, "logprobs": 1, "max_tokens": 0}),
        json!({"echo": true, "max_tokens": 0}),
        json!({"logprobs": 0, "max_tokens": 60, "ignore_eos": true}),
        json!({"prompt": ["one", "two"], "n": 2, "temperature": 1.0, "seed": 4, "logprobs": 3}),
        json!({"prompt": [[5, 6, 7], [8, 9]], "echo": true, "logprobs": 1}),
    ] {
        streamed_equals_whole(&server, extra).await;
    }
    server.settles().await;
}

#[tokio::test]
async fn prompts_come_as_texts_and_as_tokens() {
    let server = server();
    let one = text(&server, json!({})).await;
    assert_eq!(text(&server, json!({"prompt": ["Once upon a time"]})).await, one);
    let tokens = server.post("/tokenize", &json!({"prompt": "Once upon a time"})).await.json()["tokens"].clone();
    assert_eq!(text(&server, json!({"prompt": tokens})).await, one);
    assert_eq!(text(&server, json!({"prompt": [tokens]})).await, one);

    let many = server.post(COMPLETIONS, &ask(json!({"prompt": ["a", "b", "c"], "n": 2}))).await.json();
    let indices: Vec<u64> =
        many["choices"].as_array().expect("choices").iter().map(|c| c["index"].as_u64().expect("an index")).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
    let texts: Vec<String> =
        many["choices"].as_array().expect("choices").iter().map(|c| c["text"].to_string()).collect();
    assert_eq!((&texts[0], &texts[2]), (&texts[1], &texts[3]), "greedy choices of a prompt are the same");
}

#[tokio::test]
async fn an_answer_has_sixteen_tokens_by_default() {
    let body = json!({"model": MODEL, "prompt": "Once", "ignore_eos": true, "temperature": 0});
    let answer = server().post(COMPLETIONS, &body).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["object"], "text_completion");
}

#[tokio::test]
async fn min_and_max_tokens_hold() {
    let server = server();
    let answer = server.post(COMPLETIONS, &ask(json!({"min_tokens": 30, "max_tokens": 30}))).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 30);
}

#[tokio::test]
async fn a_stop_text_ends_the_answer() {
    let server = server();
    let whole = text(&server, json!({"ignore_eos": true, "max_tokens": 40})).await;
    let stop: String = whole.chars().skip(5).take(2).collect();
    let answer =
        server.post(COMPLETIONS, &ask(json!({"ignore_eos": true, "max_tokens": 40, "stop": [stop]}))).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"].as_str(), whole.split(&stop).next());
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
    let kept = json!({"ignore_eos": true, "max_tokens": 40, "stop": [stop], "include_stop_str_in_output": true});
    let kept = text(&server, kept).await;
    assert!(kept.ends_with(&stop) && whole.starts_with(&kept), "{kept:?} of {whole:?}");
}

/// What evaluation suites send to score a text, and what they read.
#[tokio::test]
async fn a_text_can_be_scored() {
    let server = server();
    let prompt = json!([[10, 20, 30, 40, 50]]);
    let body = json!({
        "model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true,
    });
    let answer = server.post(COMPLETIONS, &body).await.json();
    let lists = &answer["choices"][0]["logprobs"];
    let list = |name: &str| lists[name].as_array().unwrap_or_else(|| panic!("{name} in {answer}")).clone();
    assert_eq!(list("tokens").len(), 6, "five of the prompt, one of the answer");
    assert_eq!(list("token_logprobs").len(), 6);
    assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
    for position in 1..6 {
        let token = list("tokens")[position].as_str().expect("text").to_owned();
        let top = list("top_logprobs")[position].clone();
        assert_eq!(top[&token], list("token_logprobs")[position], "a token is among its own top: {top}");
    }
    let text = answer["choices"][0]["text"].as_str().expect("text");
    let offsets: Vec<u64> = list("text_offset").iter().map(|o| o.as_u64().expect("an offset")).collect();
    assert!(offsets.is_sorted() && offsets[5] <= text.chars().count() as u64, "{offsets:?} in {text:?}");

    let nothing_new = with(body, json!({"max_tokens": 0}));
    let scored = server.post(COMPLETIONS, &nothing_new).await.json();
    let scored_lists = &scored["choices"][0]["logprobs"];
    assert_eq!(scored_lists["token_logprobs"].as_array().map(Vec::len), Some(5), "{scored}");
    assert_eq!(scored["usage"]["completion_tokens"], 0);
}
