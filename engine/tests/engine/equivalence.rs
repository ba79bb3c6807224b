//! A request's answer is the same alone and in company, cold and warm, chunked and whole, preempted or not.

use std::sync::Mutex;
use std::time::Duration;

use cupola_engine::{EngineConfig, FinishReason, Request, SamplingParams};

use crate::fake::VOCAB;
use crate::support::{Answer, Dice, Plan, greedy_answer};

/// Requests of every kind, greedy and sampled.
fn requests(count: usize, seed: u64) -> Vec<Request> {
    let mut dice = Dice(seed);
    (0..count)
        .map(|i| {
            let mut request = Request::greedy(dice.prompt(90), 1 + dice.below(60));
            match i % 4 {
                0 | 1 => {}
                2 => request.sampling = SamplingParams { seed: Some(i as u64), top_p: 0.9, ..Default::default() },
                _ => {
                    let frequency_penalty = 0.3;
                    request.sampling =
                        SamplingParams { seed: Some(7), top_k: 20, frequency_penalty, ..Default::default() };
                    request.logprobs = Some(2);
                    request.stop.min_tokens = dice.below(2);
                }
            }
            request.stop.strings = vec!["qu".into(), "the".into()];
            request.stop.ignore_eos = i % 5 == 0;
            request
        })
        .collect()
}

/// What each request gets from an engine that it has for itself, without a prefix cache.
fn alone(requests: &[Request]) -> Vec<Answer> {
    let config = EngineConfig { enable_prefix_caching: false, max_num_seqs: 1, ..EngineConfig::default() };
    let rig = Plan { config, ..Plan::default() }.start();
    requests.iter().map(|request| rig.ask(request.clone())).collect()
}

fn same(got: &Answer, expected: &Answer) {
    let mut got = got.clone();
    // These may differ: they tell how the answer was made.
    (got.usage.cached_tokens, got.usage.preemptions) = (0, 0);
    assert_eq!(&got, expected);
}

/// Runs requests from `concurrency` clients that start at random times and leave every ninth answer early. Gives the
/// number of preemptions, and of steps that were submitted ahead.
fn crowd(plan: Plan, concurrency: usize, requests: &[Request], expected: &[Answer]) -> (u64, u64) {
    let rig = plan.start();
    let next = Mutex::new(0);
    std::thread::scope(|scope| {
        for client in 0..concurrency {
            let (rig, next) = (&rig, &next);
            scope.spawn(move || {
                let mut dice = Dice(client as u64);
                loop {
                    let i = {
                        let mut next = next.lock().expect("no client panics while it counts");
                        *next += 1;
                        *next - 1
                    };
                    let Some(request) = requests.get(i) else { return };
                    std::thread::sleep(Duration::from_micros(dice.below(1500) as u64));
                    let mut stream = rig.engine.submit_now(request.clone()).expect("accepted");
                    let mut answer = Answer::default();
                    let leave_after = if i % 9 == 4 { dice.below(10) } else { usize::MAX };
                    let mut events = 0;
                    while events < leave_after {
                        let Some(event) = stream.blocking_next() else { break };
                        answer.take(event);
                        events += 1;
                    }
                    if leave_after == usize::MAX {
                        same(&answer, &expected[i]);
                    }
                    if i % 10 == 0 {
                        rig.engine.blocking_check_integrity().expect("whole");
                    }
                }
            });
        }
    });
    rig.settle();
    (rig.engine.metrics().preemptions.get(), rig.engine.metrics().steps_ahead.get())
}

#[test]
fn batched_is_alone_at_every_concurrency_and_pool_size() {
    let requests = requests(120, 1);
    let expected = alone(&requests);
    assert!(expected.iter().any(|answer| matches!(answer.end, Some((FinishReason::Stop, _)))));
    for concurrency in [1, 7, 32] {
        // 512 positions, the context length, are the smallest pool there can be.
        for (blocks, rows) in [(256, 512), (16, 512), (16, 48)] {
            let config = EngineConfig { max_num_batched_tokens: rows, ..EngineConfig::default() };
            let plan = Plan { blocks, step_time: Duration::from_micros(200), config, ..Plan::default() };
            let (preemptions, _) = crowd(plan, concurrency, &requests, &expected);
            if concurrency == 32 {
                assert_eq!(preemptions > 0, blocks == 16, "{preemptions} preemptions with {blocks} blocks");
            }
        }
    }
}

