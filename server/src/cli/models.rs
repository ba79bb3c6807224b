//! `cupola models`: what the catalog knows, what is on disk, and what fits here.

use std::io::Write;

use clap::Args;
use cupola_models::hub::{CatalogEntry, Hub, catalog};
use serde_json::{Value, json};

use super::error::Error;
use super::size::{Bytes, count};
use super::table::{
    self,
    Align::{Left, Right},
};

/// Memory that a model needs beside its weights: arenas and a small key/value cache.
const WORKING_BYTES: u64 = 128 << 20;

#[derive(Args, Debug)]
pub(crate) struct ModelsArgs {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

struct Row<'a> {
    entry: &'a CatalogEntry,
    path: Option<std::path::PathBuf>,
    /// `None` where the system does not tell how much memory is free.
    fits: Option<bool>,
}

pub(crate) fn run(args: &ModelsArgs, out: &mut dyn Write) -> Result<(), Error> {
    let (hub, free) = (Hub::from_env(), cupola_engine::available_memory());
    let rows = catalog().iter().map(|entry| Row {
        entry,
        path: hub.cached(entry),
        fits: free.map(|free| entry.bytes + WORKING_BYTES <= free),
    });
    if args.json {
        let all: Vec<Value> = rows.map(|row| describe(&row)).collect();
        writeln!(out, "{:#}", Value::from(all))?;
        return Ok(());
    }
    let rows: Vec<[String; 7]> = rows.map(|row| cells(&row)).collect();
    let heading = [
        ("NAME", Left),
        ("PARAMETERS", Right),
        ("QUANTIZATION", Left),
        ("SIZE", Right),
        ("ON DISK", Left),
        ("FITS HERE", Left),
        ("LICENSE", Left),
    ];
    table::write(out, heading, &rows)?;
    writeln!(
        out,
        "\n`cupola run NAME` talks to one; hf:ORG/REPO[:FILE], pypi:PACKAGE and paths work in place of NAME."
    )?;
    Ok(())
}

fn describe(row: &Row<'_>) -> Value {
    let entry = row.entry;
    json!({
        "name": entry.name,
        "aliases": entry.aliases,
        "title": entry.title,
        "license": entry.license,
        "parameters": entry.parameters,
        "quantization": entry.quantization,
        "bytes": entry.bytes,
        "chat": entry.chat,
        "default": entry.default,
        "path": row.path,
        "fits": row.fits,
    })
}

fn cells(row: &Row<'_>) -> [String; 7] {
    let entry = row.entry;
    let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    [
        if entry.default { format!("{} (default)", entry.name) } else { entry.name.to_owned() },
        count(entry.parameters),
        entry.quantization.to_owned(),
        Bytes(entry.bytes).to_string(),
        yes_no(row.path.is_some()),
        row.fits.map_or_else(|| "unknown".to_owned(), yes_no),
        entry.license.to_owned(),
    ]
}
