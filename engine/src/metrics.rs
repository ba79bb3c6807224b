//! Numbers that the engine keeps about itself, as plain atomics for others to render.
//!
//! The engine thread writes, anyone reads at any time. Nothing here has a name for the outside: the server chooses those.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Current value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn add(&self, n: usize) {
        self.0.fetch_add(n as u64, Relaxed);
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Current value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn set(&self, n: usize) {
        self.0.store(n as u64, Relaxed);
    }
}

/// A floating-point number that is set.
#[derive(Debug, Default)]
pub struct FloatGauge(AtomicU64);

impl FloatGauge {
    /// Current value.
    pub fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }

    pub(crate) fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Relaxed);
    }
}

/// Observations counted in buckets with fixed upper bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than `bounds`: the last holds what is above all of them.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0f64.to_bits()) }
    }

    pub(crate) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        self.sum.fetch_update(Relaxed, Relaxed, add).expect("the update always gives a value");
    }

    pub(crate) fn observe_duration(&self, value: Duration) {
        self.observe(value.as_secs_f64());
    }

    /// Upper bound and cumulative count of every bucket, the last with an infinite bound.
    pub fn cumulative(&self) -> Vec<(f64, u64)> {
        let mut total = 0;
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds
            .zip(&self.counts)
            .map(|(bound, count)| {
                total += count.load(Relaxed);
                (bound, total)
            })
            .collect()
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// Sum of all observations.
    pub fn sum(&self) -> f64 {
        f64::from_bits(self.sum.load(Relaxed))
    }
}

/// Seconds to the first token.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between tokens, and of a step.
const TOKEN_GAP: &[f64] = &[
    0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Seconds of a request or one of its phases. Below 0.3 s finer than the usual dashboards ask for.
const PHASE: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
    50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Token counts.
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
/// Rows of a step.
const ROWS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// Everything measured. Times are in seconds, lengths in tokens.
#[derive(Debug)]
pub struct EngineMetrics {
    /// Prompt tokens of requests whose prompt was computed, cached ones included.
    pub prompt_tokens: Counter,
    /// Tokens generated.
    pub generation_tokens: Counter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: Counter,
    /// Prompt tokens found there.
    pub prefix_hits: Counter,
    /// Rows computed in all steps; recomputation after preemption included.
    pub computed_tokens: Counter,
    /// Steps run.
    pub steps: Counter,
    /// Those that were submitted before the tokens of the step before them were known.
    pub steps_ahead: Counter,
    /// Times a request lost its blocks and had to be computed again.
    pub preemptions: Counter,
    /// Requests ended by a stop token or text.
    pub finished_stop: Counter,
    /// Requests ended by a length limit.
    pub finished_length: Counter,
    /// Requests whose caller left while they ran.
    pub cancelled_running: Counter,
    /// Requests whose caller left while they waited.
    pub cancelled_waiting: Counter,
    /// Requests that failed in the engine.
    pub failed: Counter,
    /// Requests refused because the queue was full.
    pub rejected_queue_full: Counter,
    /// Requests refused because they do not fit the context.
    pub rejected_too_long: Counter,
    /// Requests running now.
    pub running: Gauge,
    /// Requests waiting now, preempted ones included.
    pub waiting: Gauge,
    /// Blocks of the key/value pool.
    pub kv_blocks_total: Gauge,
    /// Blocks in use by running requests.
    pub kv_blocks_leased: Gauge,
    /// Blocks free but remembered by the prefix cache.
    pub kv_blocks_cached: Gauge,
    /// Prompt tokens computed a second, smoothed; 0 until measured.
    pub prefill_rate: FloatGauge,
    /// Submission to first token.
    pub time_to_first_token: Histogram,
    /// Between consecutive tokens of a request.
    pub inter_token_latency: Histogram,
    /// Submission to the end.
    pub e2e: Histogram,
    /// Submission to the first step.
    pub queue: Histogram,
    /// First step to first token.
    pub prefill: Histogram,
    /// First token to last.
    pub decode: Histogram,
    /// Mean time of an output token after the first, by request.
    pub time_per_output_token: Histogram,
    /// Prompt lengths of finished requests.
    pub request_prompt_tokens: Histogram,
    /// Answer lengths of finished requests.
    pub request_generation_tokens: Histogram,
    /// `max_tokens` of finished requests.
    pub request_max_tokens: Histogram,
    /// Rows of a step.
    pub iteration_tokens: Histogram,
    /// Duration of a step, forward pass included.
    pub step_time: Histogram,
    /// Duration of a step without the forward pass and the sampler.
    pub step_overhead: Histogram,
}

impl EngineMetrics {
    pub(crate) fn new() -> Self {
        Self {
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            computed_tokens: Counter::default(),
            steps: Counter::default(),
            steps_ahead: Counter::default(),
            preemptions: Counter::default(),
            finished_stop: Counter::default(),
            finished_length: Counter::default(),
            cancelled_running: Counter::default(),
            cancelled_waiting: Counter::default(),
            failed: Counter::default(),
            rejected_queue_full: Counter::default(),
            rejected_too_long: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            kv_blocks_total: Gauge::default(),
            kv_blocks_leased: Gauge::default(),
            kv_blocks_cached: Gauge::default(),
            prefill_rate: FloatGauge::default(),
            time_to_first_token: Histogram::new(FIRST_TOKEN),
            inter_token_latency: Histogram::new(TOKEN_GAP),
            e2e: Histogram::new(PHASE),
            queue: Histogram::new(PHASE),
            prefill: Histogram::new(PHASE),
            decode: Histogram::new(PHASE),
            time_per_output_token: Histogram::new(TOKEN_GAP),
            request_prompt_tokens: Histogram::new(TOKENS),
            request_generation_tokens: Histogram::new(TOKENS),
            request_max_tokens: Histogram::new(TOKENS),
            iteration_tokens: Histogram::new(ROWS),
            step_time: Histogram::new(TOKEN_GAP),
            step_overhead: Histogram::new(OVERHEAD),
        }
    }

    /// Share of the key/value pool in use by running requests, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        self.kv_blocks_leased.get() as f64 / self.kv_blocks_total.get().max(1) as f64
    }
}

/// Seconds of host work in a step.
const OVERHEAD: &[f64] = &[1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 0.1, 1.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_up_to_and_including_its_bounds() {
        let h = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 2.0, 9.0] {
            h.observe(value);
        }
        assert_eq!(h.cumulative(), [(1.0, 2), (2.0, 4), (f64::INFINITY, 5)]);
        assert_eq!((h.count(), h.sum()), (5, 14.0));
    }

    #[test]
    fn bounds_ascend() {
        for bounds in [FIRST_TOKEN, TOKEN_GAP, PHASE, TOKENS, ROWS, OVERHEAD] {
            assert!(bounds.is_sorted_by(|a, b| a < b), "{bounds:?}");
        }
    }
}
