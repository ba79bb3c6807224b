//! Gemma 3 from its file to its answers: the second family, its vocabulary of 262,144 pieces, and its window.

use serde_json::{Value, json};

use crate::support::gemma_model;
use crate::support::server::Server;

fn complete(server: &Server, extra: Value) -> Value {
    let mut body = json!({"model": "test-model", "temperature": 0, "max_tokens": 16});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    let (status, answer) = server.post("/v1/completions", &body);
    assert_eq!(status, 200, "{answer}");
    answer
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().expect("text")
}

#[test]
fn the_real_file_is_served() {
    let Some(model) = gemma_model() else { return };
    let server = Server::start(&model, &["--max-model-len", "1024", "--max-num-seqs", "4"]);
    // What llama.cpp answers for the same file, as far as no two words are nearly as likely.
    let water = complete(&server, json!({"prompt": "Water boils at"}));
    assert!(text(&water).starts_with(" 100 degrees Celsius."), "{water}");
    let count = complete(&server, json!({"prompt": "1, 2, 3, 4,", "max_tokens": 12}));
    assert!(text(&count).starts_with(" 5, 6, 7, 8,"), "{count}");
    let (_, tokens) = server.post("/tokenize", &json!({"model": "test-model", "prompt": "The capital of France is"}));
    assert_eq!(tokens["tokens"], json!([2, 818, 5279, 529, 7001, 563]));

    // Longer than the window: whole, in pieces, from the cache and streamed it goes on with the same words.
    let long = "The keeper climbed the ninety-two steps and lit the lamp, as he did every evening. ".repeat(36);
    let ask = |extra: Value| {
        let mut body = json!({"prompt": long, "max_tokens": 24});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        complete(&server, body)
    };
    let (cold, warm) = (ask(json!({})), ask(json!({})));
    let prompt_tokens = cold["usage"]["prompt_tokens"].as_u64();
    assert!(prompt_tokens > Some(600), "the prompt outgrows the window of 512: {}", cold["usage"]);
    assert!(warm["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(512), "{}", warm["usage"]);
    assert_eq!(text(&cold), text(&warm));
    let body = json!({"model": "test-model", "prompt": long, "temperature": 0, "max_tokens": 24, "stream": true});
    let events = server.stream("/v1/completions", &body);
    assert_eq!(events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect::<String>(), text(&cold));
    drop(server);
    let pieces = Server::start(&model, &["--max-model-len", "1024", "--max-num-batched-tokens", "96"]);
    assert_eq!(text(&complete(&pieces, json!({"prompt": long, "max_tokens": 24}))), text(&cold));

    // A base model: it has no way to write a conversation, and says what to do.
    let chat = json!({"model": "test-model", "messages": [{"role": "user", "content": "Hello"}]});
    let (status, refused) = pieces.post("/v1/chat/completions", &chat);
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("no_chat_template")));
    assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("--chat-template")), "{refused}");
}
