//! Everything a client can get wrong is answered with OpenAI's error shape, a status and the field at fault.

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{Request, StatusCode, header};
use serde_json::{Value, json};

use super::support::{CHAT, COMPLETIONS, CONTEXT, MODEL, Plan, json_request, server, with};
use crate::config::ServerConfig;

fn chat(extra: Value) -> Value {
    with(json!({"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}), extra)
}

fn completion(extra: Value) -> Value {
    with(json!({"model": MODEL, "max_tokens": 4, "prompt": "Hi"}), extra)
}

#[tokio::test]
async fn wrong_values_name_their_field() {
    let server = server();
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let many_biases: Value = (0..5000).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
    let cases: Vec<(&str, Value, &str)> = vec![
        (CHAT, chat(json!({"messages": []})), "messages"),
        (CHAT, chat(json!({"messages": null})), "messages"),
        (CHAT, chat(json!({"messages": "Hi"})), "messages"),
        (CHAT, chat(json!({"messages": [{"role": "robot", "content": "x"}]})), "messages[0].role"),
        (CHAT, chat(json!({"messages": [{"role": "user", "content": 5}]})), "messages[0].content"),
        (CHAT, chat(json!({"messages": [{"role": "user"}]})), "messages[0].content"),
        (CHAT, chat(json!({"messages": image})), "messages[0].content[0]"),
        (CHAT, chat(json!({"temperature": -0.1})), "temperature"),
        (CHAT, chat(json!({"temperature": "hot"})), "temperature"),
        (CHAT, chat(json!({"temperature": 1e9})), "temperature"),
        (CHAT, chat(json!({"top_p": 1.1})), "top_p"),
        (CHAT, chat(json!({"top_p": -1})), "top_p"),
        (CHAT, chat(json!({"top_k": -2})), "top_k"),
        (CHAT, chat(json!({"top_k": 1u64 << 40})), "top_k"),
        (CHAT, chat(json!({"min_p": 2})), "min_p"),
        (CHAT, chat(json!({"repetition_penalty": 0})), "repetition_penalty"),
        (CHAT, chat(json!({"repeat_penalty": -1})), "repeat_penalty"),
        (CHAT, chat(json!({"presence_penalty": 3})), "presence_penalty"),
        (CHAT, chat(json!({"frequency_penalty": -3})), "frequency_penalty"),
        (CHAT, chat(json!({"n": 0})), "n"),
        (CHAT, chat(json!({"n": 17})), "n"),
        (CHAT, chat(json!({"n": 1u64 << 60})), "n"),
        (CHAT, chat(json!({"n": -1})), "n"),
        (CHAT, chat(json!({"max_tokens": 0})), "max_tokens"),
        (CHAT, chat(json!({"max_tokens": -5})), "max_tokens"),
        (CHAT, chat(json!({"max_completion_tokens": 0})), "max_completion_tokens"),
        (CHAT, chat(json!({"max_tokens": u64::MAX})), "max_tokens"),
        (CHAT, chat(json!({"min_tokens": 5})), "min_tokens"),
        (CHAT, chat(json!({"stop": vec!["x"; 17]})), "stop"),
        (CHAT, chat(json!({"stop": ""})), "stop[0]"),
        (CHAT, chat(json!({"stop": ["a", "b".repeat(2000)]})), "stop[1]"),
        (CHAT, chat(json!({"stop": [1]})), "stop[0]"),
        (CHAT, chat(json!({"stop_token_ids": [99_999_999]})), "stop_token_ids[0]"),
        (CHAT, chat(json!({"logit_bias": {"99999999": 1}})), "logit_bias.99999999"),
        (CHAT, chat(json!({"logit_bias": {"5": 101}})), "logit_bias.5"),
        (CHAT, chat(json!({"logit_bias": {"five": 1}})), "logit_bias.five"),
        (CHAT, chat(json!({"logit_bias": many_biases})), "logit_bias"),
        (CHAT, chat(json!({"logprobs": 3})), "logprobs"),
        (CHAT, chat(json!({"top_logprobs": 3})), "top_logprobs"),
        (CHAT, chat(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs"),
        (CHAT, chat(json!({"cache_salt": ""})), "cache_salt"),
        (CHAT, chat(json!({"stream_options": true})), "stream_options"),
        (CHAT, chat(json!({"tools": tool})), "tools"),
        (CHAT, chat(json!({"tools": tool, "tool_choice": "required"})), "tools"),
        (CHAT, chat(json!({"tool_choice": "perhaps"})), "tool_choice"),
        (CHAT, chat(json!({"response_format": {"type": "json_object"}})), "response_format"),
        (CHAT, chat(json!({"response_format": {"type": "poem"}})), "response_format.type"),
        (CHAT, chat(json!({"structured_outputs": {"choice": ["a"]}})), "structured_outputs"),
        (CHAT, chat(json!({"modalities": ["text", "audio"]})), "modalities"),
        (CHAT, chat(json!({"chat_template": "{{ messages }}"})), "chat_template"),
        (CHAT, chat(json!({"chat_template_kwargs": {"messages": 1}})), "chat_template_kwargs.messages"),
        (COMPLETIONS, completion(json!({"prompt": null})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": ""})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": []})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": [[]]})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": ["a", ""]})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": [1, "a"]})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": [-1]})), "prompt[0]"),
        (COMPLETIONS, completion(json!({"prompt": [4_000_000]})), "prompt"),
        (COMPLETIONS, completion(json!({"prompt": vec!["x"; 65]})), "prompt"),
        (COMPLETIONS, completion(json!({"suffix": "end"})), "suffix"),
        (COMPLETIONS, completion(json!({"best_of": 3})), "best_of"),
        (COMPLETIONS, completion(json!({"logprobs": true})), "logprobs"),
        (COMPLETIONS, completion(json!({"logprobs": 21})), "logprobs"),
        (COMPLETIONS, completion(json!({"max_tokens": 0})), "max_tokens"),
        (COMPLETIONS, completion(json!({"use_beam_search": true})), "use_beam_search"),
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "prompt"),
        ("/tokenize", json!({"prompt": 5}), "prompt"),
        ("/detokenize", json!({"tokens": [0, 99_999_999]}), "tokens[1]"),
        ("/detokenize", json!({"tokens": "x"}), "tokens"),
    ];
    for (path, body, param) in cases {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path} {param}: {}", answer.text());
        let error = answer.error();
        assert_eq!(error["param"], param, "{error}");
        assert_eq!(error["type"], "invalid_request_error");
        let field = param.split(['[', '.']).next().expect("a name");
        assert!(error["message"].as_str().expect("text").contains(field), "{param}: {error}");
    }
    server.settles().await;
}

