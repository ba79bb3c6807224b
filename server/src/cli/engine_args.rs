//! Flags of every command that loads a model: which one, and how much it may take. Where vLLM has a flag, its name.

use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use cupola_engine::{Device, DeviceChoice, EngineConfig};
use cupola_kernels::KvType;
use cupola_kernels::cpu::CpuConfig;
use cupola_models::hub::{Hub, ModelRef, Resolved};
use cupola_models::{ChatTemplate, Model, dummy};

use super::error::Error;
use super::progress::ProgressBar;
use super::size::Bytes;

/// The model of a command that is given none.
pub(crate) const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// What keys and values are stored as.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum KvCacheDtype {
    /// 16 bits: f16 on a CPU, bf16 on a GPU
    #[default]
    Auto,
    /// The same
    F16,
    /// On a CPU: bytes, with one scale for each key and each value of a head
    Int8,
    /// On a GPU: E4M3 numbers, with one exponent for each key and each value of a head
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl From<KvCacheDtype> for KvType {
    fn from(dtype: KvCacheDtype) -> Self {
        match dtype {
            KvCacheDtype::Auto | KvCacheDtype::F16 => KvType::F16,
            KvCacheDtype::Int8 => KvType::Int8,
            KvCacheDtype::Fp8 => KvType::Fp8,
        }
    }
}

/// Limits of the engine.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Longest prompt plus answer, in tokens [default: what the model was trained for]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    max_model_len: Option<u32>,
    /// Most requests that run at once [default: 256]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_num_seqs: Option<u32>,
    /// Most tokens of one step, prompts and answers together [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_num_batched_tokens: Option<u32>,
    /// Memory of the key/value cache, such as 512M or 2GiB [default: part of what is free]
    #[arg(long, value_name = "SIZE", alias = "kv-cache-memory-bytes")]
    kv_cache_memory: Option<Bytes>,
    /// What keys and values are stored as; int8 (CPU) and fp8 (GPU) hold nearly twice as many tokens, at a loss of precision
    #[arg(long, value_enum, default_value_t)]
    kv_cache_dtype: KvCacheDtype,
    /// Most requests that wait; more are answered 429 [default: 4 times --max-num-seqs]
    #[arg(long, value_name = "N", alias = "max-num-queued-reqs", value_parser = clap::value_parser!(u32).range(1..))]
    max_queued_requests: Option<u32>,
    /// Do not reuse the computed beginnings of equal prompts
    #[arg(long)]
    no_enable_prefix_caching: bool,
    /// Reuse them, as is the default
    #[arg(long, hide = true, overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,
    /// Where the model runs: cpu, cuda, cuda:N, or auto for a GPU where one is found [default: cpu]
    #[arg(long, value_name = "DEVICE", value_parser = DeviceChoice::from_str)]
    device: Option<DeviceChoice>,
    /// Share of a GPU's memory that may be in use, by this model and by others [default: 0.9]
    #[arg(long, value_name = "SHARE")]
    gpu_memory_utilization: Option<f64>,
    /// Submit every op of a step on a GPU by itself, without CUDA graphs
    #[arg(long)]
    enforce_eager: bool,
    /// Read the tokens of every step on a GPU before the next one is submitted
    #[arg(long)]
    no_async_scheduling: bool,
    /// Submit decoding steps before, as is the default
    #[arg(long, hide = true, overrides_with = "no_async_scheduling")]
    async_scheduling: bool,
    /// Where weights come from: the model's files, or `dummy`: random ones, to measure speed. MODEL is then a folder with
    /// a config.json, or one of llama-3.2-1b, llama-3.1-8b
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = LoadFormat::Auto)]
    load_format: LoadFormat,
    /// Worker threads [default: one a physical core this process may use]
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Keep packed weights in this folder (CPU only), and map them at the next start instead of packing them again
    #[arg(long, value_name = "DIR")]
    packed_cache: Option<PathBuf>,
    /// A Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

/// Where the weights of a model come from.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LoadFormat {
    /// The model's own files
    #[default]
    Auto,
    /// Random weights of the model's shapes
    Dummy,
}

impl EngineArgs {
    /// Finds the model and opens it, or makes it up.
    pub(crate) fn open(&self, model: &str) -> Result<(Resolved, Model), Error> {
        if self.packed_cache.is_some() && self.load_format == LoadFormat::Dummy {
            let what =
                "--packed-cache keeps the weights of files, and --load-format dummy has none: leave one of them out";
            return Err(Error::Usage(what.into()));
        }
        open_as(model, self.load_format)
    }

