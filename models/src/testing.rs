//! Tiny random models on disk, for the tests of this and other crates (cargo feature `testing`).
//!
//! Both writers give the same network for the same seed: two layers, 64 wide, four heads of 16 dimensions in two
//! key/value groups, a feed-forward layer of 128, and a byte-level tokenizer of 300 tokens with a chat template. What a
//! GGUF file in F32 computes, the safetensors folder in F32 computes too. [`gemma`] has the same for Gemma 3.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use cupola_kernels::WeightType;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::arch::{GGUF_NAMES, HF_NAMES};
use crate::hub::{Hub, default_entry, find};
use crate::spec::TensorNames;
use crate::tokenizer::bpe::byte_characters;
use crate::weights::writer::{GgufWriter, Item, encode};

pub mod gemma;

/// Layers of a tiny model.
pub const LAYERS: usize = 2;
/// Width of its residual stream.
pub const HIDDEN: usize = 64;
/// Its attention heads.
pub const HEADS: usize = 4;
/// Its key/value heads.
pub const KV_HEADS: usize = 2;
/// Dimensions of a head.
pub const HEAD_DIM: usize = 16;
/// Width of its feed-forward layer.
pub const FFN: usize = 128;
/// Tokens of its vocabulary.
pub const VOCAB: usize = 300;
/// Its longest sequence, in tokens.
pub const CONTEXT: usize = 1024;
/// Its special tokens, with ids from 0: end of document, start of a turn, end of a turn.
pub const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The token that ends its answers: `<|im_end|>`.
pub const EOS: u32 = 2;

/// Its chat template (ChatML).
pub const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

/// Pairs merged into tokens, most frequent first. `Ġ` stands for a space.
const MERGES: [&str; 41] = [
    "Ġ t", "h e", "i n", "r e", "Ġ a", "o n", "e r", "a t", "Ġt he", "e n", "o r", "Ġ s", "Ġ w", "i s", "a n", "i t",
    "Ġ c", "o u", "Ġ o", "Ġ b", "e s", "Ġ f", "in g", "Ġ p", "e d", "Ġ in", "a l", "Ġ m", "o f", "l l", "Ġ h", "Ġ d",
    "Ġt o", "a r", "l e", "an d", "Ġ l", "Ġ is", "Ġo f", "Ġ n", "Ġ y",
];

/// A folder that is removed when this is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new, empty folder; `name` is part of its path, for people.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("cupola-{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        std::fs::create_dir_all(&path).expect("a folder for temporary files");
        Self(path)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind, it is the system's to clear.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The real model for tests: `CUPOLA_TEST_MODEL`, or the default model when it has been fetched. `None` after saying
/// so on standard error.
pub fn real_model() -> Option<PathBuf> {
    let named = std::env::var_os("CUPOLA_TEST_MODEL").map(PathBuf::from).filter(|path| path.exists());
    let found = named.or_else(|| Hub::from_env().cached(default_entry()));
    if found.is_none() {
        eprintln!("SKIPPED: no real model here; run `cargo run --release -- pull` or set CUPOLA_TEST_MODEL");
    }
    found
}

/// The real Gemma 3 for tests: `CUPOLA_TEST_GEMMA`, or the catalog's when it has been fetched. `None` after saying so.
pub fn real_gemma() -> Option<PathBuf> {
    let named = std::env::var_os("CUPOLA_TEST_GEMMA").map(PathBuf::from).filter(|path| path.exists());
    let found = named.or_else(|| Hub::from_env().cached(find("gemma-3-270m")?));
    if found.is_none() {
        eprintln!("SKIPPED: no Gemma here; run `cargo run --release -- pull gemma-3-270m` or set CUPOLA_TEST_GEMMA");
    }
    found
}

/// Writes `tiny.gguf` into a folder, matrices in `ty`, everything else in F32. The output head is the embedding.
///
/// # Panics
/// When the file cannot be written.
pub fn tiny_gguf(folder: &Path, ty: WeightType, seed: u64) -> PathBuf {
    let path = folder.join("tiny.gguf");
    std::fs::write(&path, tiny_writer(ty, seed).finish()).expect("the folder takes a file");
    path
}

/// Writes a folder `tiny` with `config.json`, `model.safetensors` and the tokenizer's files into a folder. `ty` is F32,
/// F16 or BF16.
///
/// # Panics
/// When a file cannot be written or `ty` is a block format.
pub fn tiny_safetensors(folder: &Path, ty: WeightType, seed: u64) -> PathBuf {
    let folder = folder.join("tiny");
    write_folder(&folder, ty, tensors(&HF_NAMES, seed), &config_json());
    let write = |name: &str, json: serde_json::Value| {
        std::fs::write(folder.join(name), json.to_string()).expect("the folder takes a file");
    };
    write("generation_config.json", json!({"eos_token_id": [EOS, 0], "temperature": 0.7}));
    let settings =
        json!({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": TEMPLATE});
    write("tokenizer_config.json", settings);
    folder
}

/// Writes weights, `config.json` and `tokenizer.json`.
fn write_folder(folder: &Path, ty: WeightType, tensors: Vec<Random>, config: &serde_json::Value) {
    std::fs::create_dir_all(folder).expect("the folder takes a folder");
    let dtype = match ty {
        WeightType::F32 => Dtype::F32,
        WeightType::F16 => Dtype::F16,
        WeightType::Bf16 => Dtype::BF16,
        other => panic!("safetensors has no {}", other.name()),
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> =
        tensors.into_iter().map(|t| (t.name, t.shape, encode(ty, &t.values))).collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(dtype, shape.clone(), data).expect("data of this shape"))
    });
    let bytes = safetensors::serialize(views, None).expect("valid tensors");
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).expect("the folder takes a file");
    write("model.safetensors", &bytes);
    write("config.json", config.to_string().as_bytes());
    write("tokenizer.json", tokenizer_json().to_string().as_bytes());
}

