//! What the prefix cache saves, counted in computed rows.

use std::time::Duration;

use cupola_engine::{EngineConfig, Request};

use crate::support::{Plan, Rig, collect};

fn prompt(len: usize) -> Vec<u32> {
    (0..len).map(|i| u32::try_from(i * 5 % 26).expect("a letter")).collect()
}

/// Holds the engine in a step while requests are queued, so that they are scheduled together.
fn together(rig: &Rig, requests: Vec<Request>) {
    let blocker = rig.engine.submit_now(Request::greedy(vec![25], 1)).expect("accepted");
    let streams: Vec<_> =
        requests.into_iter().map(|request| rig.engine.submit_now(request).expect("accepted")).collect();
    collect(blocker);
    for stream in streams {
        assert_eq!(collect(stream).failed, None);
    }
}

#[test]
fn equal_prompts_in_flight_compute_their_prefix_once() {
    let rig = Plan { step_time: Duration::from_millis(20), ..Plan::default() }.start();
    together(&rig, (0..4).map(|_| Request::greedy(prompt(200), 1)).collect());
    // 1 for the blocker; 200 for the first, 200 - 192 for each of the others.
    assert_eq!(rig.rows(), 1 + 200 + 3 * 8);
    assert_eq!(rig.engine.metrics().prefix_hits.get(), 3 * 192);
    rig.settle();
}

#[test]
fn a_prefix_computed_in_chunks_is_shared_as_well() {
    let config = EngineConfig { max_num_batched_tokens: 50, max_num_seqs: 16, ..EngineConfig::default() };
    let rig = Plan { step_time: Duration::from_millis(20), config, ..Plan::default() }.start();
    let requests = (0..8u32).map(|i| {
        let mut prompt = prompt(128);
        prompt.extend([i, i + 1, i + 2]);
        Request::greedy(prompt, 1)
    });
    together(&rig, requests.collect());
    assert_eq!(rig.rows(), 1 + 131 + 7 * 3);
    rig.settle();
}

#[test]
fn when_the_owner_of_a_prefix_leaves_a_waiter_takes_over() {
    let config = EngineConfig { max_num_batched_tokens: 16, max_num_seqs: 16, ..EngineConfig::default() };
    let rig = Plan { step_time: Duration::from_millis(10), config, ..Plan::default() }.start();
    let owner = rig.engine.submit_now(Request::greedy(prompt(300), 4)).expect("accepted");
    let waiter = rig.engine.submit_now(Request::greedy(prompt(300), 4)).expect("accepted");
    std::thread::sleep(Duration::from_millis(60));
    drop(owner);
    let answer = collect(waiter);
    assert_eq!(answer.tokens.len(), 4);
    assert!(answer.usage.cached_tokens > 0 && answer.usage.cached_tokens < 300, "{answer:?}");
    rig.settle();
}

#[test]
fn salts_private_requests_and_a_reset_compute_again() {
    let rig = Plan::default().start();
    let ask = |salt: u64, share: bool| {
        let before = rig.rows();
        let mut request = Request::greedy(prompt(100), 1);
        (request.cache_salt, request.use_prefix_cache) = (salt, share);
        assert_eq!(rig.ask(request).failed, None);
        rig.rows() - before
    };
    assert_eq!(ask(0, true), 100);
    assert_eq!(ask(0, true), 4);
    assert_eq!(ask(1, true), 100);
    assert_eq!(ask(1, false), 100);
    rig.engine.reset_prefix_cache().expect("alive");
    assert_eq!(ask(0, true), 100);
    assert_eq!(ask(0, true), 4);
    rig.settle();
}

#[test]
fn the_next_turn_of_a_conversation_reuses_the_answer() {
    let rig = Plan::default().start();
    let mut request = Request::greedy(prompt(20), 60);
    request.stop.ignore_eos = true;
    let first = rig.ask(request);
    let mut next = prompt(20);
    next.extend(first.tokens);
    next.extend([1, 2, 3]);
    let second = rig.ask(Request::greedy(next, 1));
    assert_eq!(second.usage.cached_tokens, 64);
    rig.settle();
}

#[test]
fn a_prompt_that_is_cached_whole_computes_its_last_block() {
    for len in [32, 33, 64, 96] {
        let rig = Plan::default().start();
        let mut request = Request::greedy(prompt(len), 40);
        request.stop.ignore_eos = true;
        let cold = rig.ask(request.clone());
        let warm = rig.ask(request);
        assert_eq!(warm.tokens, cold.tokens);
        assert_eq!(warm.usage.cached_tokens, (len - 1) / 32 * 32);
        rig.settle();
    }
}
