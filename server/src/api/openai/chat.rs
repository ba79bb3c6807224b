//! `POST /v1/chat/completions`, streamed and not.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use cupola_engine::request::Request;
use http::{HeaderName, HeaderValue};
use serde::Serialize;
use serde_json::{Value, json};

use super::logprobs::ChatLogprobs;
use super::params::{Params, Route};
use super::prompt::{Chat, check_context};
use super::request::GenerationRequest;
use super::streamed::{self, Dialect, Piece};
use super::wire::{FINGERPRINT, TimingsBody, UsageBody, stop_reason};
use crate::app::AppState;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::generation::{Answer, Generation, Places, Setting};
use crate::json::JsonBody;
use crate::local::{LocalModel, unix_now};
use crate::observe::RequestRecord;
use crate::{request_id, sse};

/// The route.
pub(crate) async fn chat_completions(
    State(app): State<AppState>,
    Extension(caller): Extension<Caller>,
    Extension(record): Extension<Arc<RequestRecord>>,
    JsonBody(mut request): JsonBody<GenerationRequest>,
) -> Result<Response, ApiError> {
    const PARAM: &str = "messages";
    let model = &app.model;
    model.check_name(request.model.as_deref())?;
    let params = Params::of(&request, Route::Chat, &app.config, model)?;
    let chat = Chat::of(&mut request)?;
    let template =
        model.template.as_ref().ok_or_else(|| ApiError::NoChatTemplate { model: model.name().to_owned() })?;
    model.check_size(chat.bytes, params.stop.max_tokens.unwrap_or(1), PARAM)?;

    let places = Places::take(&model.engine, [chat.bytes], params.choices, PARAM)?;
    let prompt = chat.tokens(template, model).await?;
    check_context(prompt.len(), params.stop.max_tokens, model.engine.max_model_len(), PARAM)?;

    let prompt_ids = params.return_token_ids.then(|| prompt.clone());
    let engine_request = Request {
        prompt,
        sampling: params.sampling.clone(),
        stop: params.stop.clone(),
        logprobs: params.logprobs,
        prompt_logprobs: None,
        cache_salt: caller.cache_salt(request.cache_salt.as_deref()),
        use_prefix_cache: params.use_prefix_cache,
    };
    let prompt_tokens = engine_request.prompt.len();
    let setting = Setting { engine: &model.engine, lifecycle: &app.lifecycle, record: &record, param: PARAM };
    let generation = Generation::start(&setting, vec![engine_request], params.choices, places)?;
    let head = Head { id: request_id::fresh("chatcmpl"), created: unix_now(), model: Arc::clone(model) };
    if params.stream {
        let choices = params.choices;
        let chunks = ChatChunks { head, prompt_tokens, prompt_ids, sent: vec![None; choices], params };
        return Ok(streamed::response(chunks, generation, choices, app.config.sse_keep_alive));
    }
    let answers = generation.collect().await?;
    Ok(whole(&head, &params, prompt_ids, &answers))
}

/// What every chunk of an answer repeats.
struct Head {
    id: String,
    created: u64,
    model: Arc<LocalModel>,
}

fn whole(head: &Head, params: &Params, prompt_ids: Option<Vec<u32>>, answers: &[Answer]) -> Response {
    let tokenizer = &head.model.tokenizer;
    let choices: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(index, answer)| {
            let mut choice = json!({
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": null},
                "logprobs": params.logprobs.map(|_| ChatLogprobs::new(tokenizer, &answer.logprobs)),
                "finish_reason": answer.end.as_ref().map(|end| end.reason),
                "stop_reason": stop_reason(answer.end.as_ref().and_then(|end| end.stop.as_ref())),
            });
            if params.return_token_ids {
                choice["token_ids"] = json!(answer.tokens);
            }
            choice
        })
        .collect();
    let mut body = json!({
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model.name(),
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": UsageBody::of(answers, params.choices),
    });
    if let Some(ids) = prompt_ids {
        body["prompt_token_ids"] = json!(ids);
    }
    respond(body, params, answers)
}

/// A complete body with its timings, which describe the first choice.
pub(super) fn respond(mut body: Value, params: &Params, answers: &[Answer]) -> Response {
    let timings = answers.first().and_then(|answer| answer.end.as_ref()).map(TimingsBody::of);
    if params.timings {
        body["timings"] = json!(timings);
    }
    let mut response = axum::Json(body).into_response();
    if let Some(value) = timings.and_then(|timings| HeaderValue::from_str(&timings.header()).ok()) {
        response.headers_mut().insert(HeaderName::from_static("server-timing"), value);
    }
    response
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: &'a [ChunkChoice<'a>],
    /// Outer none: the client did not ask. Inner none: not on this chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<TimingsBody>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

/// Writes the chunks of a streamed answer.
struct ChatChunks {
    head: Head,
    params: Params,
    prompt_tokens: usize,
    /// Sent with the first chunk, then gone.
    prompt_ids: Option<Vec<u32>>,
    /// Tokens of each choice so far; none before its first chunk.
    sent: Vec<Option<usize>>,
}

impl Dialect for ChatChunks {
    fn piece(&mut self, out: &mut Vec<u8>, index: usize, piece: Piece) {
        let (end, going_on) = (piece.end.as_ref(), piece.end.is_none());
        let first = self.sent[index].is_none();
        let before = self.sent[index].unwrap_or(0);
        let so_far = end.map_or(before + piece.tokens.len(), |end| end.usage.completion_tokens);
        self.sent[index] = Some(so_far);
        let params = &self.params;
        let logprobs = params.logprobs.filter(|_| going_on);
        let choice = ChunkChoice {
            index,
            delta: Delta {
                // The role comes with the first token: whoever measures the time to the first chunk measures that.
                role: first.then_some("assistant"),
                content: (going_on || first || !piece.text.is_empty()).then_some(&piece.text),
            },
            logprobs: logprobs.map(|_| ChatLogprobs::new(&self.head.model.tokenizer, &piece.logprobs)),
            finish_reason: end.map(|end| end.reason),
            stop_reason: end.map(|end| stop_reason(end.stop.as_ref())),
            token_ids: (params.return_token_ids && going_on).then_some(piece.tokens),
        };
        let now = params.usage_everywhere.then(|| UsageBody::new(self.prompt_tokens, so_far, 0));
        let usage = (params.include_usage || params.usage_everywhere).then_some(now);
        let timings = end.filter(|_| params.timings).map(TimingsBody::of);
        let prompt_ids = self.prompt_ids.take();
        self.push(out, &[choice], usage, prompt_ids, timings);
    }

    fn close(&mut self, out: &mut Vec<u8>, usage: UsageBody) {
        if self.params.include_usage {
            self.push(out, &[], Some(Some(usage)), None, None);
        }
    }
}

impl ChatChunks {
    fn push(
        &self,
        out: &mut Vec<u8>,
        choices: &[ChunkChoice<'_>],
        usage: Option<Option<UsageBody>>,
        prompt_token_ids: Option<Vec<u32>>,
        timings: Option<TimingsBody>,
    ) {
        let Head { id, created, model } = &self.head;
        let chunk = Chunk {
            id,
            object: "chat.completion.chunk",
            created: *created,
            model: model.name(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
            prompt_token_ids,
            timings,
        };
        sse::push_json(out, &chunk);
    }
}
