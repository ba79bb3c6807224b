//! What an operator may set about the engine, with defaults that start small.

use std::path::PathBuf;

use cupola_kernels::KvType;

use crate::Error;

/// Limits of one engine. `Default` suits a CPU.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Most requests that run at once.
    pub max_num_seqs: usize,
    /// Most rows (tokens) of one step. When smaller than `max_num_seqs` it bounds the running requests too, so that a
    /// step always has a row for each of them.
    pub max_num_batched_tokens: usize,
    /// Longest prompt plus answer, in tokens; absent: what the model was trained for, or less when memory is short.
    pub max_model_len: Option<usize>,
    /// Bytes of the key/value pool; absent: see [`crate::plan`].
    pub kv_cache_bytes: Option<u64>,
    /// Share of a device's memory that may be in use, by this engine and by others, from above 0 to 1. Does not concern the
    /// CPU.
    pub gpu_memory_utilization: f64,
    /// What keys and values are stored as.
    pub kv_cache_type: KvType,
    /// Most requests that wait, in the queue or before it with a [`crate::Permit`].
    pub max_queued_requests: usize,
    /// Most prompt tokens that wait; a single request is let through whatever its length.
    pub max_queued_tokens: usize,
    /// Reuse keys and values of equal prompt beginnings.
    pub enable_prefix_caching: bool,
    /// Submit every op of a step on a device by itself, instead of recording small decoding steps once as graphs.
    pub enforce_eager: bool,
    /// Let a device carry tokens from one decoding step to the next, which is submitted before the host has read them.
    pub async_scheduling: bool,
    /// Folder of packed weights: a model that was packed before is mapped from there, one that was not is kept there.
    pub packed_cache: Option<PathBuf>,
    /// Events kept apart for a reader that is slow; past this many, tokens are merged into the last event.
    pub event_capacity: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 256,
            max_num_batched_tokens: 512,
            max_model_len: None,
            kv_cache_bytes: None,
            gpu_memory_utilization: 0.9,
            kv_cache_type: KvType::default(),
            max_queued_requests: 4 * 256,
            max_queued_tokens: 1 << 18,
            enable_prefix_caching: true,
            enforce_eager: false,
            async_scheduling: true,
            packed_cache: None,
            event_capacity: 64,
        }
    }
}

impl EngineConfig {
    /// Checks every field once, at the edge.
    ///
    /// # Errors
    /// [`Error::Config`] names the first field that cannot work.
    pub fn validate(&self) -> Result<(), Error> {
        let at_least_one = [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_queued_requests", self.max_queued_requests),
            ("max_queued_tokens", self.max_queued_tokens),
            ("event_capacity", self.event_capacity),
        ];
        for (field, got) in at_least_one {
            if got == 0 {
                return Err(Error::Config { field, expected: "at least 1".into(), got: "0".into() });
            }
        }
        if u32::try_from(self.max_num_batched_tokens).is_err() {
            return Err(Error::Config {
                field: "max_num_batched_tokens",
                expected: format!("at most {}", u32::MAX),
                got: self.max_num_batched_tokens.to_string(),
            });
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            return Err(Error::Config {
                field: "gpu_memory_utilization",
                expected: "above 0 and at most 1".into(),
                got: self.gpu_memory_utilization.to_string(),
            });
        }
        match self.max_model_len {
            Some(got) if got < 2 => Err(Error::Config {
                field: "max_model_len",
                expected: "at least 2, one token of prompt and one of answer".into(),
                got: got.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Requests that may run at once: `max_num_seqs`, bounded by the rows of a step.
    pub fn running_limit(&self) -> usize {
        self.max_num_seqs.min(self.max_num_batched_tokens)
    }
}
