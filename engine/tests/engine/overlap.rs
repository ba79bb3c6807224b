//! What the host does while a step is computed, and what that must not change.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use std::time::{Duration, Instant};

use cupola_engine::{EngineConfig, FinishReason, Request, StopMatch, SubmitError, TokenText};

use crate::ASYNCHRONOUS;
use crate::fake::{ERROR, Letters, Work, encode};
use crate::support::{Plan, Rig, collect, greedy_answer};

/// Counts tokens that become text while a step is computed, and while none is.
struct Watching {
    letters: Letters,
    work: Arc<Work>,
    during: AtomicUsize,
    between: AtomicUsize,
}

impl TokenText for Watching {
    fn token_bytes(&self, id: u32) -> &[u8] {
        let counter = if self.work.computing.load(Relaxed) > 0 { &self.during } else { &self.between };
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
fn a_length_computes_nothing_beyond_and_a_stop_token_at_most_a_row() {
    let rig = Plan::default().start();
    assert_eq!(rig.ask(endless("exact", 9)).tokens.len(), 9);
    rig.settle();
    assert_eq!(rig.rows(), 5 + 8);
    let expected = greedy_answer(&encode("token"), 30, true);
    let mut request = endless("token", 30);
    request.stop.token_ids = vec![expected[6]];
    let count = rig.ask(request).tokens.len();
    rig.settle();
    // A token ends the answer that nobody knew when the step after it was submitted.
    assert_eq!(rig.rows(), 5 + 8 + 5 + count - 1 + usize::from(ASYNCHRONOUS));
}

/// Requests that are decoded side by side; the last answer is the longest.
fn beside(rig: &Rig) -> Vec<(Request, cupola_engine::RequestStream)> {
    let requests = ["one", "two", "three"].iter().zip([40, 45, 50]).map(|(prompt, count)| endless(prompt, count));
    requests.map(|request| (request.clone(), rig.engine.submit_now(request).expect("accepted"))).collect()
}

fn config(async_scheduling: bool) -> EngineConfig {
    EngineConfig { async_scheduling, ..EngineConfig::default() }
}

#[test]
fn decoding_steps_are_submitted_before_the_tokens_before_them_are_known() {
    for async_scheduling in [true, false] {
        let rig = Plan { config: config(async_scheduling), ..Plan::default() }.start();
        for (request, stream) in beside(&rig) {
            let expected = greedy_answer(&request.prompt, request.stop.max_tokens.expect("set"), true);
            assert_eq!(collect(stream).tokens, expected);
        }
        rig.settle();
        let (steps, ahead) = (rig.engine.metrics().steps.get(), rig.engine.metrics().steps_ahead.get());
        if ASYNCHRONOUS && async_scheduling {
            assert!(ahead >= 45 && ahead < steps, "{ahead} of {steps} steps");
            assert_eq!(rig.work.deepest.load(Relaxed), 2);
        } else {
            assert_eq!(ahead, 0);
            assert!(rig.work.deepest.load(Relaxed) <= 1);
        }
        assert_eq!(rig.rows(), 3 + 3 + 5 + 39 + 44 + 49, "lengths are known beforehand: no row is thrown away");
    }
}

#[test]
fn rows_that_look_at_the_tokens_so_far_are_not_submitted_ahead() {
    let change: [fn(&mut Request); 3] = [
        |request| request.sampling.frequency_penalty = 0.1,
        |request| request.logprobs = Some(1),
        // The runner of these tests draws no tokens.
        |request| request.sampling.temperature = 0.7,
    ];
    for change in change {
        let rig = Plan::default().start();
        let mut request = endless("looks back", 20);
        change(&mut request);
        assert_eq!(rig.ask(request).tokens.len(), 20);
        assert_eq!(rig.engine.metrics().steps_ahead.get(), 0);
        rig.settle();
    }
}

#[test]
fn a_request_that_arrives_between_two_steps_is_let_in() {
    let plan = Plan { step_time: Duration::from_millis(2), ..Plan::default() };
    let rig = plan.start();
    let long = rig.engine.submit_now(endless("long", 200)).expect("accepted");
    for prompt in ["short", "shorter", "shortest"] {
        assert_eq!(rig.ask(endless(prompt, 5)).tokens, greedy_answer(&encode(prompt), 5, true));
    }
    assert_eq!(rig.engine.metrics().finished_length.get(), 3, "they did not wait for the long one");
    assert_eq!(collect(long).tokens, greedy_answer(&encode("long"), 200, true));
    rig.settle();
}

#[test]
fn a_device_lost_with_two_steps_under_way_fails_every_request() {
    for lost_at in [2, 3, 10, 11, 30] {
        let work = Arc::new(Work::default());
        work.lost_at.store(lost_at, Relaxed);
        let rig = Plan { step_time: Duration::from_millis(1), ..Plan::default() }
            .start_with(Arc::new(Letters::new()), Arc::clone(&work));
        for (request, stream) in beside(&rig) {
            let answer = collect(stream);
            assert!(answer.failed.as_deref().expect("failed").contains("device"), "{answer:?}");
            let expected = greedy_answer(&request.prompt, 50, true);
            assert!(answer.tokens.len() < lost_at && expected.starts_with(&answer.tokens), "{lost_at}: {answer:?}");
        }
        assert!(work.batches.load(Relaxed) <= lost_at + 1, "nothing is submitted to a device that is lost");
        let began = Instant::now();
        while rig.engine.is_alive() || rig.engine.in_flight() > 0 {
            assert!(began.elapsed() < Duration::from_secs(10), "the engine ends");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(rig.engine.submit_now(endless("late", 1)).expect_err("dead"), SubmitError::Dead);
        rig.engine.shutdown();
        assert_eq!(rig.engine.metrics().kv_blocks_leased.get(), 0);
    }
}

#[test]
fn a_step_that_fails_with_another_under_way_fails_its_requests_alone() {
    for error_at in [2, 3, 10, 11] {
        let work = Arc::new(Work::default());
        work.error_at.store(error_at, Relaxed);
        let rig = Plan::default().start_with(Arc::new(Letters::new()), work);
        let streams = beside(&rig);
        let failed = streams.into_iter().map(|(request, stream)| (request, collect(stream)));
        let failed = failed.filter(|(request, answer)| {
            let expected = greedy_answer(&request.prompt, request.stop.max_tokens.expect("set"), true);
            assert!(expected.starts_with(&answer.tokens), "{error_at}: {answer:?}");
            assert_eq!(answer.failed.is_some(), answer.tokens.len() < expected.len());
            answer.failed.as_deref().is_some_and(|why| why.contains("an error was asked for"))
        });
        assert!(failed.count() > 0);
        // What was computed badly is not found again.
        for (request, stream) in beside(&rig) {
            let expected = greedy_answer(&request.prompt, request.stop.max_tokens.expect("set"), true);
            assert_eq!(collect(stream).tokens, expected);
        }
        rig.settle();
    }
}

#[test]
fn a_step_that_is_refused_fails_its_requests_and_leaves_no_block_behind() {
    let rig = Plan { step_time: Duration::from_millis(1), ..Plan::default() }.start();
    let streams = beside(&rig);
    let failed = rig.ask(Request::greedy(vec![ERROR], 3)).failed.expect("failed");
    assert!(failed.contains("an error was asked for"), "{failed}");
    // A prompt comes in a step with all others, which is planned when nothing is under way: all fail, and nothing is left.
    streams.into_iter().for_each(|(_, stream)| drop(collect(stream)));
    assert_eq!(rig.ask(endless("after", 9)).tokens, greedy_answer(&encode("after"), 9, true));
    rig.settle();
}

#[test]
fn a_shutdown_with_a_step_under_way_leaves_no_block_behind() {
    for wait in 0..6 {
        let rig = Plan { step_time: Duration::from_millis(2), ..Plan::default() }.start();
        let mut streams = beside(&rig);
        (0..5 * wait).for_each(|_| drop(streams[0].1.blocking_next()));
        rig.engine.shutdown();
        assert_eq!(rig.engine.metrics().kv_blocks_leased.get(), 0);
        for (_, stream) in streams {
            assert!(collect(stream).failed.expect("failed").contains("shutting down"));
        }
    }
}