    /// The engine's configuration.
    pub(crate) fn config(&self) -> EngineConfig {
        let default = EngineConfig::default();
        let or = |given: Option<u32>, default| given.map_or(default, |n| n as usize);
        let max_num_seqs = or(self.max_num_seqs, default.max_num_seqs);
        EngineConfig {
            max_num_seqs,
            max_num_batched_tokens: or(self.max_num_batched_tokens, default.max_num_batched_tokens),
            max_model_len: self.max_model_len.map(|n| n as usize),
            kv_cache_bytes: self.kv_cache_memory.map(|bytes| bytes.0),
            gpu_memory_utilization: self.gpu_memory_utilization.unwrap_or(default.gpu_memory_utilization),
            kv_cache_type: self.kv_cache_dtype.into(),
            max_queued_requests: or(self.max_queued_requests, 4 * max_num_seqs),
            enforce_eager: self.enforce_eager,
            async_scheduling: self.async_scheduling || !self.no_async_scheduling,
            packed_cache: self.packed_cache.clone(),
            enable_prefix_caching: self.enable_prefix_caching || !self.no_enable_prefix_caching,
            ..default
        }
    }

    /// The same for one user at a terminal: a single request at a time needs no room for hundreds.
    pub(crate) fn config_for_one(&self) -> EngineConfig {
        Self { max_num_seqs: Some(self.max_num_seqs.unwrap_or(1)), ..self.clone() }.config()
    }

    /// The device to run on.
    pub(crate) fn device(&self) -> Result<Device, Error> {
        find_device(self.device, self.threads.map(usize::from))
    }

    /// Puts the template of `--chat-template` into `model`.
    pub(crate) fn apply_chat_template(&self, model: &mut Model) -> Result<(), Error> {
        let Some(path) = &self.chat_template else { return Ok(()) };
        let source = std::fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
        let text = |id: Option<u32>| id.map_or_else(String::new, |id| model.tokenizer.decode(&[id], false));
        let (bos, eos) = (text(model.tokenizer.bos()), text(model.tokenizer.eos().first().copied()));
        model.chat_template = Some(ChatTemplate::new(&source, &bos, &eos)?);
        Ok(())
    }
}

/// The device of `--device` and `--threads`; says on standard error when `auto` finds no GPU.
pub(crate) fn find_device(choice: Option<DeviceChoice>, threads: Option<usize>) -> Result<Device, Error> {
    let cpu = CpuConfig { threads, ..CpuConfig::default() };
    let (device, why) = choice.unwrap_or_default().find(cpu).map_err(in_flags)?;
    if let Some(why) = why {
        // Standard error may be closed; the answer is on the CPU all the same.
        drop(writeln!(std::io::stderr(), "no GPU is used: {why}"));
    }
    Ok(device)
}

/// Finds the model, fetching it with a progress bar when it is not on this machine.
pub(crate) fn resolve(model: &str) -> Result<Resolved, Error> {
    let reference: ModelRef = model.parse()?;
    Ok(Hub::from_env().resolve(&reference, &ProgressBar::stderr())?)
}

/// [`resolve`] and open, or a model with random weights.
pub(crate) fn open_as(model: &str, format: LoadFormat) -> Result<(Resolved, Model), Error> {
    if format == LoadFormat::Dummy {
        let made_up = dummy::open(model)?;
        let name = made_up.info.path.file_name().map_or(model.into(), |name| name.to_string_lossy().into_owned());
        let resolved = Resolved { path: made_up.info.path.clone(), name, source: "random numbers".to_owned() };
        return Ok((resolved, made_up));
    }
    open(model)
}

/// [`resolve`] and open.
pub(crate) fn open(model: &str) -> Result<(Resolved, Model), Error> {
    let resolved = resolve(model)?;
    let model = Model::open(&resolved.path)?;
    Ok((resolved, model))
}

/// Names flags where the engine names its settings.
pub(crate) fn in_flags(error: cupola_engine::Error) -> Error {
    let mut text = error.to_string();
    for (setting, flag) in [
        ("kv_cache_bytes", "--kv-cache-memory"),
        ("gpu_memory_utilization", "--gpu-memory-utilization"),
        ("kv_cache_type", "--kv-cache-dtype"),
        ("max_model_len", "--max-model-len"),
        ("max_num_seqs", "--max-num-seqs"),
        ("max_num_batched_tokens", "--max-num-batched-tokens"),
        ("max_queued_requests", "--max-queued-requests"),
    ] {
        text = text.replace(setting, flag);
    }
    Error::Failed(text)
}
