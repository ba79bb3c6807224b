//! Seeded random numbers for workloads: the same seed gives the same prompts and arrivals on every machine.

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014,
/// <https://doi.org/10.1145/2714064.2660195>). Small and good enough for workloads; not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that depends on `seed` and `stream` alone; different streams of one seed are unrelated.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self(mixed.next_u64())
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number is below 0");
        // The high half of a 128-bit product is uniform up to 2^-64 * n, far below what a workload could show.
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in the open interval `(0, 1)`.
    pub fn open_unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.open_unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.open_unit()).cos()
    }

    /// Gamma-distributed with this shape and scale; shape 1 is the exponential distribution. Marsaglia and Tsang, "A
    /// simple method for generating gamma variables", 2000, <https://doi.org/10.1145/358407.358414>.
    pub fn gamma(&mut self, shape: f64, scale: f64) -> f64 {
        if shape < 1.0 {
            // Boosting: Gamma(a) = Gamma(a + 1) * U^(1/a).
            let boost = self.open_unit().powf(1.0 / shape);
            return self.gamma(shape + 1.0, scale) * boost;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.open_unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v * scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::{mean, population_std};
    use super::*;

    #[test]
    fn a_seed_repeats_and_streams_differ() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.next_u64(), random.next_u64()]
        };
        assert_eq!(draw(7, 1), draw(7, 1));
        assert_ne!(draw(7, 1), draw(7, 2));
        assert_ne!(draw(7, 1), draw(8, 1));
    }

    #[test]
    fn below_reaches_every_number_and_no_other() {
        let mut random = Random::new(1, 0);
        let mut seen = [0usize; 7];
        for _ in 0..7_000 {
            seen[random.below(7)] += 1;
        }
        assert!(seen.iter().all(|&n| (800..1200).contains(&n)), "{seen:?}");
    }

    #[test]
    fn gamma_has_the_mean_and_deviation_of_its_shape() {
        for shape in [0.5, 1.0, 4.0] {
            let mut random = Random::new(3, 0);
            let values: Vec<f64> = (0..40_000).map(|_| random.gamma(shape, 2.0)).collect();
            assert!((mean(&values) / (2.0 * shape) - 1.0).abs() < 0.03, "shape {shape}: mean {}", mean(&values));
            let std = population_std(&values);
            assert!((std / (2.0 * shape.sqrt()) - 1.0).abs() < 0.04, "shape {shape}: deviation {std}");
        }
    }
}