/// The GGUF file of [`tiny_gguf`], before it is written: tests of bad files start from it.
pub(crate) fn tiny_writer(ty: WeightType, seed: u64) -> GgufWriter {
    let mut file = GgufWriter::new();
    file.text("general.architecture", "llama").text("general.name", "Tiny");
    for (key, value) in [
        ("llama.block_count", LAYERS),
        ("llama.context_length", CONTEXT),
        ("llama.embedding_length", HIDDEN),
        ("llama.feed_forward_length", FFN),
        ("llama.attention.head_count", HEADS),
        ("llama.attention.head_count_kv", KV_HEADS),
        ("llama.rope.dimension_count", HEAD_DIM),
    ] {
        file.u32(key, value as u32);
    }
    file.key("llama.attention.layer_norm_rms_epsilon", Item::F32(1e-5))
        .key("llama.rope.freq_base", Item::F32(10_000.0));
    tokenizer_keys(&mut file).text("tokenizer.chat_template", TEMPLATE);
    for tensor in tensors(&GGUF_NAMES, seed) {
        let ty = if tensor.shape.len() == 1 { WeightType::F32 } else { ty };
        let values = if tensor.turned { interleave(&tensor.values) } else { tensor.values };
        file.tensor(&tensor.name, &tensor.shape, ty, &values);
    }
    file
}

fn tokenizer_keys(file: &mut GgufWriter) -> &mut GgufWriter {
    let kinds = (0..VOCAB).map(|id| if id < SPECIALS.len() { 3 } else { 1 }).collect();
    file.text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "smollm")
        .key("tokenizer.ggml.tokens", Item::Texts(vocabulary()))
        .key("tokenizer.ggml.token_type", Item::I32s(kinds))
        .key("tokenizer.ggml.merges", Item::Texts(MERGES.map(str::to_owned).to_vec()))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", EOS)
        .key("tokenizer.ggml.add_bos_token", Item::Bool(false))
}

/// Special tokens, the 256 bytes, then what the merges make.
fn vocabulary() -> Vec<String> {
    let specials = SPECIALS.iter().map(|text| (*text).to_owned());
    let bytes = byte_characters().into_iter().map(String::from);
    specials.chain(bytes).chain(MERGES.iter().map(|merge| merge.replacen(' ', "", 1))).collect()
}

fn config_json() -> serde_json::Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": true, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT, "eos_token_id": EOS,
    })
}

fn tokenizer_json() -> serde_json::Value {
    let added = |(id, text)| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let vocab: serde_json::Map<_, _> = vocabulary().into_iter().zip((0..).map(serde_json::Value::from)).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": SPECIALS.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes]},
        "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": MERGES.as_slice()},
    })
}

/// A tensor as Hugging Face checkpoints have it.
struct Random {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
    /// Its rows are turned by the rotary embedding, and lie in another order in GGUF files.
    turned: bool,
}

fn tensors(names: &TensorNames, seed: u64) -> Vec<Random> {
    let mut state = seed;
    let mut out = Vec::new();
    let mut add = |name: String, shape: &[usize], turned: bool| {
        // Matrices keep the size of what they multiply; norm weights stay near 1.
        let (centre, width) = match shape {
            [_, cols] => (0.0, (3.0 / *cols as f32).sqrt()),
            _ => (1.0, 0.2),
        };
        let values = (0..shape.iter().product()).map(|_| centre + width * uniform(&mut state)).collect();
        out.push(Random { name, shape: shape.to_vec(), values, turned });
    };
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    add(names.embedding.to_owned(), &[VOCAB, HIDDEN], false);
    for layer in 0..LAYERS {
        let mut add = |template, shape: &[usize], turned| add(TensorNames::layer(template, layer), shape, turned);
        add(names.attn_norm, &[HIDDEN], false);
        add(names.q, &[q, HIDDEN], true);
        add(names.k, &[kv, HIDDEN], true);
        add(names.v, &[kv, HIDDEN], false);
        add(names.o, &[HIDDEN, q], false);
        add(names.ffn_norm, &[HIDDEN], false);
        add(names.gate, &[FFN, HIDDEN], false);
        add(names.up, &[FFN, HIDDEN], false);
        add(names.down, &[HIDDEN, FFN], false);
    }
    add(names.final_norm.to_owned(), &[HIDDEN], false);
    out
}

/// Rows of each head from `(0 .. d/2, d/2 .. d)` to `0, d/2, 1, d/2 + 1, ..`.
fn interleave(values: &[f32]) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks_exact(HIDDEN).collect();
    let order = (0..rows.len()).map(|row| {
        let (head, at) = (row / HEAD_DIM, row % HEAD_DIM);
        head * HEAD_DIM + at / 2 + at % 2 * (HEAD_DIM / 2)
    });
    order.flat_map(|row| rows[row]).copied().collect()
}

/// The next number in `-1..1` (SplitMix64, <https://prng.di.unimi.it/splitmix64.c>).
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    let bits = (z ^ (z >> 31)) >> 40;
    bits as f32 / (1 << 23) as f32 - 1.0
}
