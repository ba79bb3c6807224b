//! What the host does while a step is computed, and what that must not change.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use cupola_engine::{FinishReason, Request, StopMatch, TokenText};

use crate::ASYNCHRONOUS;
use crate::fake::{Letters, Work, encode};
use crate::support::{Plan, greedy_answer};

/// Counts tokens that become text while a step is computed, and while none is.
struct Watching {
    letters: Letters,
    work: Arc<Work>,
    during: AtomicUsize,
    between: AtomicUsize,
}

impl TokenText for Watching {
    fn token_bytes(&self, id: u32) -> &[u8] {
        let counter = if self.work.computing.load(Relaxed) { &self.during } else { &self.between };
        counter.fetch_add(1, Relaxed);
        self.letters.token_bytes(id)
    }

    fn is_special(&self, id: u32) -> bool {
        self.letters.is_special(id)
    }
}

fn endless(prompt: &str, max_tokens: usize) -> Request {
    let mut request = Request::greedy(encode(prompt), max_tokens);
    request.stop.ignore_eos = true;
    request
}

#[test]
fn tokens_become_text_while_the_next_step_is_computed() {
    const TOKENS: usize = 20;
    let work = Arc::new(Work::default());
    let (during, between) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let text = Arc::new(Watching { letters: Letters::new(), work: Arc::clone(&work), during, between });
    let rig = Plan::default().start_with(text.clone(), work);
    let answer = rig.ask(endless("overlap", TOKENS));
    let special = answer.tokens.iter().filter(|token| text.letters.is_special(**token)).count();
    assert_eq!(answer.tokens, greedy_answer(&encode("overlap"), TOKENS, true));
    let seen = (text.during.load(Relaxed), text.between.load(Relaxed));
    // After the last token there is nothing more to compute.
    let expected = if ASYNCHRONOUS { (TOKENS - special - 1, 1) } else { (0, TOKENS - special) };
    assert_eq!(seen, expected);
}

#[test]
fn a_stop_text_throws_at_most_one_row_away() {
    let rig = Plan::default().start();
    let expected = greedy_answer(&encode("late"), 30, true);
    let letters = Letters::new();
    let text = |tokens: &[u32]| -> String {
        let shown = tokens.iter().filter(|token| !letters.is_special(**token));
        String::from_utf8_lossy(&shown.flat_map(|token| letters.token_bytes(*token)).copied().collect::<Vec<_>>())
            .into()
    };
    // What the tenth token says, unless an earlier one says it too.
    let stop = text(&expected[8..10]);
    let end = (1..=30).find(|&count| text(&expected[..count]).contains(&stop)).expect("the answer has it");
    let mut request = endless("late", 30);
    request.stop.strings = vec![stop.clone()];
    let answer = rig.ask(request);
    assert_eq!(answer.tokens, expected[..end]);
    assert_eq!(answer.usage.completion_tokens, end);
    assert_eq!(answer.end, Some((FinishReason::Stop, Some(StopMatch::Text(stop)))));
    rig.settle();
    assert_eq!(rig.rows(), 4 + end - 1 + usize::from(ASYNCHRONOUS));
    assert_eq!(rig.engine.metrics().generation_tokens.get(), end as u64);
}

#[test]
fn an_end_that_tokens_tell_computes_nothing_beyond() {
    let rig = Plan::default().start();
    assert_eq!(rig.ask(endless("exact", 9)).tokens.len(), 9);
    rig.settle();
    assert_eq!(rig.rows(), 5 + 8);
    let expected = greedy_answer(&encode("token"), 30, true);
    let mut request = endless("token", 30);
    request.stop.token_ids = vec![expected[6]];
    let count = rig.ask(request).tokens.len();
    rig.settle();
    assert_eq!(rig.rows(), 5 + 8 + 5 + count - 1);
}
