//! Where the memory goes, decided before anything is allocated.
//!
//! ```text
//!   CPU: available (cgroup, MemAvailable) ──> weights | key/value pool | arenas
//!                                                       └─ asked for: as asked, or refused with what would fit
//!                                                          else: a quarter of what is left, at most 2 GiB, at most what
//!                                                          all requests at full length need, at least one of them
//!   device: gpu_memory_utilization of its memory,
//!           less what others use ───────────> weights | key/value pool | arenas
//!                                                       └─ as asked, else all that is left
//! ```
//!
//! On the CPU the pool is only touched as it fills, so a plan is an upper bound and not what a fresh engine occupies. A
//! device has nothing better to do with its memory than to keep prefixes, and its pool is allocated whole.

#[cfg(unix)]
use std::cell::Cell;
use std::fmt;

use cupola_kernels::KvType;
#[cfg(unix)]
use cupola_kernels::cuda;
use cupola_kernels::kv::{BLOCK_SIZE, blocks_for};
use cupola_models::{DecoderLimits, Model};

use crate::device::Device;
use crate::memory::available_memory;
use crate::{EngineConfig, Error};

/// Key/value pool by default at most this large.
const DEFAULT_KV_BYTES: u64 = 2 << 30;
/// Assumed where the system does not tell what is available.
const UNKNOWN_AVAILABLE: u64 = 8 << 30;

/// On a device beside all that is counted: the kernels' code, parameter vectors, recorded steps, and what the driver rounds up.
#[cfg(unix)]
pub(crate) const DEVICE_RESERVE_BYTES: u64 = 128 << 20;

/// Memory of an engine, in bytes unless named otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Where it lies: `cpu`, or a device with its name.
    pub device: String,
    /// Packed weights.
    pub weights_bytes: u64,
    /// Key/value pool.
    pub kv_bytes: u64,
    /// Tokens that the pool holds.
    pub kv_tokens: usize,
    /// Blocks of the pool.
    pub kv_blocks: usize,
    /// Activations, logits and tables.
    pub arena_bytes: u64,
    /// All of it.
    pub total_bytes: u64,
    /// Longest prompt plus answer, in tokens.
    pub max_model_len: usize,
    /// What the system or the device could give before loading; `None` where it does not tell.
    pub available_bytes: Option<u64>,
}

/// What a plan must know about a model.
#[derive(Clone, Copy, Debug)]
pub struct ModelFacts {
    /// Packed weights, in bytes.
    pub weights_bytes: u64,
    /// One block of the key/value pool over all layers, in bytes.
    pub kv_block_bytes: u64,
    /// Longest sequence the model was trained for, in tokens.
    pub max_positions: usize,
    /// Activations, logits and tables for a step as large as configured, in bytes.
    pub arena_bytes: u64,
}

/// What there is to plan with.
#[derive(Clone, Debug)]
pub struct Place {
    /// `cpu`, or a device with its name.
    pub device: String,
    /// Bytes that it can give; `None` where the system does not tell.
    pub available: Option<u64>,
    /// The pool takes all that is left rather than a part of it.
    pub whole: bool,
}

impl Place {
    fn new(device: &Device, config: &EngineConfig) -> Result<Self, Error> {
        Ok(match device {
            Device::Cpu(_) => Self { device: "cpu".into(), available: available_memory(), whole: false },
            #[cfg(unix)]
            Device::Cuda(info) => {
                let free = cuda::free_memory(info)?;
                let share = (info.memory as f64 * config.gpu_memory_utilization) as u64;
                let others = info.memory.saturating_sub(free);
                Self { device: info.to_string(), available: Some(share.saturating_sub(others)), whole: true }
            }
        })
    }
}

