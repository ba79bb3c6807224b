//! Random numbers by counting: the number for a token depends on the request's seed and the token's index alone, so
//! that neither batch, preemption nor order of steps can change it.

/// A number in `0..1` with 53 random bits.
pub(crate) fn uniform(seed: u64, index: u64) -> f64 {
    let bits = mix(mix(seed).wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The output function of SplitMix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators,
/// <https://doi.org/10.1145/2660193.2660195>).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_even_and_seeds_differ() {
        let n = 100_000u64;
        let mut buckets = [0u32; 10];
        for i in 0..n {
            buckets[(uniform(1, i) * 10.0) as usize] += 1;
        }
        assert!(buckets.iter().all(|count| count.abs_diff(10_000) < 500), "{buckets:?}");
        let same = (0..1000).filter(|i| uniform(1, *i) == uniform(2, *i)).count();
        assert_eq!(same, 0);
    }
}
