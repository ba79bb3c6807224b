//! From a loaded model to a running engine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Instant;

use cupola_kernels::cpu::{CpuBackend, CpuConfig, checksum};
use cupola_kernels::{Backend, Error::OutOfMemory};
use cupola_models::{Decoder, DecoderLimits, Model};

use crate::detokenizer::TokenText;
use crate::device::Device;
use crate::handle::{EngineHandle, Shared, SharedSetup};
use crate::plan::{MemoryPlan, plan};
use crate::runner::ModelRunner;
use crate::scheduler::Limits;
use crate::step_loop::{LoopSetup, StepLoop};
use crate::{EngineConfig, Error};

/// Places in the command channel beside those of queued requests.
const CONTROL_COMMANDS: usize = 64;

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

/// What an engine must know beside how to run the model.
pub struct EngineSetup {
    /// What tokens stand for.
    pub text: Arc<dyn TokenText>,
    /// The model's end-of-sequence tokens.
    pub eos: Vec<u32>,
    /// Size of the pool that the runner writes to, and the context length.
    pub plan: MemoryPlan,
}

impl Engine {
    /// Plans the memory, loads the model on `device` and starts its engine.
    ///
    /// # Errors
    /// What [`plan`] refuses, a model that cannot be loaded, and the errors of [`Engine::start`].
    pub fn load(model: &Model, config: EngineConfig, device: &Device) -> Result<EngineHandle, Error> {
        let plan = plan(model, &config, device)?;
        let limits = DecoderLimits {
            max_batch_tokens: config.max_num_batched_tokens,
            max_seqs: config.running_limit(),
            kv_blocks: plan.kv_blocks,
            kv_type: config.kv_cache_type,
            max_model_len: plan.max_model_len,
        };
        let backend = match (device, &config.packed_cache) {
            (Device::Cpu(cpu), Some(folder)) => cpu_with_packed_file(*cpu, folder, model)?,
            (_, Some(_)) => {
                tracing::warn!(
                    device = device.name(),
                    "packed weights are kept for the CPU alone: the model's files are read"
                );
                device.backend()?
            }
            (_, None) => device.backend()?,
        };
        let mut watch = |layer, layers| tracing::trace!(layer, layers, "weights packed");
        let mut decoder = Decoder::load(model, backend, limits, &mut watch).map_err(|error| match error {
            // On the CPU a plan is an upper bound that the system overrides; on a device it is what was asked for.
            cupola_models::Error::Kernel(source @ OutOfMemory { .. }) if !matches!(device, Device::Cpu(_)) => {
                // What was allocated is free again, so a new plan says what fits now.
                out_of_memory(source, &plan, self::plan(model, &config, device).ok())
            }
            error => error.into(),
        })?;
        if !config.enforce_eager {
            record_passes(&mut decoder)?;
        }
        if let Some(error) = decoder.unsaved() {
            tracing::warn!(%error, "the next start will pack the weights again");
        }
        tracing::info!(backend = decoder.describe_backend(), bytes = decoder.allocated_bytes(), "model loaded");
        if let Some(products) = decoder.describe_products() {
            tracing::info!("matrix products: {products}");
        }
        let setup = EngineSetup { text: Arc::new(model.tokenizer.clone()), eos: model.info.eos_tokens.clone(), plan };
        Self::start(Box::new(decoder), setup, config)
    }

    /// Starts the engine thread over a runner that takes batches of [`EngineConfig::max_num_batched_tokens`] rows and
    /// has a pool of `setup.plan.kv_blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting out of range, [`Error::Thread`] when the system gives no thread.
    pub fn start(
        runner: Box<dyn ModelRunner>,
        setup: EngineSetup,
        config: EngineConfig,
    ) -> Result<EngineHandle, Error> {
        config.validate()?;
        let EngineSetup { text, eos, plan } = setup;
        if plan.max_model_len < 2 || plan.max_model_len > plan.kv_tokens {
            return Err(Error::Config {
                field: "max_model_len",
                expected: format!("from 2 to {}, what the key/value cache holds", plan.kv_tokens),
                got: plan.max_model_len.to_string(),
            });
        }
        let (max_model_len, num_blocks) = (plan.max_model_len, plan.kv_blocks);
        let shared_setup = SharedSetup { plan, text, vocab: runner.vocab_size(), max_model_len };
        let shared = Arc::new(Shared::new(shared_setup, &config));
        let (commands, inbox) = sync_channel(config.max_queued_requests + CONTROL_COMMANDS);
        let limits = Limits { max_seqs: config.running_limit(), max_rows: config.max_num_batched_tokens };
        let step_loop = StepLoop::new(LoopSetup {
            runner,
            shared: Arc::clone(&shared),
            commands: inbox,
            eos,
            prefix_caching: config.enable_prefix_caching,
            carry_tokens: config.async_scheduling,
            limits,
            num_blocks,
        });
        let thread = thread::Builder::new()
            .name("cupola-engine".into())
            .spawn(move || step_loop.run())
            .map_err(Error::Thread)?;
        Ok(EngineHandle::new(shared, commands, thread))
    }
}

/// Records small decoding steps where the device does that; without recordings the engine works as well, slower.
fn record_passes(decoder: &mut Decoder) -> Result<(), Error> {
    let began = Instant::now();
    let mut watch = |size, sizes| tracing::trace!(size, sizes, "decoding steps recorded");
    let recorded = decoder.record_passes(&mut watch)?;
    match recorded.failed {
        Some(why) => {
            tracing::warn!(why, "decoding steps cannot be recorded as graphs: their ops are submitted one by one")
        }
        None if recorded.graphs > 0 => {
            tracing::info!(
                graphs = recorded.graphs,
                seconds = began.elapsed().as_secs_f64(),
                "decoding steps recorded"
            );
        }
        None => {}
    }
    Ok(())
}

/// The plan fitted and the device did not keep to it: others took memory meanwhile, or it is in pieces.
fn out_of_memory(source: cupola_kernels::Error, plan: &MemoryPlan, now: Option<MemoryPlan>) -> Error {
    /// What is at least taken off the pool for the next try: the eighth part.
    const LESS: u64 = 8;
    let less = plan.kv_bytes - plan.kv_bytes / LESS;
    let fits = format!("set kv_cache_bytes to at most {}", now.map_or(less, |now| now.kv_bytes.min(less)));
    Error::DeviceMemory { source, plan: plan.to_string(), fits }
}

/// A CPU backend that takes its weights from the file that `folder` keeps of this model, or writes it.
fn cpu_with_packed_file(cpu: CpuConfig, folder: &Path, model: &Model) -> Result<Box<dyn Backend>, Error> {
    let mut backend = CpuBackend::new(cpu)?;
    let path = packed_file(folder, model);
    match backend.use_packed_file(path.clone(), model.weights.fingerprint()?) {
        Ok(()) => tracing::info!(path = %path.display(), "packed weights mapped"),
        Err(why) => tracing::info!(path = %path.display(), why, "weights are packed, and kept for the next start"),
    }
    Ok(Box::new(backend))
}

/// Where a folder keeps the packed weights of a model: by the name of its file, and a number for the place that it is at.
fn packed_file(folder: &Path, model: &Model) -> PathBuf {
    let path = &model.info.path;
    let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    folder.join(format!("{name}-{:016x}.packed", checksum(place.to_string_lossy().as_bytes())))
}
