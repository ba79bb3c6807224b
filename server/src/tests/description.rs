//! `/openapi.json` says what the server does, no more and no less.

use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::{Map, Value, json};

use super::support::{CHAT, COMPLETIONS, MODEL, TestServer, server, with};

async fn document(server: &TestServer) -> Value {
    server.get("/openapi.json").await.json()
}

fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap_or_else(|| panic!("an object, not {value}"))
}

/// Calls `see` with every `$ref` within `value`.
fn references(value: &Value, see: &mut impl FnMut(&str)) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, field)| match field.as_str() {
            Some(target) if name == "$ref" => see(target),
            _ => references(field, see),
        }),
        Value::Array(items) => items.iter().for_each(|item| references(item, see)),
        _ => {}
    }
}

#[tokio::test]
async fn the_document_is_whole() {
    let document = document(&server()).await;
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    references(&document, &mut |target| {
        let pointer = target.strip_prefix('#').expect("a reference within the document");
        assert!(document.pointer(pointer).is_some(), "{target} leads nowhere");
    });
}

#[tokio::test]
async fn every_route_described_exists() {
    let server = server();
    for (path, methods) in object(&document(&server).await["paths"]) {
        for method in ["get", "post", "put", "delete"] {
            let described = methods.get(method).is_some();
            let uri = path.replace("{id}", MODEL);
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(&uri).body(Body::empty());
            let answer = server.send(request.expect("a request")).await;
            let missing = answer.status == StatusCode::METHOD_NOT_ALLOWED || answer.status == StatusCode::NOT_FOUND;
            assert_eq!(described, !missing, "{method} {path}: {}", answer.status);
        }
    }
}

#[tokio::test]
async fn every_field_described_is_read() {
    let server = server();
    let document = document(&server).await;
    let schemas = &document["components"]["schemas"];
    let chat = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]});
    let completion = json!({"max_tokens": 1, "prompt": "Hi"});
    for (path, schema, base) in [(CHAT, "ChatRequest", chat), (COMPLETIONS, "CompletionRequest", completion)] {
        for name in object(&schemas[schema]["properties"]).keys() {
            // A type that fits no field shows that the field is read; an ignored one would pass.
            let mut body = base.clone();
            body[name] = json!({"no": {"field": "takes this"}});
            let answer = server.post(path, &body).await;
            let free_form = ["chat_template_kwargs", "stream_options"].contains(&name.as_str());
            assert_eq!(answer.status.is_client_error(), !free_form, "{path} {name}: {}", answer.text());
        }
        let nulls: Map<String, Value> = object(&schemas[schema]["properties"])
            .keys()
            .filter(|name| base.get(name.as_str()).is_none())
            .map(|name| (name.clone(), Value::Null))
            .collect();
        let answer = server.post(path, &with(base, nulls.into())).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
}

#[tokio::test]
async fn answers_have_the_fields_described() {
    let server = server();
    let document = document(&server).await;
    let required = |schema: &str, value: &Value| {
        for name in document["components"]["schemas"][schema]["required"].as_array().expect("a list") {
            assert!(value.get(name.as_str().expect("a name")).is_some(), "{schema} needs {name}: {value}");
        }
    };
    let chat = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]});
    required("ChatCompletion", &server.post(CHAT, &chat).await.json());
    required("Completion", &server.post(COMPLETIONS, &json!({"max_tokens": 1, "prompt": "Hi"})).await.json());
    required("ModelList", &server.get("/v1/models").await.json());
    required("Model", &server.get("/v1/models").await.json()["data"][0]);
    required("Tokens", &server.post("/tokenize", &json!({"prompt": "Hi"})).await.json());
    required("Text", &server.post("/detokenize", &json!({"tokens": [5]})).await.json());
    required("Status", &server.get("/live").await.json());
    required("Error", &server.get("/nothing").await.json());
}
