//! Means, deviations and percentiles, defined as NumPy defines them so that figures compare with other tools.

/// Arithmetic mean; 0 for no values.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Standard deviation of a whole population (divides by `n`); 0 for no values. Serving reports use this one.
pub fn population_std(values: &[f64]) -> f64 {
    spread(values, values.len())
}

/// Standard deviation of a sample (divides by `n - 1`); 0 below two values. Kernel tables use this one.
pub fn sample_std(values: &[f64]) -> f64 {
    spread(values, values.len().saturating_sub(1))
}

fn spread(values: &[f64], divisor: usize) -> f64 {
    if divisor == 0 {
        return 0.0;
    }
    let centre = mean(values);
    (values.iter().map(|v| (v - centre) * (v - centre)).sum::<f64>() / divisor as f64).sqrt()
}

/// Values in ascending order, for many percentiles of one series.
#[derive(Clone, Debug, Default)]
pub struct Sorted(Vec<f64>);

impl Sorted {
    /// Sorts a copy of `values`.
    pub fn new(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        Self(sorted)
    }

    /// The `p`-th percentile, `0 <= p <= 100`, linear between the two nearest ranks; 0 for no values.
    pub fn percentile(&self, p: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return 0.0 };
        let rank = p.clamp(0.0, 100.0) / 100.0 * last as f64;
        let below = rank.floor() as usize;
        let above = (below + 1).min(last);
        self.0[below] + (self.0[above] - self.0[below]) * (rank - below as f64)
    }

    /// The middle value.
    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_values_give_zero_and_not_nan() {
        assert_eq!(mean(&[]), 0.0);
        assert_eq!(population_std(&[]), 0.0);
        assert_eq!(sample_std(&[3.0]), 0.0);
        assert_eq!(Sorted::new(&[]).percentile(99.0), 0.0);
    }

    #[test]
    fn deviations_divide_by_n_and_by_n_minus_one() {
        let values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0];
        assert_eq!(mean(&values), 5.0);
        assert_eq!(population_std(&values), 2.0);
        assert!((sample_std(&values) - 2.138_089_935).abs() < 1e-8);
    }

    #[test]
    fn percentiles_are_linear_between_ranks() {
        let sorted = Sorted::new(&[40.0, 10.0, 30.0, 20.0]);
        assert_eq!(sorted.percentile(0.0), 10.0);
        assert_eq!(sorted.median(), 25.0);
        assert_eq!(sorted.percentile(75.0), 32.5);
        assert!((sorted.percentile(99.0) - 39.7).abs() < 1e-9);
        assert_eq!(sorted.percentile(100.0), 40.0);
        assert_eq!(sorted.percentile(250.0), 40.0);
    }
}