#[tokio::test]
async fn null_is_absent_and_unknown_fields_are_ignored() {
    let nulls = [
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "seed",
        "logit_bias",
        "tools",
        "tool_choice",
        "response_format",
        "max_completion_tokens",
        "user",
        "presence_penalty",
        "modalities",
    ];
    let fields: serde_json::Map<String, Value> = nulls.iter().map(|name| ((*name).to_owned(), Value::Null)).collect();
    let ignored = json!({
        "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "verbosity": "low", "whatever": [1],
        "parallel_tool_calls": true, "prompt_cache_key": "k", "safety_identifier": "s", "prediction": {}, "tools": [],
        "tool_choice": "auto", "response_format": {"type": "text"}, "functions": [], "reasoning_effort": "low",
    });
    let server = server();
    for extra in [fields.into(), ignored] {
        let answer = server.post(CHAT, &chat(extra)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
}

#[tokio::test]
async fn what_is_no_json_is_refused() {
    let server = server();
    let deep = format!("{{\"x\": {}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let surrogate = r#"{"messages": [{"role": "user", "content": "\ud800"}]}"#.to_owned();
    let twice = r#"{"n": 1, "n": 2, "messages": [{"role": "user", "content": "x"}]}"#.to_owned();
    for body in ["", "{", "nonsense", "[]", "{} {}", &deep, &surrogate, &twice] {
        let answer = server.post_raw(CHAT, body.to_owned()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
        answer.error();
    }
    for body in [&b"\xff\xfe{}"[..], b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xc3\x28\"}]}"] {
        let answer = server.post_raw(CHAT, Bytes::from_static(body)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
        answer.error();
    }
    let nan = server.post_raw(CHAT, r#"{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}"#).await;
    assert_eq!((nan.status, nan.error()["param"].clone()), (StatusCode::BAD_REQUEST, json!("temperature")));
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let server = server();
    for (path, body) in
        [(CHAT, chat(json!({"model": "nobody/here"}))), (COMPLETIONS, completion(json!({"model": "nobody/here"})))]
    {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        let error = answer.error();
        assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
        assert!(error["message"].as_str().expect("text").contains(MODEL), "it says which there are: {error}");
    }
    for named in [json!({"model": "alias"}), json!({"model": ""}), json!({"model": null})] {
        assert_eq!(server.post(CHAT, &chat(named)).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_told_with_both_numbers() {
    let server = server();
    let steps = server.model().engine.metrics().steps.get();
    let tokens: Vec<u32> = vec![5; 300];
    let long = "word ".repeat(300);
    for (path, body) in [
        (COMPLETIONS, completion(json!({"prompt": tokens}))),
        (COMPLETIONS, completion(json!({"prompt": ["fine", long]}))),
        (COMPLETIONS, completion(json!({"max_tokens": CONTEXT}))),
        (CHAT, chat(json!({"messages": [{"role": "user", "content": long}]}))),
        (CHAT, chat(json!({"max_tokens": CONTEXT, "stream": true}))),
        (COMPLETIONS, completion(json!({"prompt": "word ".repeat(3_000_000)}))),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
        let error = answer.error();
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!(error["n_ctx"], CONTEXT);
        assert!(error["n_prompt_tokens"].as_u64() > Some(0));
        let message = error["message"].as_str().expect("text");
        let wanted = format!("This model's maximum context length is {CONTEXT} tokens. However, you requested");
        assert!(message.contains(&wanted), "{message}");
    }
    let answer = server.post(COMPLETIONS, &completion(json!({"prompt": tokens}))).await;
    assert_eq!(answer.error()["n_prompt_tokens"], 300);
    assert_eq!(server.model().engine.metrics().steps.get(), steps, "nothing was computed");
    server.settles().await;
}

#[tokio::test]
async fn bodies_have_a_largest_size() {
    let server = server();
    let limit = ServerConfig::default().max_body_bytes;
    let answer = server.post_raw(CHAT, vec![b' '; limit + 1]).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(answer.error()["code"], "body_too_large");
    assert_eq!(answer.headers[header::CONNECTION], "close");

    // Sixteen megabytes are read, and refused for what they say.
    let wrapper = completion(json!({"prompt": ""})).to_string().len();
    let body = completion(json!({"prompt": "x".repeat(limit - wrapper)}));
    assert_eq!(body.to_string().len(), limit);
    let answer = server.post(COMPLETIONS, &body).await;
    assert_eq!(answer.error()["code"], "context_length_exceeded");

    // Without a length announced, the limit counts what arrives.
    let chunks = stream::iter((0..17).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 1 << 20]))));
    let answer = server.post_raw(CHAT, Body::from_stream(chunks)).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_comes_is_not_waited_for() {
    let server = server();
    let endless = stream::pending::<Result<Bytes, std::io::Error>>();
    let answer = server.post_raw(CHAT, Body::from_stream(endless)).await;
    assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(answer.error()["code"], "body_timeout");
}

#[tokio::test]
async fn bodies_must_say_that_they_are_json() {
    let server = server();
    for kind in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
        let mut request = json_request(CHAT, chat(json!({})).to_string());
        request.headers_mut().remove(header::CONTENT_TYPE);
        if let Some(kind) = kind {
            request.headers_mut().insert(header::CONTENT_TYPE, kind.parse().expect("a value"));
        }
        let answer = server.send(request).await;
        assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
        answer.error();
    }
}

#[tokio::test]
async fn wrong_routes_and_methods_have_the_same_shape() {
    let server = server();
    for path in ["/v1/nothing", "/nothing", "/v1", "/v1/models/", "/../etc/passwd", "/%ff"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}: {}", answer.text());
        answer.error();
    }
    for (method, path) in
        [("GET", CHAT), ("DELETE", COMPLETIONS), ("POST", "/v1/models"), ("POST", "/"), ("OPTIONS", CHAT)]
    {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a request");
        let answer = server.send(request).await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
        answer.error();
        assert!(answer.headers.contains_key(header::ALLOW), "{method} {path}");
        assert!(!answer.headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN), "other origins are not let in");
    }
}

#[tokio::test]
async fn limits_can_be_set() {
    let config = ServerConfig { max_choices: 2, max_prompts: 1, max_body_bytes: 2048, ..ServerConfig::default() };
    let server = Plan { config, ..Plan::default() }.start();
    assert_eq!(server.post(CHAT, &chat(json!({"n": 3}))).await.error()["param"], "n");
    assert_eq!(server.post(COMPLETIONS, &completion(json!({"prompt": ["a", "b"]}))).await.error()["param"], "prompt");
    assert_eq!(server.post_raw(CHAT, " ".repeat(2049)).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}
