//! Temperature, `top_k`, `top_p` and `min_p`, without sorting the vocabulary.
//!
//! ```text
//!   logits ──top_k──> the k largest ───────────────┐
//!          ──top_p──> weights ──> the heaviest ────┼──> candidates ──top_p, min_p──> draw
//!          ──min_p──> all within a distance ───────┘
//!          ──none───> weights ───────────────────────────────────────────────────> draw
//! ```
//!
//! Candidates are gathered with a threshold that is lowered until it lets enough through; for the peaked distributions
//! of language models that is a few hundred of many thousand. Only they are ordered, and only around the cut.

use std::cmp::Ordering;

use super::math;
use crate::request::SamplingParams;

/// A token that may be drawn. `value` is first its logit, then its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    value: f32,
    token: u32,
}

/// Memory reused from row to row.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    candidates: Vec<Candidate>,
    sums: Vec<f64>,
}

/// Distances from the largest logit tried in turn when looking for the `top_k`.
const LOGIT_DISTANCES: [f32; 10] = [2.0, 3.0, 4.5, 6.5, 9.0, 12.0, 16.0, 24.0, 40.0, f32::INFINITY];
/// Weights, relative to the largest, tried in turn when looking for the `top_p`.
const WEIGHT_FLOORS: [f32; 6] = [0.1, 0.01, 1e-3, 1e-4, 1e-6, 0.0];
/// Candidates that are put in order for the draw; more go back to their places in the row, which takes a pass over it.
const ORDERED: usize = 1024;
/// Candidates that are sorted outright rather than cut in half once more.
const SORTED: usize = 32;

/// Draws a token; `uniform` is a random number in `0..1`. The logits may be overwritten.
pub(super) fn draw(
    logits: &mut [f32],
    params: &SamplingParams,
    uniform: f64,
    buffers: &mut Buffers,
) -> Result<u32, &'static str> {
    let largest = math::largest(logits)?;
    let factor = 1.0 / params.temperature;
    let Buffers { candidates, sums } = buffers;
    candidates.clear();
    let top_k = params.top_k as usize;
    if (1..logits.len()).contains(&top_k) {
        gather_top_k(logits, largest, top_k, candidates);
        candidates.iter_mut().for_each(|c| c.value = ((c.value - largest) * factor).exp());
        if params.top_p < 1.0 {
            let total = mass(candidates);
            keep_top_p(candidates, f64::from(params.top_p) * total);
        }
    } else if params.top_p < 1.0 {
        math::weigh(logits, largest, factor, sums);
        let target = f64::from(params.top_p) * sums.iter().sum::<f64>();
        gather_mass(logits, target, candidates);
        keep_top_p(candidates, target);
    } else if params.min_p > 0.0 {
        let threshold = largest + params.min_p.ln() * params.temperature;
        let take = |i: usize, logit: f32| candidates.push(candidate(i, ((logit - largest) * factor).exp()));
        math::at_least(logits, threshold.min(largest), take);
    } else {
        math::weigh(logits, largest, factor, sums);
        let point = uniform * sums.iter().sum::<f64>();
        return Ok(token(math::pick(logits, sums, point)));
    }
    // The most likely token weighs 1, so a share of its probability is a weight.
    if params.min_p > 0.0 {
        candidates.retain(|c| c.value >= params.min_p);
    }
    // The draw is in the order of tokens, however they were found, as on a device too.
    if candidates.len() > ORDERED {
        logits.fill(0.0);
        candidates.iter().for_each(|c| logits[c.token as usize] = c.value);
        math::add_up(logits, sums);
        return Ok(token(math::pick(logits, sums, uniform * sums.iter().sum::<f64>())));
    }
    candidates.sort_unstable_by_key(|c| c.token);
    let mut point = uniform * mass(candidates);
    let drawn = candidates.iter().find(|c| {
        point -= f64::from(c.value);
        point < 0.0
    });
    // Rounding can let the point fall behind the last candidate.
    let drawn = drawn.or(candidates.last()).expect("the most likely token passes every filter");
    Ok(drawn.token)
}

fn token(index: usize) -> u32 {
    u32::try_from(index).expect("token ids are below 2^32")
}

fn candidate(index: usize, value: f32) -> Candidate {
    Candidate { value, token: token(index) }
}

/// Heavier first, then by token, so that ties are cut the same way every time.
fn heavier(a: &Candidate, b: &Candidate) -> Ordering {
    b.value.total_cmp(&a.value).then(a.token.cmp(&b.token))
}

fn mass(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.value)).sum()
}

fn gather_top_k(logits: &[f32], largest: f32, k: usize, candidates: &mut Vec<Candidate>) {
    for distance in LOGIT_DISTANCES {
        candidates.clear();
        math::at_least(logits, largest - distance, |i, logit| candidates.push(candidate(i, logit)));
        if candidates.len() >= k {
            break;
        }
    }
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, heavier);
        candidates.truncate(k);
    }
}

/// Gathers the heaviest tokens until together they weigh at least `target`.
fn gather_mass(weights: &[f32], target: f64, candidates: &mut Vec<Candidate>) {
    for floor in WEIGHT_FLOORS {
        candidates.clear();
        let mut gathered = 0.0;
        math::at_least(weights, floor, |i, weight| {
            gathered += f64::from(weight);
            candidates.push(candidate(i, weight));
        });
        if gathered >= target {
            break;
        }
    }
}

