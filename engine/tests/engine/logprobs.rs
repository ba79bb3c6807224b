//! Log-probabilities of answers and prompts against the definition.

use std::time::Duration;

use cupola_engine::{EngineConfig, Request, TokenLogprobs};

use crate::fake::logits_after;
use crate::support::{Answer, Plan, collect, greedy_answer};

fn prompt(len: usize) -> Vec<u32> {
    (0..len).map(|i| u32::try_from(i * 7 % 26).expect("a letter")).collect()
}

fn check(reported: &TokenLogprobs, context: &[u32], token: u32, top: usize) {
    let logits = logits_after(context);
    let total = logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
    let expected = f64::from(logits[token as usize]) - total;
    assert_eq!(reported.token, token);
    assert!((f64::from(reported.logprob) - expected).abs() < 1e-5, "{reported:?}, expected {expected}");
    assert_eq!(reported.rank as usize, 1 + logits.iter().filter(|l| **l > logits[token as usize]).count());
    assert_eq!(reported.top.len(), top);
    assert!(reported.top.is_sorted_by(|a, b| a.1 >= b.1));
    if reported.rank as usize <= top {
        assert!(reported.top.contains(&(token, reported.logprob)));
    }
}

fn check_prompt(answer: &Answer, prompt: &[u32], top: usize) {
    let reported = answer.prompt.as_ref().expect("asked for");
    assert_eq!((reported.len(), reported[0].as_ref()), (prompt.len(), None));
    for i in 1..prompt.len() {
        check(reported[i].as_ref().expect("all but the first"), &prompt[..i], prompt[i], top);
    }
}

#[test]
fn answers_report_every_token() {
    let rig = Plan::default().start();
    let mut request = Request::greedy(prompt(40), 20);
    request.logprobs = Some(3);
    request.stop.ignore_eos = true;
    let answer = rig.ask(request);
    assert_eq!(answer.tokens, greedy_answer(&prompt(40), 20, true), "asking does not change the answer");
    let mut context = prompt(40);
    for (token, reported) in answer.tokens.iter().zip(&answer.logprobs) {
        check(reported, &context, *token, 3);
        context.push(*token);
    }
    assert_eq!(answer.logprobs.len(), 20);
    rig.settle();
}

#[test]
fn prompts_report_every_token_but_the_first() {
    let rig = Plan::default().start();
    for len in [1, 2, 33, 150] {
        for max_tokens in [0, 3] {
            let mut request = Request::greedy(prompt(len), max_tokens);
            request.prompt_logprobs = Some(2);
            let answer = rig.ask(request);
            check_prompt(&answer, &prompt(len), 2);
            assert_eq!(answer.tokens, greedy_answer(&prompt(len), max_tokens, false));
        }
    }
    rig.settle();
}

#[test]
fn scored_prompts_go_in_chunks_side_by_side() {
    let config = EngineConfig { max_num_batched_tokens: 32, max_num_seqs: 5, ..EngineConfig::default() };
    let rig = Plan { config, step_time: Duration::from_micros(100), ..Plan::default() }.start();
    let scored: Vec<_> = (0..5)
        .map(|i| {
            let mut request = Request::greedy(prompt(60 + i), 5);
            request.prompt_logprobs = Some(1);
            rig.engine.submit_now(request).expect("accepted")
        })
        .collect();
    for (i, stream) in scored.into_iter().enumerate() {
        check_prompt(&collect(stream), &prompt(60 + i), 1);
    }
    rig.settle();
}

#[test]
fn preemption_scores_no_row_twice() {
    let config = EngineConfig { max_num_seqs: 8, ..EngineConfig::default() };
    let rig = Plan { blocks: 6, max_model_len: 192, config, ..Plan::default() }.start();
    let streams: Vec<_> = (0..8)
        .map(|i| {
            let mut request = Request::greedy(prompt(50 + i), 60);
            request.stop.ignore_eos = true;
            request.prompt_logprobs = (i % 2 == 0).then_some(1);
            request.logprobs = Some(0);
            rig.engine.submit_now(request).expect("accepted")
        })
        .collect();
    for (i, stream) in streams.into_iter().enumerate() {
        let answer = collect(stream);
        assert_eq!(answer.tokens, greedy_answer(&prompt(50 + i), 60, true));
        assert_eq!(answer.logprobs.len(), 60);
        if i % 2 == 0 {
            check_prompt(&answer, &prompt(50 + i), 1);
        }
    }
    assert!(rig.engine.metrics().preemptions.get() > 0);
    rig.settle();
}
