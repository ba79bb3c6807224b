//! The way of one request's events from the engine thread to its reader.
//!
//! ```text
//!   engine thread   push ──> [ event | event | ... ] ──> next()        reader (async or blocking)
//!                            past `capacity` tokens merge into the last event: a slow reader never stalls
//!                            the engine and loses nothing
//!   Sender dropped: the reader drains what is left, then gets None. A request always gets an answer: when the last
//!                   event did not end it, `Failed` is added.
//!   RequestStream dropped: `is_closed` turns true; the engine ends the request before its next step.
//! ```

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use crate::request::Event;

/// Events of one request, in order. Dropping it cancels the request within one step.
#[derive(Debug)]
pub struct RequestStream {
    shared: Arc<Shared>,
}

/// The engine's end.
#[derive(Debug)]
pub(crate) struct Sender {
    shared: Arc<Shared>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    reader_gone: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    /// `Finished` or `Failed` was pushed.
    ended: bool,
    closed: bool,
    waker: Option<Waker>,
    /// A thread waits on `arrived`: without one the engine saves the call.
    blocked: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // The queue is whole at every point where a panic could happen, so a poisoned lock is as good as any.
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn wake(&self, mut queue: MutexGuard<'_, Queue>) {
        let (waker, blocked) = (queue.waker.take(), queue.blocked);
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
        if blocked {
            self.arrived.notify_one();
        }
    }
}

pub(crate) fn mailbox(capacity: usize) -> (Sender, RequestStream) {
    let shared = Arc::new(Shared::default());
    (Sender { shared: Arc::clone(&shared), capacity }, RequestStream { shared })
}

impl Sender {
    /// True once the reader is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.reader_gone.load(Acquire)
    }

    /// Hands an event over; never waits.
    pub(crate) fn push(&self, event: Event) {
        let mut queue = self.shared.lock();
        let full = queue.events.len() >= self.capacity;
        queue.ended |= matches!(event, Event::Finished { .. } | Event::Failed { .. });
        match (queue.events.back_mut(), event) {
            (
                Some(Event::Tokens { tokens, text, logprobs }),
                Event::Tokens { tokens: more_tokens, text: more_text, logprobs: more_logprobs },
            ) if full => {
                tokens.extend(more_tokens);
                text.push_str(&more_text);
                logprobs.extend(more_logprobs);
            }
            (_, event) => queue.events.push_back(event),
        }
        self.shared.wake(queue);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        if !queue.ended {
            queue.events.push_back(Event::Failed { message: "the engine ended before the answer was complete".into() });
        }
        queue.closed = true;
        self.shared.wake(queue);
    }
}

impl RequestStream {
    /// The next event; `None` after the last one. Cancel safe: an event is taken only when it is returned.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| {
            let mut queue = self.shared.lock();
            if let Some(event) = queue.events.pop_front() {
                return Poll::Ready(Some(event));
            }
            if queue.closed {
                return Poll::Ready(None);
            }
            match &mut queue.waker {
                Some(waker) => waker.clone_from(context.waker()),
                none => *none = Some(context.waker().clone()),
            }
            Poll::Pending
        })
        .await
    }

    /// The next event for a thread outside any async runtime; blocks until there is one.
    pub fn blocking_next(&mut self) -> Option<Event> {
        let mut queue = self.shared.lock();
        loop {
            if let Some(event) = queue.events.pop_front() {
                return Some(event);
            }
            if queue.closed {
                return None;
            }
            queue.blocked = true;
            queue = self.shared.arrived.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
            queue.blocked = false;
        }
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.shared.reader_gone.store(true, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(token: u32) -> Event {
        Event::Tokens { tokens: vec![token], text: token.to_string(), logprobs: Vec::new() }
    }

    #[test]
    fn a_slow_reader_gets_every_token_in_few_events() {
        let (sender, mut stream) = mailbox(3);
        for i in 0..100 {
            sender.push(token(i));
        }
        drop(sender);
        let (mut events, mut all, mut joined) = (0, Vec::new(), String::new());
        while let Some(Event::Tokens { tokens, text, .. }) = stream.blocking_next() {
            events += 1;
            all.extend(tokens);
            joined += &text;
        }
        assert_eq!(events, 3);
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        assert_eq!(joined, (0..100).map(|i| i.to_string()).collect::<String>());
    }

    #[test]
    fn the_engine_sees_a_reader_leave_and_a_reader_sees_the_engine_leave() {
        let (sender, stream) = mailbox(3);
        assert!(!sender.is_closed());
        drop(stream);
        assert!(sender.is_closed());
        let (sender, mut stream) = mailbox(3);
        let reader = std::thread::spawn(move || (stream.blocking_next(), stream.blocking_next()));
        drop(sender);
        let seen = reader.join().expect("the reader does not panic");
        assert!(matches!(seen, (Some(Event::Failed { .. }), None)), "{seen:?}");
    }

    #[tokio::test]
    async fn an_async_reader_is_woken() {
        let (sender, mut stream) = mailbox(3);
        let reader = tokio::spawn(async move { stream.next().await });
        tokio::task::yield_now().await;
        sender.push(token(7));
        let event = reader.await.expect("the reader does not panic");
        assert!(matches!(event, Some(Event::Tokens { tokens, .. }) if tokens == [7]));
    }
}