/// Greedy requests that end in every way.
fn greedy_requests(count: usize, seed: u64) -> Vec<Request> {
    let mut dice = Dice(seed);
    let one = |i: usize| {
        let longest = 1 + dice.below(60);
        let mut request = Request::greedy(dice.prompt(90), longest);
        match i % 4 {
            0 => request.stop.strings = vec!["qu".into(), "the".into(), "a".into()],
            1 => request.stop.token_ids = (0..4).map(|_| dice.below(VOCAB) as u32).collect(),
            2 => request.stop.ignore_eos = true,
            _ => request.stop.min_tokens = dice.below(longest),
        }
        request
    };
    (0..count).map(one).collect()
}

#[test]
fn answers_are_the_same_with_steps_submitted_ahead_and_without() {
    let requests = greedy_requests(150, 11);
    let expected = alone(&requests);
    let ends = |which: fn(&Answer) -> bool| expected.iter().filter(|answer| which(answer)).count();
    assert!(ends(|answer| matches!(answer.end, Some((FinishReason::Stop, None)))) > 10, "the model's own end");
    assert!(ends(|answer| matches!(answer.end, Some((FinishReason::Stop, Some(_))))) > 10, "stop tokens and texts");
    assert!(ends(|answer| matches!(answer.end, Some((FinishReason::Length, _)))) > 10, "lengths");
    for async_scheduling in [true, false] {
        let mut all = 0;
        for concurrency in [1, 3, 24] {
            // The smallest pool there can be, and slots that newcomers wait for.
            for (blocks, max_num_seqs) in [(256, 256), (16, 256), (256, 4), (20, 8)] {
                let config = EngineConfig { async_scheduling, max_num_seqs, ..EngineConfig::default() };
                let plan = Plan { blocks, step_time: Duration::from_micros(100), config, ..Plan::default() };
                let (preemptions, ahead) = crowd(plan, concurrency, &requests, &expected);
                if (concurrency, max_num_seqs) == (24, 256) {
                    assert_eq!(preemptions > 0, blocks == 16, "{preemptions} preemptions with {blocks} blocks");
                }
                all += ahead;
                assert_eq!(ahead > 0, async_scheduling && crate::ASYNCHRONOUS);
            }
        }
        println!("{all} steps were submitted ahead");
    }
}

#[test]
fn the_reference_itself_follows_the_definition() {
    let mut dice = Dice(5);
    let rig = Plan::default().start();
    for _ in 0..20 {
        let prompt = dice.prompt(100);
        let answer = rig.ask(Request::greedy(prompt.clone(), 40));
        assert_eq!(answer.tokens, greedy_answer(&prompt, 40, false));
    }
    rig.settle();
}

#[test]
fn a_warm_prefix_gives_the_cold_answer() {
    let requests = requests(40, 2);
    let expected = alone(&requests);
    let rig = Plan::default().start();
    for round in 0..2 {
        for (request, expected) in requests.iter().zip(&expected) {
            same(&rig.ask(request.clone()), expected);
        }
        assert!(rig.engine.metrics().prefix_hits.get() > 500, "round {round} reused prefixes");
    }
    rig.settle();
}

#[test]
fn a_chunked_prompt_gives_the_whole_ones_answer() {
    let requests = requests(30, 3);
    let expected = alone(&requests);
    for rows in [1, 2, 7, 31, 32, 33] {
        let config = EngineConfig { max_num_batched_tokens: rows, ..EngineConfig::default() };
        let rig = Plan { config, ..Plan::default() }.start();
        for (request, expected) in requests.iter().zip(&expected) {
            same(&rig.ask(request.clone()), expected);
        }
        rig.settle();
    }
}

#[test]
fn sampling_reaches_many_tokens_and_seeds_are_drawn() {
    let rig = Plan::default().start();
    let mut request = Request::greedy(vec![1, 2, 3], 1);
    request.sampling.temperature = 2.0;
    let mut counts = [0; VOCAB];
    (0..300).for_each(|_| counts[rig.ask(request.clone()).tokens[0] as usize] += 1);
    assert!(counts.iter().filter(|count| **count > 0).count() > 30, "{counts:?}");
}

#[test]
fn every_token_draws_its_own_number() {
    let rig = Plan::default().start();
    let mut request = Request::greedy(vec![1, 2, 3], 60);
    // Two tokens share all of the probability, about evenly, whatever came before.
    request.sampling.logit_bias = vec![(4, 1e6), (5, 1e6)];
    request.sampling.temperature = 100.0;
    let tokens = rig.ask(request).tokens;
    let fours = tokens.iter().filter(|token| **token == 4).count();
    assert!((10..50).contains(&fours), "{tokens:?}");
    assert_eq!(tokens.iter().filter(|token| **token == 5).count(), 60 - fours);
}
