//! The bounded queue in front of the engine: permits that are taken before any work is done for a request.
//!
//! ```text
//!   reserve(bytes) ──> Permit ──tokenise, submit──> waiting ──admitted to a step──> permit dropped
//!                      └─ client gone, prompt refused: dropped as well
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::SubmitError;

/// Bytes of text that make about one token; an estimate used until the prompt has been tokenised.
const BYTES_PER_TOKEN: usize = 4;
const RETRY_AT_LEAST: Duration = Duration::from_secs(1);
const RETRY_AT_MOST: Duration = Duration::from_secs(60);

/// Requests and prompt tokens that wait, and their limits.
#[derive(Debug)]
pub(crate) struct WaitingRoom {
    requests: AtomicUsize,
    tokens: AtomicUsize,
    max_requests: usize,
    max_tokens: usize,
}

/// A place in the queue. It is given up when dropped, or when the request starts to run.
#[derive(Debug)]
pub struct Permit {
    room: Arc<WaitingRoom>,
    tokens: usize,
}

impl WaitingRoom {
    pub(crate) fn new(max_requests: usize, max_tokens: usize) -> Self {
        Self { requests: AtomicUsize::new(0), tokens: AtomicUsize::new(0), max_requests, max_tokens }
    }

    /// Requests and prompt tokens waiting now.
    pub(crate) fn backlog(&self) -> (usize, usize) {
        (self.requests.load(Relaxed), self.tokens.load(Relaxed))
    }

    /// Takes a place for a prompt of about `prompt_bytes` bytes; `prefill_rate` (tokens a second, 0 when unknown) is
    /// for the advice in a refusal.
    pub(crate) fn enter(self: &Arc<Self>, prompt_bytes: usize, prefill_rate: f64) -> Result<Permit, SubmitError> {
        let tokens = prompt_bytes.div_ceil(BYTES_PER_TOKEN).max(1);
        let full = |queued, limit, unit| SubmitError::QueueFull {
            queued,
            limit,
            unit,
            retry_after: retry_after(self.backlog().1, prefill_rate),
        };
        let one_more = |n| (n < self.max_requests).then_some(n + 1);
        if let Err(queued) = self.requests.fetch_update(Relaxed, Relaxed, one_more) {
            return Err(full(queued, self.max_requests, "requests"));
        }
        // From here on the permit's drop undoes what was counted.
        let mut permit = Permit { room: Arc::clone(self), tokens: 0 };
        let add =
            |n: usize| (n == 0 || n.saturating_add(tokens) <= self.max_tokens).then_some(n.saturating_add(tokens));
        match self.tokens.fetch_update(Relaxed, Relaxed, add) {
            Ok(_) => permit.tokens = tokens,
            Err(queued) => return Err(full(queued, self.max_tokens, "prompt tokens")),
        }
        Ok(permit)
    }
}

impl Permit {
    /// Replaces the estimate by the true length.
    pub(crate) fn settle(&mut self, tokens: usize) {
        self.room.tokens.fetch_add(tokens, Relaxed);
        self.room.tokens.fetch_sub(self.tokens, Relaxed);
        self.tokens = tokens;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.room.tokens.fetch_sub(self.tokens, Relaxed);
        self.room.requests.fetch_sub(1, Relaxed);
    }
}

fn retry_after(backlog_tokens: usize, prefill_rate: f64) -> Duration {
    if prefill_rate <= 0.0 {
        return RETRY_AT_LEAST;
    }
    let seconds = (backlog_tokens as f64 / prefill_rate).ceil().min(RETRY_AT_MOST.as_secs_f64());
    Duration::from_secs_f64(seconds).clamp(RETRY_AT_LEAST, RETRY_AT_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back_on_drop() {
        let room = Arc::new(WaitingRoom::new(2, 100));
        let a = room.enter(4, 0.0).expect("first of two");
        let _b = room.enter(4, 0.0).expect("second of two");
        let refused = room.enter(4, 0.0).expect_err("the third has no place");
        assert!(matches!(refused, SubmitError::QueueFull { queued: 2, limit: 2, unit: "requests", .. }), "{refused:?}");
        drop(a);
        assert_eq!(room.backlog(), (1, 1));
        room.enter(4, 0.0).expect("a place came back");
    }

    #[test]
    fn tokens_are_limited_but_a_long_prompt_alone_is_let_through() {
        let room = Arc::new(WaitingRoom::new(9, 100));
        let mut long = room.enter(4000, 0.0).expect("alone");
        let refused = room.enter(4, 10.0).expect_err("1000 of 100 tokens wait");
        let SubmitError::QueueFull { queued: 1000, limit: 100, retry_after, .. } = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(retry_after, RETRY_AT_MOST);
        assert_eq!(room.backlog().0, 1, "a refusal leaves nothing behind");
        long.settle(60);
        room.enter(160, 0.0).expect("60 + 40 tokens fit");
        drop(long);
        assert_eq!(room.backlog(), (0, 0));
    }

    #[test]
    fn advice_follows_the_prefill_rate() {
        assert_eq!(retry_after(5000, 1000.0), Duration::from_secs(5));
        assert_eq!(retry_after(5000, 0.0), RETRY_AT_LEAST);
        assert_eq!(retry_after(5, 1000.0), RETRY_AT_LEAST);
        assert_eq!(retry_after(5, 1e-300), RETRY_AT_MOST);
    }
}
