//! `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::openai::prompt::Chat;
use super::openai::request::{GenerationRequest, Prompt};
use crate::app::AppState;
use crate::error::ApiError;
use crate::json::JsonBody;
use crate::local::LocalModel;

/// What `/tokenize` takes beside the fields of a chat or completion request.
#[derive(Debug, Deserialize)]
pub(crate) struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<super::openai::request::Message>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    return_token_strs: Option<bool>,
    tools: Option<Vec<Value>>,
    chat_template_kwargs: Option<serde_json::Map<String, Value>>,
}

/// Tokens of a text, or of a chat as its template renders it.
pub(crate) async fn tokenize(
    State(app): State<AppState>,
    JsonBody(request): JsonBody<TokenizeRequest>,
) -> Result<Json<Value>, ApiError> {
    let model = &app.model;
    model.check_name(request.model.as_deref())?;
    let wants_strings = request.return_token_strs.unwrap_or(false);
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => {
            model.check_size(text.len(), 0, "prompt")?;
            Prompt::Text(text).tokens(request.add_special_tokens.unwrap_or(true), model).await?
        }
        (None, Some(messages)) => {
            let mut fields = GenerationRequest {
                messages: Some(messages),
                add_special_tokens: request.add_special_tokens,
                add_generation_prompt: request.add_generation_prompt,
                tools: request.tools,
                chat_template_kwargs: request.chat_template_kwargs,
                ..GenerationRequest::default()
            };
            let chat = Chat::of(&mut fields)?;
            model.check_size(chat.bytes, 0, "messages")?;
            let template =
                model.template.as_ref().ok_or_else(|| ApiError::NoChatTemplate { model: model.name().to_owned() })?;
            chat.tokens(template, model).await?
        }
        _ => return Err(ApiError::field("prompt", "exactly one of `prompt` (a string) and `messages` must be sent")),
    };
    let strings = wants_strings.then(|| tokens.iter().map(|&token| text_of(model, token)).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": model.engine.max_model_len(),
        "tokens": tokens,
        "token_strs": strings,
    })))
}

fn text_of(model: &LocalModel, token: u32) -> String {
    String::from_utf8_lossy(model.tokenizer.token_bytes(token)).into_owned()
}

/// What `/detokenize` takes.
#[derive(Debug, Deserialize)]
pub(crate) struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// The text of tokens, special ones included.
pub(crate) async fn detokenize(
    State(app): State<AppState>,
    JsonBody(request): JsonBody<DetokenizeRequest>,
) -> Result<Json<Value>, ApiError> {
    let model = Arc::clone(&app.model);
    model.check_name(request.model.as_deref())?;
    let vocab = model.tokenizer.vocab_size();
    if let Some((index, token)) = request.tokens.iter().enumerate().find(|(_, token)| **token as usize >= vocab) {
        let param = format!("tokens[{index}]");
        let message = format!("`{param}` must be below the vocabulary's {vocab} tokens, got {token}");
        return Err(ApiError::field(param, message));
    }
    let (tokenizer, tokens) = (model.tokenizer.clone(), request.tokens);
    let text = model.work(tokens.len(), move || Ok(tokenizer.decode(&tokens, false))).await?;
    Ok(Json(json!({ "prompt": text })))
}

/// What evaluation suites need to cut texts themselves.
pub(crate) async fn info(State(app): State<AppState>) -> Json<Value> {
    let model = &app.model;
    let text = |token: Option<u32>| token.map(|token| text_of(model, token));
    let eos = text(model.tokenizer.eos().first().copied());
    Json(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": text(model.tokenizer.bos()),
        "eos_token": eos,
        "pad_token": eos,
        "vocab_size": model.tokenizer.vocab_size(),
        "model_max_length": model.engine.max_model_len(),
        "chat_template": model.template.as_ref().map(|template| template.source()),
    }))
}
