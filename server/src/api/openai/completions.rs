//! `POST /v1/completions`, streamed and not: texts or token ids in, their continuation out.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::Response;
use cupola_engine::request::{Request, TokenLogprobs};
use serde::Serialize;
use serde_json::{Value, json};

use super::chat::respond;
use super::logprobs::{CompletionLogprobs, OffsetCounter};
use super::params::{Params, Route};
use super::prompt::check_context;
use super::request::{GenerationRequest, Prompt};
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

/// Answer length when the request names none, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

const PARAM: &str = "prompt";

/// The route.
pub(crate) async fn completions(
    State(app): State<AppState>,
    Extension(caller): Extension<Caller>,
    Extension(record): Extension<Arc<RequestRecord>>,
    JsonBody(mut request): JsonBody<GenerationRequest>,
) -> Result<Response, ApiError> {
    let model = &app.model;
    model.check_name(request.model.as_deref())?;
    let mut params = Params::of(&request, Route::Completions, &app.config, model)?;
    let echo = request.echo.unwrap_or(false);
    let prompts = checked_prompts(&mut request, app.config.max_prompts)?;
    for prompt in &prompts {
        model.check_size(prompt.bytes(), params.stop.max_tokens.unwrap_or(1), PARAM)?;
    }

    let places = Places::take(&model.engine, prompts.iter().map(Prompt::bytes), params.choices, PARAM)?;
    let max_model_len = model.engine.max_model_len();
    let special = request.add_special_tokens.unwrap_or(true);
    let mut tokens = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let ids = prompt.tokens(special, model).await?;
        check_context(ids.len(), params.stop.max_tokens, max_model_len, PARAM)?;
        tokens.push(ids);
    }

    if params.stop.max_tokens.is_none() {
        params.stop.max_tokens = Some(DEFAULT_MAX_TOKENS.max(params.stop.min_tokens));
    }
    let requests = tokens.iter().map(|prompt| Request {
        prompt: prompt.clone(),
        sampling: params.sampling.clone(),
        stop: params.stop.clone(),
        logprobs: params.logprobs,
        prompt_logprobs: params.logprobs.filter(|_| echo),
        cache_salt: caller.cache_salt(request.cache_salt.as_deref()),
        use_prefix_cache: params.use_prefix_cache,
    });
    let setting = Setting { engine: &model.engine, lifecycle: &app.lifecycle, record: &record, param: PARAM };
    let generation = Generation::start(&setting, requests.collect(), params.choices, places)?;
    let prompts = prompts.into_iter().zip(tokens).map(|(prompt, tokens)| {
        let echo = echo.then(|| match prompt {
            Prompt::Text(text) => text,
            Prompt::Tokens(ids) => model.tokenizer.decode(&ids, false),
        });
        PromptParts { tokens, echo }
    });
    let answering = Answering {
        id: request_id::fresh("cmpl"),
        created: unix_now(),
        model: Arc::clone(model),
        params,
        prompts: prompts.collect(),
    };
    if answering.params.stream {
        let choices = answering.params.choices;
        let progress = std::iter::repeat_with(Progress::default).take(answering.prompts.len() * choices).collect();
        let chunks = CompletionChunks { answering, progress };
        return Ok(streamed::response(chunks, generation, choices, app.config.sse_keep_alive));
    }
    let answers = generation.collect().await?;
    Ok(answering.whole(&answers))
}

fn checked_prompts(request: &mut GenerationRequest, most: usize) -> Result<Vec<Prompt>, ApiError> {
    let prompts = request.prompt.take().ok_or_else(|| ApiError::field(PARAM, "`prompt` is missing"))?.0;
    if prompts.is_empty() || prompts.iter().any(|prompt| prompt.bytes() == 0) {
        return Err(ApiError::field(PARAM, "`prompt` must not be empty"));
    }
    if prompts.len() > most {
        let message = format!("`prompt` must be at most {most} prompts, got {}", prompts.len());
        return Err(ApiError::field(PARAM, message));
    }
    Ok(prompts)
}

/// One prompt of the request.
struct PromptParts {
    tokens: Vec<u32>,
    /// Its text, when the answer begins with it.
    echo: Option<String>,
}

/// What every part of the answer draws on.
struct Answering {
    id: String,
    created: u64,
    model: Arc<LocalModel>,
    params: Params,
    prompts: Vec<PromptParts>,
}

impl Answering {
    fn prompt(&self, choice: usize) -> &PromptParts {
        &self.prompts[choice / self.params.choices]
    }