/// Plans the memory of an engine on a device as it is now.
///
/// # Errors
/// [`Error::Memory`] with the number that would fit; [`Error::Config`] for a setting out of range.
pub fn plan(model: &Model, config: &EngineConfig, device: &Device) -> Result<MemoryPlan, Error> {
    config.validate()?;
    let (lacks, has, place) = match device {
        Device::Cpu(_) => (KvType::Fp8, KvType::Int8, "the CPU"),
        #[cfg(unix)]
        Device::Cuda(_) => (KvType::Int8, KvType::Fp8, "a CUDA device"),
    };
    if config.kv_cache_type == lacks {
        return Err(Error::Config {
            field: "kv_cache_type",
            expected: format!("{} on {place}, or auto for 16 bits", has.name()),
            got: lacks.name().into(),
        });
    }
    let spec = &model.spec;
    let limits = DecoderLimits {
        max_batch_tokens: config.max_num_batched_tokens,
        max_seqs: config.running_limit(),
        kv_blocks: 0,
        kv_type: config.kv_cache_type,
        max_model_len: config.max_model_len.unwrap_or(spec.max_positions),
    };
    let (arena_bytes, kv) = (limits.arena_bytes(spec), spec.kv_layout(config.kv_cache_type));
    let (weights_bytes, block_bytes, arena_bytes) = match device {
        Device::Cpu(_) => (model.info.packed_bytes, kv.block_bytes(), arena_bytes),
        #[cfg(unix)]
        Device::Cuda(_) => (
            model.weights.bytes_as(&|ty, rows, cols| Some(cuda::weight_bytes(ty, rows, cols))),
            cuda::kv_block_bytes(kv),
            arena_bytes + device_scratch(model, config, &limits) + DEVICE_RESERVE_BYTES,
        ),
    };
    let max_positions = spec.max_positions;
    let facts = ModelFacts { weights_bytes, kv_block_bytes: block_bytes as u64, max_positions, arena_bytes };
    plan_memory(&facts, config, &Place::new(device, config)?)
}

/// Bytes on a device beside weights, arenas and key/value pool.
#[cfg(unix)]
fn device_scratch(model: &Model, config: &EngineConfig, limits: &DecoderLimits) -> u64 {
    let spec = &model.spec;
    let steps = cuda::Steps {
        kv: spec.kv_layout(limits.kv_type),
        group: spec.heads.heads / spec.heads.kv_heads,
        rows: limits.max_batch_tokens,
        sequences: config.running_limit(),
        cuts: 1 + usize::from(spec.sliding.is_some()),
        blocks: blocks_for(limits.max_model_len),
        logit_rows: DecoderLimits::LOGIT_ROWS,
        vocab: spec.vocab,
    };
    let expanded = Cell::new(0);
    model.weights.bytes_as(&|ty, rows, cols| {
        expanded.set(expanded.get().max(cuda::expanded_bytes(ty, rows, cols)));
        None
    });
    (steps.bytes() + expanded.get()) as u64
}

