//! The sampler of a request as a whole; its parts are tested where they are.

use super::*;

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

fn choose(sampler: &Sampler, index: usize, logits: &[f32]) -> u32 {
    sampler.choose(index, &mut logits.to_vec(), &Scratch::default()).expect("finite").token
}

#[test]
fn bias_and_penalties_change_the_order() {
    let logits = [1.0, 2.0, 3.0];
    let biased = Sampler::new(SamplingParams { logit_bias: vec![(0, 5.0)], ..greedy() }, &[], None, 0);
    assert_eq!(choose(&biased, 0, &logits), 0);
    let mut present = Sampler::new(SamplingParams { presence_penalty: 1.5, ..greedy() }, &[2], None, 0);
    assert_eq!(choose(&present, 0, &logits), 2, "presence looks at the answer only");
    present.accept(2);
    assert_eq!(choose(&present, 1, &logits), 1);
    let mut frequent = Sampler::new(SamplingParams { frequency_penalty: 0.6, ..greedy() }, &[], None, 0);
    frequent.accept(2);
    assert_eq!(choose(&frequent, 1, &logits), 2);
    frequent.accept(2);
    assert_eq!(choose(&frequent, 2, &logits), 1);
    let repeated = Sampler::new(SamplingParams { repetition_penalty: 2.0, ..greedy() }, &[2], None, 0);
    assert_eq!(choose(&repeated, 0, &logits), 1, "repetition looks at the prompt as well");
    assert_eq!(choose(&repeated, 0, &[-2.0, -2.5, -1.5]), 0, "a negative logit is multiplied");
}

#[test]
fn excluded_tokens_come_back() {
    let mut sampler = Sampler::new(greedy(), &[], None, 0);
    sampler.exclude(vec![2], 3);
    assert!(!sampler.is_plain(2) && sampler.is_plain(3));
    assert_eq!(choose(&sampler, 2, &[1.0, 2.0, 3.0]), 1);
    assert_eq!(choose(&sampler, 3, &[1.0, 2.0, 3.0]), 2);
}

#[test]
fn a_seed_repeats_whatever_the_order() {
    let logits: Vec<f32> = (0..500).map(|i| ((i * 31) % 97) as f32 / 20.0).collect();
    let params = SamplingParams { seed: Some(9), top_p: 0.95, ..SamplingParams::default() };
    let (a, b) = (Sampler::new(params.clone(), &[], None, 1), Sampler::new(params, &[], None, 2));
    let forward: Vec<u32> = (0..50).map(|i| choose(&a, i, &logits)).collect();
    let backward: Vec<u32> = (0..50).rev().map(|i| choose(&b, i, &logits)).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    let drawn = Sampler::new(SamplingParams { top_p: 0.95, ..SamplingParams::default() }, &[], None, 1);
    assert_ne!(forward, (0..50).map(|i| choose(&drawn, i, &logits)).collect::<Vec<_>>());
}

#[test]
fn log_probabilities_ignore_bias_and_temperature() {
    let logits = vec![1.0, 2.0, 3.0];
    let params = SamplingParams { logit_bias: vec![(0, 100.0)], temperature: 0.5, ..SamplingParams::default() };
    let sampler = Sampler::new(params, &[], Some(2), 0);
    let choice = sampler.choose(0, &mut logits.clone(), &Scratch::default()).expect("finite");
    let reported = choice.logprobs.expect("asked for");
    assert_eq!((choice.token, reported.token, reported.rank), (0, 0, 3));
    assert_eq!(reported, score(&logits, 0, 2).expect("finite"));
    assert!((reported.logprob - (1.0 - 3.407_606)).abs() < 1e-5);
}

#[test]
fn a_row_that_is_not_a_number_is_refused() {
    let sampler = Sampler::new(SamplingParams::default(), &[], None, 0);
    assert!(sampler.choose(0, &mut [1.0, f32::NAN], &Scratch::default()).is_err());
    let mut all = Sampler::new(greedy(), &[], None, 0);
    all.exclude(vec![0, 1], 1);
    assert!(all.choose(0, &mut [1.0, 2.0], &Scratch::default()).is_err());
}
