//! `POST /v1/chat/completions`, streamed and not.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cupola_engine::request::{Event, Request};
use futures_util::stream;
use http::{HeaderName, HeaderValue};
use serde::Serialize;
use serde_json::{Value, json};

use super::logprobs::ChatLogprobs;
use super::params::{Params, Route};
use super::prompt::{Chat, check_context};
use super::request::GenerationRequest;
use super::wire::{FINGERPRINT, TimingsBody, UsageBody, stop_reason};
use crate::app::AppState;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::generation::{Answer, End, Generation, Places, Setting};
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
        let quiet = app.config.sse_keep_alive;
        let chat = ChatStream::new(head, generation, params, prompt_tokens, prompt_ids);
        return Ok(sse::response(stream::unfold(chat, ChatStream::step), quiet));
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

/// A streamed answer on its way out.
struct ChatStream {
    head: Head,
    generation: Generation,
    params: Params,
    prompt_tokens: usize,
    /// Sent with the first chunk, then gone.
    prompt_ids: Option<Vec<u32>>,
    /// Tokens of each choice so far; none before its first chunk.
    sent: Vec<Option<usize>>,
    usage: UsageBody,
    over: bool,
}

impl ChatStream {
    fn new(
        head: Head,
        generation: Generation,
        params: Params,
        prompt_tokens: usize,
        prompt_ids: Option<Vec<u32>>,
    ) -> Self {
        let sent = vec![None; params.choices];
        Self { head, generation, params, prompt_tokens, prompt_ids, sent, usage: UsageBody::default(), over: false }
    }

    /// The bytes for the next event, and itself to go on with.
    async fn step(mut self) -> Option<(Bytes, Self)> {
        if self.over {
            return None;
        }
        let mut out = Vec::with_capacity(512);
        match self.generation.next().await {
            Some(Ok((choice, event))) => self.write(&mut out, choice, event),
            Some(Err(error)) => self.end(&mut out, Some(&error)),
            None => self.end(&mut out, None),
        }
        Some((out.into(), self))
    }

    fn write(&mut self, out: &mut Vec<u8>, index: usize, event: Event) {
        match event {
            Event::Tokens { tokens, text, logprobs } => {
                let first = self.sent[index].is_none();
                *self.sent[index].get_or_insert(0) += tokens.len();
                let logprobs = self.params.logprobs.map(|_| ChatLogprobs::new(&self.head.model.tokenizer, &logprobs));
                let choice = ChunkChoice {
                    index,
                    // The role comes with the first token: whoever measures the time to the first chunk measures that.
                    delta: Delta { role: first.then_some("assistant"), content: Some(&text) },
                    logprobs,
                    finish_reason: None,
                    stop_reason: None,
                    token_ids: self.params.return_token_ids.then_some(tokens),
                };
                self.chunk(out, choice, None);
            }
            Event::Finished { text, reason, stop, usage, timing } => {
                let first = self.sent[index].is_none();
                *self.sent[index].get_or_insert(0) = usage.completion_tokens;
                self.usage.add(index, self.params.choices, &usage);
                let end = match End::new(reason, stop, usage, timing) {
                    Ok(end) => end,
                    Err(error) => return self.end(out, Some(&error)),
                };
                let choice = ChunkChoice {
                    index,
                    delta: Delta {
                        role: first.then_some("assistant"),
                        content: (first || !text.is_empty()).then_some(text.as_str()),
                    },
                    logprobs: None,
                    finish_reason: Some(end.reason),
                    stop_reason: Some(stop_reason(end.stop.as_ref())),
                    token_ids: None,
                };
                let timings = self.params.timings.then(|| TimingsBody::of(&end));
                self.chunk(out, choice, timings);
            }
            // Asked for by no chat request.
            Event::Prompt { .. } => {}
            Event::Failed { message } => self.end(out, Some(&ApiError::Generation { message })),
        }
    }

    fn chunk(&mut self, out: &mut Vec<u8>, choice: ChunkChoice<'_>, timings: Option<TimingsBody>) {
        let so_far = self.sent[choice.index].unwrap_or(0);
        let now = self.params.usage_everywhere.then(|| UsageBody::new(self.prompt_tokens, so_far, 0));
        let wanted = self.params.include_usage || self.params.usage_everywhere;
        let prompt_ids = self.prompt_ids.take();
        self.push(out, &[choice], wanted.then_some(now), prompt_ids, timings);
    }

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

    fn end(&mut self, out: &mut Vec<u8>, error: Option<&ApiError>) {
        self.over = true;
        if let Some(error) = error {
            return sse::push_error(out, error);
        }
        if self.params.include_usage {
            self.push(out, &[], Some(Some(self.usage)), None, None);
        }
        sse::push_done(out);
    }
}
