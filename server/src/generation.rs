//! The answers to one request as one stream: events of all its choices in the order they happen, each with its index.
//!
//! ```text
//!   prompts x n --submit--> RequestStream 0 --\
//!                           RequestStream 1 ----> Generation::next() -> (choice, Event)   [streamed]
//!                           ...               --/        or collect() -> one Answer each  [at once]
//! ```
//!
//! Both ways of answering read this stream, so they cannot differ. Dropping it drops the streams, and the engine ends
//! the requests before its next step.

use std::sync::Arc;

use cupola_engine::request::{Event, FinishReason, Request, StopMatch, Timing, TokenLogprobs, Usage};
use cupola_engine::{EngineHandle, Permit, RequestStream};
use futures_util::stream::{self, BoxStream, SelectAll};
use futures_util::{Stream, StreamExt};

use crate::error::ApiError;
use crate::lifecycle::{Lifecycle, Phase};
use crate::observe::RequestRecord;

/// Places in the engine's queue for every choice of a request, taken before anything is done for it.
pub(crate) struct Places(Vec<Permit>);

impl Places {
    /// Takes a place for each prompt (given by its bytes) times `choices`.
    ///
    /// # Errors
    /// [`ApiError::Overloaded`] and the like; places already taken are given back.
    pub(crate) fn take(
        engine: &EngineHandle,
        prompt_bytes: impl IntoIterator<Item = usize>,
        choices: usize,
        param: &'static str,
    ) -> Result<Self, ApiError> {
        let sizes = prompt_bytes.into_iter().flat_map(|bytes| std::iter::repeat_n(bytes, choices));
        let permits: Result<Vec<Permit>, _> = sizes.map(|bytes| engine.reserve(bytes)).collect();
        permits.map(Self).map_err(|e| ApiError::from_submit(e, param))
    }
}

/// The answers of one request while they are made. Choice `i` answers prompt `i / choices`.
pub(crate) struct Generation {
    events: SelectAll<BoxStream<'static, (usize, Option<Event>)>>,
    lifecycle: Lifecycle,
    record: Arc<RequestRecord>,
    choices: usize,
    open: usize,
}

/// One complete answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub(crate) end: Option<End>,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) reason: &'static str,
    pub(crate) stop: Option<StopMatch>,
    pub(crate) usage: Usage,
    pub(crate) timing: Timing,
}

impl End {
    /// OpenAI's word for how an answer ended.
    ///
    /// # Errors
    /// [`ApiError::CutOff`]: the engine gave it up, so it must not pass for complete.
    pub(crate) fn new(
        reason: FinishReason,
        stop: Option<StopMatch>,
        usage: Usage,
        timing: Timing,
    ) -> Result<Self, ApiError> {
        let reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => return Err(ApiError::CutOff),
        };
        Ok(Self { reason, stop, usage, timing })
    }
}

/// What a generation needs beside its requests.
pub(crate) struct Setting<'a> {
    pub(crate) engine: &'a EngineHandle,
    pub(crate) lifecycle: &'a Lifecycle,
    pub(crate) record: &'a Arc<RequestRecord>,
    /// The field that holds the prompt, for errors.
    pub(crate) param: &'static str,
}

impl Generation {
    /// Submits `choices` requests for each of `requests`; their seeds differ when one is given.
    ///
    /// # Errors
    /// The engine's refusal of any of them; the others are then cancelled.
    pub(crate) fn start(
        setting: &Setting<'_>,
        requests: Vec<Request>,
        choices: usize,
        places: Places,
    ) -> Result<Self, ApiError> {
        let mut places = places.0.into_iter();
        let mut streams = Vec::with_capacity(requests.len() * choices);
        for request in requests {
            setting.record.prompt(request.prompt.len());
            for choice in 0..choices {
                let mut request = request.clone();
                request.sampling.seed = request.sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
                let place = places.next().expect("a place was taken for every choice");
                let stream = setting.engine.submit(request, place);
                streams.push(stream.map_err(|e| ApiError::from_submit(e, setting.param))?);
            }
        }
        let open = streams.len();
        let events = stream::select_all(streams.into_iter().enumerate().map(|(i, s)| events_of(i, s).boxed()));
        let (lifecycle, record) = (setting.lifecycle.clone(), Arc::clone(setting.record));
        Ok(Self { events, lifecycle, record, choices, open })
    }

    /// The next event; `None` once every choice has ended well.
    ///
    /// # Errors
    /// The engine gave a choice up, or the server is stopping. The whole request is over then.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Event), ApiError>> {
        if self.open == 0 {
            return None;
        }
        let next = tokio::select! {
            biased;
            next = self.events.next() => next,
            () = self.lifecycle.reached(Phase::Stopping) => return Some(Err(self.fail(ApiError::CutOff))),
        };
        let (choice, event) = match next {
            Some((choice, Some(event))) => (choice, event),
            // A stream that just stops has lost its engine.
            Some((_, None)) | None => return Some(Err(self.fail(ApiError::EngineDead))),
        };
        match &event {
            Event::Failed { message } => {
                let message = message.clone();
                return Some(Err(self.fail(ApiError::Generation { message })));
            }
            Event::Finished { reason: FinishReason::Cancelled, .. } => return Some(Err(self.fail(ApiError::CutOff))),
            Event::Finished { reason, usage, .. } => {
                self.open -= 1;
                let reason = if *reason == FinishReason::Stop { "stop" } else { "length" };
                self.record.finished(usage.completion_tokens, self.cached(choice, usage), reason);
            }
            Event::Tokens { .. } => self.record.first_token(),
            Event::Prompt { .. } => {}
        }
        Some(Ok((choice, event)))
    }

    fn fail(&mut self, error: ApiError) -> ApiError {
        self.open = 0;
        self.events.clear();
        self.record.failed(error.code());
        error
    }

    /// Cached tokens that count: further choices of a prompt always find it in the cache.
    fn cached(&self, choice: usize, usage: &Usage) -> usize {
        if choice.is_multiple_of(self.choices) { usage.cached_tokens } else { 0 }
    }

    /// Waits for every choice and returns them in order.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub(crate) async fn collect(mut self) -> Result<Vec<Answer>, ApiError> {
        let mut answers: Vec<Answer> = Vec::new();
        answers.resize_with(self.open, Answer::default);
        while let Some(next) = self.next().await {
            let (choice, event) = next?;
            let answer = &mut answers[choice];
            match event {
                Event::Prompt { logprobs } => answer.prompt_logprobs = logprobs,
                Event::Tokens { tokens, text, logprobs } => {
                    answer.tokens.extend(tokens);
                    answer.text.push_str(&text);
                    answer.logprobs.extend(logprobs);
                }
                Event::Finished { text, reason, stop, usage, timing } => {
                    answer.text.push_str(&text);
                    answer.end = Some(End::new(reason, stop, usage, timing)?);
                }
                Event::Failed { message } => return Err(ApiError::Generation { message }),
            }
        }
        Ok(answers)
    }
}

/// The events of one choice, each with its index; `None` when the stream ends without a last event.
fn events_of(choice: usize, stream: RequestStream) -> impl Stream<Item = (usize, Option<Event>)> + Send {
    stream::unfold(Some(stream), move |stream| async move {
        let mut stream = stream?;
        let event = stream.next().await;
        let more = match &event {
            None | Some(Event::Finished { .. } | Event::Failed { .. }) => None,
            Some(Event::Prompt { .. } | Event::Tokens { .. }) => Some(stream),
        };
        Some(((choice, event), more))
    })
}
