//! What the tests share: the default model, running servers, comparisons.

pub(crate) mod server;

use std::path::PathBuf;
use std::sync::OnceLock;

use cupola_kernels::cpu::{CpuBackend, CpuConfig};
use cupola_kernels::kv::blocks_for;
use cupola_kernels::{BlockId, KvType};
use cupola_models::decoder::{Decoder, DecoderLimits};
use cupola_models::hub::{Hub, Progress};
use cupola_models::{Batch, Model};

/// True when what a test needs must be there: a skip then becomes a failure.
pub(crate) fn required(what: &str) -> bool {
    std::env::var("CUPOLA_TEST_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item == what || item == "all"))
}

/// Says loudly that a test did not run, or fails when it was required.
pub(crate) fn skip(what: &str, why: &str) {
    assert!(!required(what), "{what} is required by CUPOLA_TEST_REQUIRE: {why}");
    eprintln!("\n*** NOT TESTED: {what} is missing: {why} ***\n");
}

/// The default model's file: `CUPOLA_TEST_MODEL` when set, else fetched the way `cupola serve` fetches it.
pub(crate) fn default_model() -> Option<PathBuf> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    found(&PATH, "model", "CUPOLA_TEST_MODEL", "smollm2-135m-instruct")
}

/// Gemma 3's file: `CUPOLA_TEST_GEMMA` when set, else fetched likewise.
pub(crate) fn gemma_model() -> Option<PathBuf> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    found(&PATH, "gemma", "CUPOLA_TEST_GEMMA", "gemma-3-270m")
}

fn found(once: &OnceLock<Result<PathBuf, String>>, what: &str, variable: &str, name: &str) -> Option<PathBuf> {
    let found = once.get_or_init(|| {
        if let Some(path) = std::env::var_os(variable) {
            return Ok(path.into());
        }
        let reference = name.parse().map_err(|e| format!("{e}"))?;
        Hub::from_env().resolve(&reference, &Quiet).map(|found| found.path).map_err(|e| e.to_string())
    });
    match found {
        Ok(path) => Some(path.clone()),
        Err(why) => {
            skip(what, why);
            None
        }
    }
}

struct Quiet;

impl Progress for Quiet {
    fn start(&self, _what: &str, _total: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn note(&self, _line: &str) {}
    fn finish(&self) {}
}

/// Logits after every token, computed in one prefill.
pub(crate) fn decoder_logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let backend = CpuBackend::new(CpuConfig::default()).expect("a CPU backend");
    let blocks = blocks_for(tokens.len());
    let limits = DecoderLimits {
        max_batch_tokens: tokens.len(),
        max_seqs: 1,
        kv_blocks: blocks,
        kv_type: KvType::F16,
        max_model_len: tokens.len(),
    };
    let mut decoder = Decoder::load(model, Box::new(backend), limits, &mut |_, _| ()).expect("the model loads");
    let mut batch = Batch::default();
    let table: Vec<BlockId> = (0..u32::try_from(blocks).expect("few blocks")).map(BlockId).collect();
    batch.push(tokens, 0, &table);
    batch.outputs = (0..u32::try_from(tokens.len()).expect("few tokens")).collect();
    decoder.forward(&batch).expect("the batch fits");
    let rows: Vec<std::sync::Mutex<Vec<f32>>> = tokens.iter().map(|_| std::sync::Mutex::default()).collect();
    decoder
        .for_each_logits(&|i, logits| rows[i].lock().expect("no panic while held").extend_from_slice(logits))
        .expect("logits of every row");
    rows.into_iter().map(|row| row.into_inner().expect("no panic while held")).collect()
}

/// Cosine of the angle between two vectors, in f64.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
