//! Clients that leave or do not read, a queue that is full, a model that fails, and how an engine ends.

use std::time::{Duration, Instant};

use cupola_engine::{EngineConfig, Request, SubmitError};

use crate::fake::{ERROR, FATAL, NOT_A_NUMBER, PANIC};
use crate::support::{Plan, Rig, collect, greedy_answer};

const STEP: Duration = Duration::from_millis(5);

fn slow(config: EngineConfig) -> Rig {
    Plan { step_time: STEP, config, ..Plan::default() }.start()
}

fn long(prompt: u32) -> Request {
    let mut request = Request::greedy(vec![prompt; 40], 400);
    request.stop.ignore_eos = true;
    request
}

/// Waits for something that must happen soon.
fn soon(what: &str, mut happened: impl FnMut() -> bool) {
    let began = Instant::now();
    while !happened() {
        assert!(began.elapsed() < Duration::from_secs(10), "{what} did not happen");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_client_that_leaves_frees_its_blocks_within_a_step() {
    let rig = slow(EngineConfig::default());
    let mut leaves = rig.engine.submit_now(long(1)).expect("accepted");
    let stays = rig.engine.submit_now(Request::greedy(vec![2; 40], 30)).expect("accepted");
    leaves.blocking_next().expect("a first token");
    let batches = || rig.work.batches.load(std::sync::atomic::Ordering::Relaxed);
    drop(leaves);
    let at = batches();
    soon("the cancellation", || rig.engine.metrics().cancelled_running.get() == 1);
    assert!(batches() <= at + 2, "{} steps after the client left", batches() - at);
    assert_eq!(collect(stays).tokens, greedy_answer(&[2; 40], 30, false), "the other goes on");
    rig.settle();
}

#[test]
fn a_client_that_leaves_the_queue_is_forgotten() {
    let rig = slow(EngineConfig { max_num_seqs: 1, ..EngineConfig::default() });
    let runs = rig.engine.submit_now(long(1)).expect("accepted");
    let waits = rig.engine.submit_now(long(2)).expect("accepted");
    soon("waiting", || rig.engine.metrics().waiting.get() == 1);
    assert_eq!(rig.engine.backlog().0, 1);
    drop(waits);
    soon("the cancellation", || rig.engine.metrics().cancelled_waiting.get() == 1);
    assert_eq!(rig.engine.backlog(), (0, 0));
    drop(runs);
    rig.settle();
}

#[test]
fn a_slow_reader_stalls_nobody_and_loses_nothing() {
    let rig = Plan { config: EngineConfig { event_capacity: 2, ..EngineConfig::default() }, ..Plan::default() }.start();
    let unread = rig.engine.submit_now(long(1)).expect("accepted");
    let read = rig.engine.submit_now(long(2)).expect("accepted");
    assert_eq!(collect(read).tokens, greedy_answer(&[2; 40], 400, true));
    soon("the end of the unread answer", || rig.engine.in_flight() == 0);
    let (mut events, mut stream, mut tokens) = (0, unread, Vec::new());
    while let Some(event) = stream.blocking_next() {
        events += 1;
        if let cupola_engine::Event::Tokens { tokens: more, .. } = event {
            tokens.extend(more);
        }
    }
    assert_eq!(tokens, greedy_answer(&[1; 40], 400, true));
    assert!(events <= 3, "{events} events");
    rig.settle();
}

#[test]
fn a_full_queue_refuses_with_advice_and_opens_again() {
    let rig = slow(EngineConfig { max_num_seqs: 1, max_queued_requests: 2, ..EngineConfig::default() });
    let runs = rig.engine.submit_now(long(1)).expect("accepted");
    soon("running", || rig.engine.metrics().running.get() == 1);
    let permit = rig.engine.reserve(100).expect("a first place");
    let second = rig.engine.submit_now(long(2)).expect("a second place");
    let error = rig.engine.reserve(100).expect_err("no third place");
    let SubmitError::QueueFull { queued: 2, limit: 2, retry_after, .. } = error else { panic!("{error:?}") };
    assert!(retry_after >= Duration::from_secs(1));
    assert_eq!(rig.engine.metrics().rejected_queue_full.get(), 1);
    drop(permit);
    rig.engine.reserve(100).expect("the place came back");
    drop((runs, second));
    rig.settle();
}

#[test]
fn a_failed_forward_pass_fails_its_requests_only() {
    let rig = slow(EngineConfig::default());
    let fails = rig.ask(Request::greedy(vec![ERROR], 3));
    assert!(fails.failed.expect("failed").contains("an error was asked for"));
    assert_eq!(rig.ask(Request::greedy(vec![1], 3)).tokens, greedy_answer(&[1], 3, false));
    assert!(rig.engine.is_alive());
    rig.settle();
}

#[test]
fn logits_that_are_not_numbers_fail_one_request() {
    let rig = slow(EngineConfig::default());
    let mut bad = Request::greedy(vec![NOT_A_NUMBER], 3);
    bad.sampling.temperature = 1.0;
    let (bad, good) = (rig.engine.submit_now(bad), rig.engine.submit_now(long(1)));
    assert!(collect(bad.expect("accepted")).failed.expect("failed").contains("not a number"));
    assert_eq!(collect(good.expect("accepted")).tokens, greedy_answer(&[1; 40], 400, true));
    rig.settle();
}

#[test]
fn a_panic_fails_everyone_and_kills_the_engine() {
    let rig = slow(EngineConfig { max_num_seqs: 2, ..EngineConfig::default() });
    let others: Vec<_> = (0..3).map(|i| rig.engine.submit_now(long(i)).expect("accepted")).collect();
    soon("waiting", || rig.engine.metrics().running.get() == 2);
    drop(others.into_iter().next());
    let last = rig.engine.submit_now(Request::greedy(vec![PANIC], 3)).expect("accepted");
    assert!(collect(last).failed.is_some());
    soon("death", || !rig.engine.is_alive());
    assert_eq!(rig.engine.submit_now(long(1)).expect_err("dead"), SubmitError::Dead);
    assert!(rig.engine.blocking_check_integrity().is_err());
    soon("the end of all requests", || rig.engine.in_flight() == 0);
    assert_eq!(rig.engine.heartbeat_age(), Duration::ZERO);
    rig.engine.shutdown();
}

#[test]
fn a_panic_reaches_requests_that_run_beside_it() {
    let rig = slow(EngineConfig::default());
    let beside = rig.engine.submit_now(long(1)).expect("accepted");
    let bad = rig.engine.submit_now(Request::greedy(vec![PANIC], 3)).expect("accepted");
    for stream in [beside, bad] {
        assert!(collect(stream).failed.expect("failed").contains("fault"));
    }
}

#[test]
fn a_lost_device_ends_every_request_and_the_engine() {
    let rig = slow(EngineConfig::default());
    let beside = rig.engine.submit_now(long(1)).expect("accepted");
    soon("running", || rig.engine.metrics().running.get() == 1);
    let bad = rig.engine.submit_now(Request::greedy(vec![FATAL], 3)).expect("accepted");
    for stream in [beside, bad] {
        assert!(collect(stream).failed.expect("failed").contains("device"));
    }
    soon("death", || !rig.engine.is_alive());
    assert_eq!(rig.engine.submit_now(long(1)).expect_err("dead"), SubmitError::Dead);
    soon("the end of all requests", || rig.engine.in_flight() == 0);
    rig.engine.shutdown();
}

#[tokio::test]
async fn draining_finishes_what_runs_and_refuses_the_rest() {
    let rig = slow(EngineConfig::default());
    let mut stream = rig.engine.submit_now(Request::greedy(vec![1; 40], 10)).expect("accepted");
    rig.engine.drain();
    assert_eq!(rig.engine.submit_now(long(2)).expect_err("draining"), SubmitError::ShuttingDown);
    rig.engine.drained().await;
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        tokens += usize::from(matches!(event, cupola_engine::Event::Tokens { .. }));
    }
    assert_eq!(tokens, greedy_answer(&[1; 40], 10, false).len());
    let report = rig.engine.check_integrity().await.expect("whole");
    assert_eq!(report.leased, 0);
}

#[test]
fn shutdown_fails_what_runs_and_joins_the_thread() {
    let rig = slow(EngineConfig::default());
    let stream = rig.engine.submit_now(long(1)).expect("accepted");
    soon("running", || rig.engine.metrics().running.get() == 1);
    rig.engine.shutdown();
    assert!(!rig.engine.is_alive());
    assert!(collect(stream).failed.expect("failed").contains("shutting down"));
    rig.engine.shutdown();
}

#[test]
fn the_last_handle_lets_its_requests_finish() {
    let rig = slow(EngineConfig::default());
    let stream = rig.engine.submit_now(Request::greedy(vec![1; 40], 10)).expect("accepted");
    drop(rig);
    assert_eq!(collect(stream).tokens, greedy_answer(&[1; 40], 10, false));
}

#[test]
fn the_heartbeat_ages_in_a_long_step_and_rests_when_idle() {
    let rig = Plan { step_time: Duration::from_millis(100), ..Plan::default() }.start();
    assert_eq!(rig.engine.heartbeat_age(), Duration::ZERO);
    let stream = rig.engine.submit_now(Request::greedy(vec![1], 2)).expect("accepted");
    soon("an ageing heartbeat", || rig.engine.heartbeat_age() > Duration::from_millis(20));
    collect(stream);
    soon("rest", || rig.engine.heartbeat_age() == Duration::ZERO);
}

#[test]
fn metrics_add_up() {
    let rig = slow(EngineConfig::default());
    let answer = rig.ask(Request::greedy(vec![3; 50], 7));
    rig.settle();
    let metrics = rig.engine.metrics();
    assert_eq!(metrics.prompt_tokens.get(), 50);
    assert_eq!(metrics.generation_tokens.get(), answer.tokens.len() as u64);
    assert_eq!(metrics.finished_stop.get() + metrics.finished_length.get(), 1);
    for histogram in [&metrics.time_to_first_token, &metrics.e2e, &metrics.queue, &metrics.prefill, &metrics.decode] {
        assert_eq!(histogram.count(), 1);
    }
    assert_eq!(metrics.inter_token_latency.count() as usize, answer.tokens.len() - 1);
    assert_eq!(metrics.steps.get(), metrics.step_time.count());
    assert_eq!((metrics.running.get(), metrics.waiting.get(), metrics.kv_blocks_leased.get()), (0, 0, 0));
    assert!(metrics.prefill_rate.get() > 0.0);
}
