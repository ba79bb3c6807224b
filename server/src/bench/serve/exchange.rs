//! One streamed request: sent, read chunk by chunk, every chunk stamped.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::Options;
use super::client::{Client, ClientError};
use super::prompts::Prompt;
use crate::bench::sse::SseParser;

/// Which of the two completion APIs is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `/v1/completions`: the prompt is text.
    Completions,
    /// `/v1/chat/completions`: the prompt is one user message.
    Chat,
}

/// What one request did. Times are seconds.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Why it failed, as class and message; `None` for a success.
    pub failure: Option<(String, String)>,
    /// Prompt tokens: the server's count where it tells one, else the planned ones.
    pub prompt_tokens: usize,
    /// Prompt tokens planned.
    pub planned_prompt: usize,
    /// Generated tokens: the server's count where it tells one, else the chunks.
    pub output_tokens: usize,
    /// Output tokens asked for.
    pub planned_output: usize,
    /// The server told its token counts.
    pub counted: bool,
    /// Prompt tokens the server took from its prefix cache, where it tells.
    pub cached_tokens: Option<usize>,
    /// When it was sent, after the start of the run.
    pub start: f64,
    /// From its planned arrival to its sending: waiting for a free slot under `--max-concurrency`.
    pub queued: f64,
    /// From sending to the first chunk.
    pub ttft: f64,
    /// From each chunk to the next one.
    pub gaps: Vec<f64>,
    /// From sending to the last chunk.
    pub latency: f64,
    /// The generated text.
    pub text: String,
}

#[derive(Deserialize)]
struct Chunk {
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning: Option<String>,
    reasoning_content: Option<String>,
    tool_calls: Option<IgnoredAny>,
}

impl Delta {
    fn carries_output(&self) -> bool {
        let filled = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        filled(&self.content) || filled(&self.reasoning) || filled(&self.reasoning_content) || self.tool_calls.is_some()
    }
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: Option<usize>,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Deserialize)]
struct PromptDetails {
    cached_tokens: Option<usize>,
}

/// The JSON body of a request.
pub(super) fn body(options: &Options, model: &str, prompt: &Prompt) -> Bytes {
    let mut body = Map::new();
    body.insert("model".to_owned(), model.into());
    match options.dialect {
        Dialect::Completions => {
            body.insert("prompt".to_owned(), prompt.text.as_str().into());
            body.insert("max_tokens".to_owned(), prompt.output_tokens.into());
        }
        Dialect::Chat => {
            body.insert("messages".to_owned(), json!([{"role": "user", "content": prompt.text}]));
            body.insert("max_completion_tokens".to_owned(), prompt.output_tokens.into());
        }
    }
    body.insert("stream".to_owned(), true.into());
    body.insert("stream_options".to_owned(), json!({"include_usage": true}));
    if options.ignore_eos {
        body.insert("ignore_eos".to_owned(), true.into());
    }
    for (name, value) in &options.sampling {
        body.insert(name.clone(), value.clone());
    }
    for (name, value) in &options.extra_body {
        body.insert(name.clone(), value.clone());
    }
    Bytes::from(Value::Object(body).to_string())
}

/// What the chunks of one answer have told so far.
struct Reading {
    sent: Instant,
    last: Option<Instant>,
    finished: bool,
    done: bool,
    chunks: usize,
    problem: Option<ClientError>,
    outcome: Outcome,
}

impl Reading {
    fn event(&mut self, data: &str) {
        let now = Instant::now();
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let chunk: Chunk = match serde_json::from_str(data) {
            Ok(chunk) => chunk,
            Err(error) => {
                self.problem.get_or_insert(ClientError::Nonsense(format!("a chunk is not as expected: {error}")));
                return;
            }
        };
        if let Some(error) = chunk.error {
            let message = error.get("message").and_then(Value::as_str).map_or_else(|| error.to_string(), str::to_owned);
            self.problem.get_or_insert(ClientError::Broken { doing: "streaming", cause: message });
            return;
        }
        if let Some(usage) = chunk.usage {
            self.outcome.counted = true;
            self.outcome.prompt_tokens = usage.prompt_tokens;
            self.outcome.output_tokens = usage.completion_tokens.unwrap_or(0);
            self.outcome.cached_tokens = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
        }
        let Some(choice) = chunk.choices.as_ref().and_then(|choices| choices.first()) else { return };
        self.finished |= choice.finish_reason.is_some();
        // A chunk that only names the role is no token: servers send it before the prompt is even computed.
        let only_role = choice.finish_reason.is_none()
            && self.last.is_none()
            && choice.delta.as_ref().is_some_and(|delta| !delta.carries_output());
        if only_role {
            return;
        }
        match self.last.replace(now) {
            None => self.outcome.ttft = (now - self.sent).as_secs_f64(),
            Some(last) => self.outcome.gaps.push((now - last).as_secs_f64()),
        }
        self.chunks += 1;
        let delta = choice.delta.as_ref();
        let pieces = [
            choice.text.as_deref(),
            delta.and_then(|d| d.reasoning.as_deref()),
            delta.and_then(|d| d.content.as_deref()),
        ];
        self.outcome.text.extend(pieces.into_iter().flatten());
    }

    fn end(mut self) -> Result<Outcome, ClientError> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        let Some(last) = self.last else {
            return Err(ClientError::Nonsense("the stream ended without a single token".to_owned()));
        };
        if !self.done && !self.finished {
            return Err(ClientError::Broken { doing: "streaming", cause: "the stream ended early".to_owned() });
        }
        if !self.outcome.counted {
            self.outcome.output_tokens = self.chunks;
        }
        self.outcome.latency = (last - self.sent).as_secs_f64();
        Ok(self.outcome)
    }
}

/// Sends one request and reads its answer to the end. A failure is part of the outcome.
pub(super) async fn exchange(client: &Client, path: &str, body: Bytes, prompt: &Prompt, limit: Duration) -> Outcome {
    let planned = Outcome {
        prompt_tokens: prompt.tokens,
        planned_prompt: prompt.wanted,
        planned_output: prompt.output_tokens,
        ..Outcome::default()
    };
    let sent = Instant::now();
    let reading =
        Reading { sent, last: None, finished: false, done: false, chunks: 0, problem: None, outcome: planned.clone() };
    let result = match tokio::time::timeout(limit, read(client, path, body, reading)).await {
        Ok(result) => result,
        Err(_) => Err(ClientError::Timeout(limit)),
    };
    result.unwrap_or_else(|error| Outcome {
        failure: Some((error.class(), error.to_string())),
        latency: sent.elapsed().as_secs_f64(),
        ..planned
    })
}

async fn read(client: &Client, path: &str, body: Bytes, mut reading: Reading) -> Result<Outcome, ClientError> {
    let mut answer = client.post_stream(path, body).await?;
    let mut parser = SseParser::new();
    while let Some(bytes) = answer.next().await? {
        parser.push(&bytes, |data| reading.event(data));
    }
    reading.end()
}