/// Keeps the fewest heaviest candidates that together weigh at least `target`, by halving:
///
/// ```text
///   [ kept: weighs less than target | low .. middle .. high: the cut is in here | dropped ]
/// ```
fn keep_top_p(candidates: &mut Vec<Candidate>, mut target: f64) {
    let (mut low, mut high) = (0, candidates.len());
    while high - low > SORTED {
        let middle = (high - low) / 2;
        candidates[low..high].select_nth_unstable_by(middle, heavier);
        let heaviest = mass(&candidates[low..low + middle]);
        if heaviest >= target {
            high = low + middle;
        } else {
            target -= heaviest;
            low += middle;
        }
    }
    candidates[low..high].sort_unstable_by(heavier);
    let mut end = low;
    while end < high && (target > 0.0 || end == 0) {
        target -= f64::from(candidates[end].value);
        end += 1;
    }
    candidates.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peaked(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % n) as f32 * 12.0 / n as f32).collect()
    }

    /// The tokens that the definitions leave, from a full sort.
    fn by_definition(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut all: Vec<Candidate> =
            logits.iter().enumerate().map(|(i, l)| candidate(i, ((l - largest) / params.temperature).exp())).collect();
        all.sort_by(heavier);
        if params.top_k > 0 {
            all.truncate(params.top_k as usize);
        }
        let target = f64::from(params.top_p) * mass(&all);
        let mut sum = 0.0;
        all.retain(|c| {
            let keep = params.top_p >= 1.0 || sum < target;
            sum += f64::from(c.value);
            keep
        });
        all.retain(|c| c.value >= params.min_p);
        let mut tokens: Vec<u32> = all.iter().map(|c| c.token).collect();
        tokens.sort_unstable();
        tokens
    }

    fn reachable(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
        let mut buffers = Buffers::default();
        let steps = 8_000;
        let mut seen: Vec<u32> = (0..steps)
            .map(|i| {
                let uniform = (f64::from(i) + 0.5) / f64::from(steps);
                draw(&mut logits.to_vec(), params, uniform, &mut buffers).expect("finite")
            })
            .collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn every_filter_leaves_what_its_definition_says() {
        let logits = peaked(150);
        let default = SamplingParams::default();
        let cases = [
            SamplingParams { top_k: 7, ..default.clone() },
            SamplingParams { top_k: 1, ..default.clone() },
            SamplingParams { top_p: 0.5, ..default.clone() },
            SamplingParams { top_p: 0.95, temperature: 0.5, ..default.clone() },
            SamplingParams { top_p: 1e-6, ..default.clone() },
            SamplingParams { min_p: 0.3, ..default.clone() },
            SamplingParams { min_p: 1.0, temperature: 0.7, ..default.clone() },
            SamplingParams { top_k: 40, top_p: 0.8, min_p: 0.2, temperature: 1.7, ..default.clone() },
            SamplingParams { top_p: 0.9, min_p: 0.4, ..default.clone() },
            SamplingParams { temperature: 3.0, ..default },
        ];
        for params in cases {
            assert_eq!(reachable(&logits, &params), by_definition(&logits, &params), "{params:?}");
        }
    }

    #[test]
    fn many_candidates_are_drawn_in_the_order_of_tokens_like_few() {
        let logits: Vec<f32> = (0..6000).map(|i| ((i * 37) % 101) as f32 / 40.0).collect();
        let mut buffers = Buffers::default();
        for top_k in [ORDERED as u32 - 1, ORDERED as u32 + 1, 4000] {
            for top_p in [1.0, 0.9] {
                let params = SamplingParams { top_k, top_p, ..SamplingParams::default() };
                let kept = by_definition(&logits, &params);
                let weights: Vec<f64> = kept.iter().map(|token| f64::from(logits[*token as usize]).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..50 {
                    // In the middle of a token, so that rounding does not matter.
                    let at = i * kept.len() / 50;
                    let before: f64 = weights[..at].iter().sum();
                    let uniform = (before + weights[at] / 2.0) / total;
                    let drawn = draw(&mut logits.clone(), &params, uniform, &mut buffers).expect("finite");
                    assert_eq!(drawn, kept[at], "{top_k} {top_p}");
                }
            }
        }
    }

    #[test]
    fn a_flat_row_works_too() {
        let mut buffers = Buffers::default();
        for params in [
            SamplingParams { top_p: 0.9, ..SamplingParams::default() },
            SamplingParams { top_k: 5, ..SamplingParams::default() },
        ] {
            let drawn = draw(&mut [0.5; 1000], &params, 0.999, &mut buffers).expect("finite");
            let last = if params.top_k > 0 { 4 } else { 899 };
            assert!(drawn <= last, "ties are cut by token: {drawn}");
        }
    }

    #[test]
    fn shares_follow_the_softmax() {
        let logits = [1.0f32, 0.0, -1.0, 2.0];
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let params = SamplingParams::default();
        let mut buffers = Buffers::default();
        let draws = 100_000;
        let mut counts = [0u32; 4];
        for i in 0..draws {
            let uniform = crate::sampler::random::uniform(42, i);
            counts[draw(&mut logits.clone(), &params, uniform, &mut buffers).expect("finite") as usize] += 1;
        }
        for (count, logit) in counts.iter().zip(logits) {
            let (expected, got) = (f64::from(logit).exp() / total, f64::from(*count) / draws as f64);
            assert!((expected - got).abs() < 0.006, "{counts:?}");
        }
    }
}