    /// Logprobs of an echoed prompt, or the empty beginning of an answer's.
    fn prompt_logprobs(
        &self,
        choice: usize,
        entries: &[Option<TokenLogprobs>],
        offsets: &mut OffsetCounter,
    ) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        for (entry, &token) in entries.iter().zip(&self.prompt(choice).tokens) {
            match entry {
                Some(entry) => lists.push(&self.model.tokenizer, entry, offsets),
                None => lists.push_unknown(&self.model.tokenizer, token, offsets),
            }
        }
        lists
    }

    fn whole(&self, answers: &[Answer]) -> Response {
        let choices: Vec<Value> =
            answers.iter().enumerate().map(|(index, answer)| self.choice(index, answer)).collect();
        let body = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name(),
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": UsageBody::of(answers, self.params.choices),
        });
        respond(body, &self.params, answers)
    }

    fn choice(&self, index: usize, answer: &Answer) -> Value {
        let prompt = self.prompt(index);
        let logprobs = self.params.logprobs.map(|_| {
            let mut offsets = OffsetCounter::default();
            let mut lists = self.prompt_logprobs(index, &answer.prompt_logprobs, &mut offsets);
            for entry in &answer.logprobs {
                lists.push(&self.model.tokenizer, entry, &mut offsets);
            }
            lists
        });
        let text = [prompt.echo.as_deref().unwrap_or_default(), &answer.text].concat();
        let mut choice = json!({
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": answer.end.as_ref().map(|end| end.reason),
            "stop_reason": stop_reason(answer.end.as_ref().and_then(|end| end.stop.as_ref())),
        });
        if self.params.return_token_ids {
            choice["prompt_token_ids"] = json!(prompt.tokens);
            choice["token_ids"] = json!(answer.tokens);
        }
        choice
    }
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
    timings: Option<TimingsBody>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// Where one choice of a streamed answer stands.
#[derive(Default)]
struct Progress {
    started: bool,
    tokens: usize,
    offsets: OffsetCounter,
    /// Logprobs of the prompt, until the first chunk takes them along.
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
}

/// Writes the chunks of a streamed answer.
struct CompletionChunks {
    answering: Answering,
    progress: Vec<Progress>,
}

impl Dialect for CompletionChunks {
    fn prompt(&mut self, index: usize, logprobs: Vec<Option<TokenLogprobs>>) {
        self.progress[index].prompt_logprobs = logprobs;
    }

    fn piece(&mut self, out: &mut Vec<u8>, index: usize, piece: Piece) {
        let Self { answering, progress, .. } = self;
        let params = &answering.params;
        let prompt = answering.prompt(index);
        let progress = &mut progress[index];
        let first = !std::mem::replace(&mut progress.started, true);
        progress.tokens = match &piece.end {
            None => progress.tokens + piece.tokens.len(),
            Some(end) => end.usage.completion_tokens,
        };
        let before = std::mem::take(&mut progress.prompt_logprobs);
        let logprobs = params.logprobs.map(|_| {
            let mut lists = answering.prompt_logprobs(index, &before, &mut progress.offsets);
            for entry in &piece.logprobs {
                lists.push(&answering.model.tokenizer, entry, &mut progress.offsets);
            }
            lists
        });
        let echoed;
        let text = match &prompt.echo {
            Some(echo) if first => {
                echoed = [echo, piece.text.as_str()].concat();
                &echoed
            }
            _ => &piece.text,
        };
        let now = params.usage_everywhere.then(|| UsageBody::new(prompt.tokens.len(), progress.tokens, 0));
        let timings = piece.end.as_ref().filter(|_| params.timings).map(TimingsBody::of);
        let choice = ChunkChoice {
            index,
            text,
            logprobs,
            finish_reason: piece.end.as_ref().map(|end| end.reason),
            stop_reason: piece.end.as_ref().map(|end| stop_reason(end.stop.as_ref())),
            prompt_token_ids: (first && params.return_token_ids).then_some(&prompt.tokens),
            token_ids: params.return_token_ids.then_some(piece.tokens),
        };
        let usage = (params.include_usage || params.usage_everywhere).then_some(now);
        push(out, answering, &[choice], usage, timings);
    }

    fn close(&mut self, out: &mut Vec<u8>, usage: UsageBody) {
        if self.answering.params.include_usage {
            push(out, &self.answering, &[], Some(Some(usage)), None);
        }
    }
}

fn push(
    out: &mut Vec<u8>,
    answering: &Answering,
    choices: &[ChunkChoice<'_>],
    usage: Option<Option<UsageBody>>,
    timings: Option<TimingsBody>,
) {
    let chunk = Chunk {
        id: &answering.id,
        object: "text_completion",
        created: answering.created,
        model: answering.model.name(),
        system_fingerprint: FINGERPRINT,
        choices,
        usage,
        timings,
    };
    sse::push_json(out, &chunk);
}
