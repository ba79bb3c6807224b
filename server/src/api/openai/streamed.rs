//! The one loop of streamed answers: events in, server-sent events out; a dialect only writes its chunks.
//!
//! ```text
//!   Generation::next() --event--> Piece --Dialect::piece--> bytes --> client
//!        | None: Dialect::close with the usage of all choices, then [DONE]
//!        | error: one error event, and nothing more
//! ```

use std::time::Duration;

use axum::response::Response;
use bytes::Bytes;
use cupola_engine::request::{Event, TokenLogprobs};
use futures_util::stream;

use super::wire::UsageBody;
use crate::error::ApiError;
use crate::generation::{End, Generation};
use crate::sse;

/// What one event adds to a choice.
pub(super) struct Piece {
    pub(super) tokens: Vec<u32>,
    pub(super) text: String,
    pub(super) logprobs: Vec<TokenLogprobs>,
    /// Set on the last piece of a choice, which has no tokens.
    pub(super) end: Option<End>,
}

/// How an API writes an answer.
pub(super) trait Dialect: Send + 'static {
    /// Takes the log-probabilities of a choice's prompt, before its first piece.
    fn prompt(&mut self, _choice: usize, _logprobs: Vec<Option<TokenLogprobs>>) {}

    /// Writes the chunk of a piece.
    fn piece(&mut self, out: &mut Vec<u8>, choice: usize, piece: Piece);

    /// Writes what comes after the last piece of all.
    fn close(&mut self, out: &mut Vec<u8>, usage: UsageBody);
}

/// An answer on its way out.
struct Streamed<D> {
    dialect: D,
    generation: Generation,
    /// Choices of a prompt.
    choices: usize,
    usage: UsageBody,
    over: bool,
}

/// Streams `generation`, which makes `choices` answers to each prompt. A comment goes out after `quiet` without an event.
pub(super) fn response(dialect: impl Dialect, generation: Generation, choices: usize, quiet: Duration) -> Response {
    let streamed = Streamed { dialect, generation, choices, usage: UsageBody::default(), over: false };
    sse::response(stream::unfold(streamed, Streamed::step), quiet)
}

impl<D: Dialect> Streamed<D> {
    /// The bytes for the next event, and itself to go on with.
    async fn step(mut self) -> Option<(Bytes, Self)> {
        if self.over {
            return None;
        }
        let mut out = Vec::with_capacity(512);
        let written = match self.generation.next().await {
            Some(Ok((choice, event))) => self.write(&mut out, choice, event),
            Some(Err(error)) => Err(error),
            None => {
                self.over = true;
                self.dialect.close(&mut out, self.usage);
                sse::push_done(&mut out);
                Ok(())
            }
        };
        if let Err(error) = written {
            self.over = true;
            sse::push_error(&mut out, &error);
        }
        Some((out.into(), self))
    }

    fn write(&mut self, out: &mut Vec<u8>, choice: usize, event: Event) -> Result<(), ApiError> {
        let piece = match event {
            Event::Prompt { logprobs } => {
                self.dialect.prompt(choice, logprobs);
                return Ok(());
            }
            Event::Tokens { tokens, text, logprobs } => Piece { tokens, text, logprobs, end: None },
            Event::Finished { text, reason, stop, usage, timing } => {
                self.usage.add(choice, self.choices, &usage);
                let end = Some(End::new(reason, stop, usage, timing)?);
                Piece { tokens: Vec::new(), text, logprobs: Vec::new(), end }
            }
            Event::Failed { message } => return Err(ApiError::Generation { message }),
        };
        self.dialect.piece(out, choice, piece);
        Ok(())
    }
}
