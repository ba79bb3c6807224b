//! Passes over a whole row of logits, written so that the compiler makes vectors of them on any CPU.

use cupola_kernels::NoToken;

/// Values handled side by side; a multiple of every vector width.
pub(super) const LANES: usize = 16;
/// Values summed in f32 before the sum goes on in f64.
const RUN: usize = 1024;

/// The largest logit, or the reason why there is none to sample from.
pub(super) fn largest(logits: &[f32]) -> Result<f32, &'static str> {
    let mut best = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    let mut see = |lane: usize, x: f32| {
        best[lane] = if x > best[lane] { x } else { best[lane] };
        bad[lane] |= u32::from(x.is_nan());
    };
    for chunk in chunks {
        (0..LANES).for_each(|lane| see(lane, chunk[lane]));
    }
    rest.iter().for_each(|x| see(0, *x));
    if bad.iter().any(|bad| *bad != 0) {
        return Err(NoToken::NotANumber.message());
    }
    match best.into_iter().fold(f32::NEG_INFINITY, f32::max) {
        f32::INFINITY => Err(NoToken::Infinite.message()),
        f32::NEG_INFINITY => Err(NoToken::Excluded.message()),
        best => Ok(best),
    }
}

/// Index of the largest logit, the lowest among equals.
pub(super) fn argmax(logits: &[f32]) -> Result<u32, &'static str> {
    let best = largest(logits)?;
    let run = logits.chunks(LANES).position(|run| count(run, |x| x >= best) > 0).expect("the largest is one of them");
    let lane = logits[run * LANES..].iter().position(|x| *x >= best).expect("it is in this run");
    Ok(u32::try_from(run * LANES + lane).expect("token ids are below 2^32"))
}

/// `e^x` for `x <= 0`, to about 1e-7 of its value, and at most 1e-37 below -87. Cody and Waite's reduction to
/// `2^n * e^r`, `|r| <= ln(2) / 2`, and a polynomial with the coefficients of the Cephes library's `expf`.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    (p * r * r + r + 1.0) * power
}

/// Replaces every logit by `e^((logit - largest) * factor)` and gives the sum of each run of [`RUN`] values.
pub(super) fn weigh(logits: &mut [f32], largest: f32, factor: f32, sums: &mut Vec<f64>) {
    sums.clear();
    for run in logits.chunks_mut(RUN) {
        for x in run.iter_mut() {
            *x = exp((*x - largest) * factor);
        }
        sums.push(sum(run));
    }
}

/// Gives the sum of each run of [`RUN`] values.
pub(super) fn add_up(values: &[f32], sums: &mut Vec<f64>) {
    sums.clear();
    sums.extend(values.chunks(RUN).map(sum));
}

/// Which value a point in `0..sum` falls on, when the values are laid end to end.
pub(super) fn pick(weights: &[f32], sums: &[f64], mut point: f64) -> usize {
    for (i, (run, sum)) in weights.chunks(RUN).zip(sums).enumerate() {
        if point >= *sum {
            point -= sum;
            continue;
        }
        for (j, weight) in run.iter().enumerate() {
            point -= f64::from(*weight);
            if point < 0.0 {
                return i * RUN + j;
            }
        }
    }
    // Rounding let the point fall behind the last value.
    weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0)
}

/// `ln(sum of e^logit)`.
pub(super) fn log_sum_exp(logits: &[f32], largest: f32) -> f64 {
    let mut total = 0.0;
    let mut weights = [0.0; RUN];
    for run in logits.chunks(RUN) {
        let weights = &mut weights[..run.len()];
        for (weight, x) in weights.iter_mut().zip(run) {
            *weight = exp(*x - largest);
        }
        total += sum(weights);
    }
    f64::from(largest) + total.ln()
}

/// Sum of at most [`RUN`] values.
fn sum(run: &[f32]) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let chunks = run.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>() + f64::from(rest)
}

/// How many values are so. No early exit: it must stay a vector compare.
pub(super) fn count(values: &[f32], is: impl Fn(f32) -> bool) -> u32 {
    values.iter().map(|x| u32::from(is(*x))).sum()
}

/// Calls `take` for every value of at least `threshold`; a vector's worth at a time is skipped when none is.
pub(super) fn at_least(values: &[f32], threshold: f32, mut take: impl FnMut(usize, f32)) {
    for (i, chunk) in values.chunks(LANES).enumerate() {
        if count(chunk, |x| x >= threshold) > 0 {
            for (j, x) in chunk.iter().enumerate().filter(|(_, x)| **x >= threshold) {
                take(i * LANES + j, *x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_over_its_range() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}) is off by {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(-1e30) < 2e-38);
    }

    #[test]
    fn log_sum_exp_agrees_with_f64() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 37) % 211) as f32 / 9.0 - 12.0).collect();
        let exact = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        let largest = largest(&logits).expect("finite");
        assert!((log_sum_exp(&logits, largest) - exact).abs() < 1e-6);
    }

    #[test]
    fn what_cannot_be_sampled_is_named() {
        assert!(largest(&[0.0, f32::NAN, 1.0]).expect_err("NaN").contains("not a number"));
        assert!(largest(&[0.0; 40].map(|_| f32::NEG_INFINITY)).expect_err("none").contains("excluded"));
        assert!(largest(&[f32::INFINITY]).expect_err("inf").contains("infinite"));
        assert_eq!(argmax(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), Ok(1));
    }

    #[test]
    fn pick_lays_values_end_to_end() {
        let weights: Vec<f32> = (0..3000).map(|i| (i % 3) as f32).collect();
        let sums: Vec<f64> = weights.chunks(RUN).map(sum).collect();
        assert_eq!(pick(&weights, &sums, 0.0), 1);
        assert_eq!(pick(&weights, &sums, 0.99), 1);
        assert_eq!(pick(&weights, &sums, 1.0), 2);
        assert_eq!(pick(&weights, &sums, 3.0), 4);
        assert_eq!(pick(&weights, &sums, 2999.5), 2999);
        assert_eq!(pick(&weights, &sums, 1e9), 2999);
    }
}
