//! Log-probabilities of a position, from the logits as the model gave them.

use super::math;
use crate::request::TokenLogprobs;

/// Describes `token` and the `top` most likely tokens of a row.
pub(super) fn describe(logits: &[f32], token: u32, top: usize) -> Result<TokenLogprobs, &'static str> {
    let largest = math::largest(logits)?;
    let total = math::log_sum_exp(logits, largest);
    let logprob = |logit: f32| (f64::from(logit) - total) as f32;
    let own = logits[token as usize];
    let above = math::count(logits, |logit| logit > own);
    let best = best(logits, top).into_iter().map(|(logit, token)| (token, logprob(logit))).collect();
    Ok(TokenLogprobs { token, logprob: logprob(own), rank: above + 1, top: best })
}

/// The `n` largest logits with their tokens, largest first, lower tokens first among equals.
fn best(logits: &[f32], n: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(n + 1);
    if n == 0 {
        return best;
    }
    for (run, first) in logits.chunks(math::LANES).zip((0..).step_by(math::LANES)) {
        let worst = if best.len() < n { None } else { best.last().map(|(logit, _)| *logit) };
        if worst.is_some_and(|worst| math::count(run, |logit| logit > worst) == 0) {
            continue;
        }
        for (logit, token) in run.iter().zip(first..) {
            let place = best.partition_point(|(other, _)| other >= logit);
            best.insert(place, (*logit, token));
            best.truncate(n);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_in_order_and_probabilities_add_up() {
        let logits = [0.0, 3.0, 1.0, 3.0, -f32::INFINITY];
        let described = describe(&logits, 2, 9).expect("finite");
        assert_eq!(described.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 2, 0, 4]);
        assert_eq!((described.token, described.rank), (2, 3));
        let total: f32 = described.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(described.top[2].1, described.logprob);
        assert_eq!(describe(&logits, 0, 0).expect("finite").top, []);
    }
}