/// [`plan`] from plain numbers.
///
/// # Errors
/// [`Error::Memory`] with the number that would fit; [`Error::Config`] for a setting out of range.
pub fn plan_memory(facts: &ModelFacts, config: &EngineConfig, place: &Place) -> Result<MemoryPlan, Error> {
    config.validate()?;
    let free = place.available.unwrap_or(UNKNOWN_AVAILABLE);
    let arena_bytes = facts.arena_bytes;
    let fixed = facts.weights_bytes.saturating_add(arena_bytes);
    let left = free.checked_sub(fixed).ok_or_else(|| Error::Memory {
        what: format!("the model's weights ({}) with its arenas", Bytes(facts.weights_bytes)),
        needed: fixed,
        available: free,
        fits: if place.whole {
            "raise gpu_memory_utilization, or take a smaller model or a stronger quantisation".into()
        } else {
            "take a smaller model or a stronger quantisation".into()
        },
    })?;
    let block = facts.kv_block_bytes;
    let asked_len = config.max_model_len;
    if let Some(asked) = asked_len.filter(|asked| *asked > facts.max_positions) {
        return Err(Error::Config {
            field: "max_model_len",
            expected: format!("at most {}, what the model was trained for", facts.max_positions),
            got: asked.to_string(),
        });
    }
    let wanted_len = asked_len.unwrap_or(facts.max_positions);
    let one_sequence = blocks_for(wanted_len) as u64 * block;
    let kv_budget = match config.kv_cache_bytes {
        Some(asked) if asked > left => {
            return Err(Error::Memory {
                what: format!("a key/value cache beside {fixed} bytes of weights and arenas"),
                needed: asked,
                available: left,
                fits: format!("set kv_cache_bytes to at most {left}"),
            });
        }
        Some(asked) => asked,
        None if place.whole => left,
        None => {
            let enough = one_sequence.saturating_mul(config.running_limit() as u64);
            (left / 4).min(DEFAULT_KV_BYTES).min(enough).max(one_sequence.min(left / 2))
        }
    };
    let kv_blocks = (kv_budget / block).min(u64::from(u32::MAX));
    let kv_tokens = usize::try_from(kv_blocks).expect("a block index fits a usize") * BLOCK_SIZE;
    if kv_tokens < 2 || asked_len.is_some_and(|asked| asked > kv_tokens) {
        return Err(Error::Memory {
            what: format!("one sequence of {} tokens", asked_len.unwrap_or(BLOCK_SIZE)),
            needed: asked_len.map_or(block, |_| one_sequence),
            available: kv_budget,
            fits: match config.kv_cache_bytes {
                Some(_) => format!("set max_model_len to at most {kv_tokens}, or kv_cache_bytes to {one_sequence}"),
                None => format!("set max_model_len to at most {kv_tokens}"),
            },
        });
    }
    let kv_bytes = kv_blocks * block;
    Ok(MemoryPlan {
        device: place.device.clone(),
        weights_bytes: facts.weights_bytes,
        kv_bytes,
        kv_tokens,
        kv_blocks: kv_tokens / BLOCK_SIZE,
        arena_bytes,
        total_bytes: fixed + kv_bytes,
        max_model_len: wanted_len.min(kv_tokens),
        available_bytes: place.available,
    })
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_token = self.kv_bytes / self.kv_tokens.max(1) as u64;
        writeln!(f, "weights   {:>10}", Bytes(self.weights_bytes))?;
        writeln!(
            f,
            "kv cache  {:>10}   {} tokens in {} blocks, {} a token",
            Bytes(self.kv_bytes),
            self.kv_tokens,
            self.kv_blocks,
            Bytes(per_token)
        )?;
        writeln!(f, "arenas    {:>10}", Bytes(self.arena_bytes))?;
        write!(f, "total     {:>10}", Bytes(self.total_bytes))?;
        if let Some(available) = self.available_bytes {
            write!(f, "   of {} available on {}", Bytes(available), self.device)?;
        }
        write!(f, "\ncontext   {:>10} tokens", self.max_model_len)
    }
}

/// Bytes for people.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.1} {}", UNITS[unit]))
    }
}

#[cfg(test)]
mod tests {
    use cupola_kernels::KvLayout;

    use super::*;

    const GIB: u64 = 1 << 30;

    /// The shape of a 135-million-parameter Llama.
    fn facts() -> ModelFacts {
        facts_of(KvType::F16)
    }

    fn facts_of(ty: KvType) -> ModelFacts {
        let kv_block_bytes = KvLayout { layers: 30, kv_heads: 3, head_dim: 64, ty }.block_bytes() as u64;
        ModelFacts { weights_bytes: 98 << 20, kv_block_bytes, max_positions: 8192, arena_bytes: 16 << 20 }
    }

    fn cpu(available: u64) -> Place {
        Place { device: "cpu".into(), available: Some(available), whole: false }
    }

    #[test]
    fn the_default_is_small_and_adds_up() {
        let plan = plan_memory(&facts(), &EngineConfig::default(), &cpu(16 * GIB)).expect("fits");
        assert_eq!(plan.max_model_len, 8192);
        assert!(plan.kv_bytes <= 2 * GIB && plan.kv_tokens >= 8192, "{plan}");
        assert_eq!(plan.total_bytes, plan.weights_bytes + plan.kv_bytes + plan.arena_bytes);
        assert_eq!(plan.kv_blocks * BLOCK_SIZE, plan.kv_tokens);
    }

    #[test]
    fn few_sequences_need_a_small_pool() {
        let config = EngineConfig { max_num_seqs: 2, max_model_len: Some(1024), ..EngineConfig::default() };
        let plan = plan_memory(&facts(), &config, &cpu(64 * GIB)).expect("fits");
        assert_eq!((plan.kv_tokens, plan.max_model_len), (2048, 1024));
    }

    #[test]
    fn short_memory_shortens_the_context_unless_it_was_asked_for() {
        let available = cpu(facts().weights_bytes + (200 << 20));
        let plan = plan_memory(&facts(), &EngineConfig::default(), &available).expect("fits, shorter");
        assert!(plan.max_model_len < 8192 && plan.max_model_len == plan.kv_tokens, "{plan}");
        let config = EngineConfig { max_model_len: Some(8192), ..EngineConfig::default() };
        let error = plan_memory(&facts(), &config, &available).expect_err("too long").to_string();
        assert!(error.contains(&format!("max_model_len to at most {}", plan.kv_tokens)), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_number_that_would() {
        let config = EngineConfig { kv_cache_bytes: Some(9 * GIB), ..EngineConfig::default() };
        let error = plan_memory(&facts(), &config, &cpu(4 * GIB)).expect_err("too much").to_string();
        assert!(error.contains("kv_cache_bytes to at most"), "{error}");
        let error = plan_memory(&facts(), &EngineConfig::default(), &cpu(1 << 20)).expect_err("no room").to_string();
        assert!(error.contains("smaller model"), "{error}");
        let config = EngineConfig { max_model_len: Some(9000), ..EngineConfig::default() };
        let error = plan_memory(&facts(), &config, &cpu(16 * GIB)).expect_err("untrained").to_string();
        assert!(error.contains("8192"), "{error}");
        let config =
            EngineConfig { kv_cache_bytes: Some(1 << 20), max_model_len: Some(512), ..EngineConfig::default() };
        let error = plan_memory(&facts(), &config, &cpu(16 * GIB)).expect_err("small pool").to_string();
        assert!(error.contains("max_model_len to at most 32"), "{error}");
    }

    #[test]
    fn bytes_hold_nearly_twice_as_many_tokens_as_halves() {
        let config = EngineConfig { kv_cache_bytes: Some(64 << 20), ..EngineConfig::default() };
        let tokens = |ty| plan_memory(&facts_of(ty), &config, &cpu(16 * GIB)).expect("fits").kv_tokens as f64;
        let ratio = tokens(KvType::Int8) / tokens(KvType::F16);
        assert!((1.87..1.89).contains(&ratio), "64 bytes and a scale of 4 for each 128 bytes: {ratio}");
    }

    #[test]
    fn a_plan_reads_as_a_table() {
        let plan = plan_memory(&facts(), &EngineConfig::default(), &cpu(16 * GIB)).expect("fits").to_string();
        assert!(plan.contains("weights     98.0 MiB") && plan.contains("22.5 KiB a token"), "{plan}");
    }

    #[test]
    fn a_device_gives_its_pool_all_that_is_left() {
        let place = Place { device: "cuda:0 Test".into(), available: Some(10 * GIB), whole: true };
        let plan = plan_memory(&facts(), &EngineConfig::default(), &place).expect("fits");
        let left = 10 * GIB - plan.weights_bytes - plan.arena_bytes;
        assert!(plan.kv_bytes <= left && plan.kv_bytes > left - facts().kv_block_bytes, "{plan}");
        assert!(plan.to_string().contains("of 10.0 GiB available on cuda:0 Test"), "{plan}");
        let small = Place { available: Some(50 << 20), ..place };
        let error = plan_memory(&facts(), &EngineConfig::default(), &small).expect_err("no room").to_string();
        assert!(error.contains("raise gpu_memory_utilization") && error.contains("98.0 MiB"), "{error}");
    }

    #[test]
    fn a_share_of_no_memory_or_more_than_all_is_refused() {
        for share in [0.0, -0.5, 1.01, f64::NAN] {
            let config = EngineConfig { gpu_memory_utilization: share, ..EngineConfig::default() };
            let error = plan_memory(&facts(), &config, &cpu(16 * GIB)).expect_err("nonsense").to_string();
            assert!(error.contains("gpu_memory_utilization must be above 0 and at most 1"), "{error}");
        }
    }
}
