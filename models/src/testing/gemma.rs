//! A tiny random Gemma 3: seven layers, of which the sixth sees everything, and a window that a short text outgrows.
//!
//! Its tokenizer is that of the tiny Llama, and it has no chat template, as base models have none.

use std::path::{Path, PathBuf};

use cupola_kernels::WeightType;
use serde_json::json;

use super::{EOS, Random, VOCAB, tokenizer_keys, uniform, write_folder};
use crate::arch::GGUF_NAMES;
use crate::arch::gemma3::SPELLINGS;
use crate::spec::TensorNames;
use crate::weights::writer::{GgufWriter, Item};

/// Its layers.
pub const LAYERS: usize = 7;
/// Width of its residual stream.
pub const HIDDEN: usize = 64;
/// Its attention heads.
pub const HEADS: usize = 4;
/// Its key/value heads.
pub const KV_HEADS: usize = 2;
/// Dimensions of a head; not the width divided by the heads.
pub const HEAD_DIM: usize = 32;
/// Width of its feed-forward layer.
pub const FFN: usize = 96;
/// Positions that a windowed layer sees.
pub const WINDOW: usize = 24;
/// Its longest sequence, in tokens.
pub const CONTEXT: usize = 512;

/// Writes `gemma.gguf` into a folder, matrices in `ty`, everything else in F32.
///
/// # Panics
/// When the file cannot be written.
pub fn tiny_gguf(folder: &Path, ty: WeightType, seed: u64) -> PathBuf {
    let path = folder.join("gemma.gguf");
    std::fs::write(&path, writer(ty, seed).finish()).expect("the folder takes a file");
    path
}

/// Writes a folder `gemma` with `config.json`, `model.safetensors` and `tokenizer.json` into a folder, the same network
/// as [`tiny_gguf`]. `ty` is F32, F16 or BF16.
///
/// # Panics
/// When a file cannot be written or `ty` is a block format.
pub fn tiny_safetensors(folder: &Path, ty: WeightType, seed: u64) -> PathBuf {
    let folder = folder.join("gemma");
    write_folder(&folder, ty, tensors(&SPELLINGS[0], seed, 0.0), &config());
    folder
}

/// What `config.json` says.
pub(crate) fn config() -> serde_json::Value {
    json!({
        "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window": WINDOW,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": HEAD_DIM, "head_dim": HEAD_DIM,
        "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
        "eos_token_id": EOS, "attention_bias": false,
    })
}

/// The GGUF file before it is written.
pub(crate) fn writer(ty: WeightType, seed: u64) -> GgufWriter {
    let mut file = GgufWriter::new();
    file.text("general.architecture", "gemma3").text("general.name", "Tiny Gemma");
    for (key, value) in [
        ("gemma3.block_count", LAYERS),
        ("gemma3.context_length", CONTEXT),
        ("gemma3.embedding_length", HIDDEN),
        ("gemma3.feed_forward_length", FFN),
        ("gemma3.attention.head_count", HEADS),
        ("gemma3.attention.head_count_kv", KV_HEADS),
        ("gemma3.attention.key_length", HEAD_DIM),
        ("gemma3.attention.value_length", HEAD_DIM),
        ("gemma3.attention.sliding_window", WINDOW),
    ] {
        file.u32(key, value as u32);
    }
    file.key("gemma3.attention.layer_norm_rms_epsilon", Item::F32(1e-6))
        .key("gemma3.rope.freq_base", Item::F32(1_000_000.0));
    tokenizer_keys(&mut file);
    for tensor in tensors(&GGUF_NAMES, seed, 1.0) {
        let ty = if tensor.shape.len() == 1 { WeightType::F32 } else { ty };
        file.tensor(&tensor.name, &tensor.shape, ty, &tensor.values);
    }
    file
}

/// All tensors; norm weights lie around `norm`.
fn tensors(names: &TensorNames, seed: u64, norm: f32) -> Vec<Random> {
    let mut state = seed;
    let mut out = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let (centre, width) = match shape {
            // Wide enough that attention is not flat and every layer leaves its mark.
            [_, cols] => (0.0, (6.0 / *cols as f32).sqrt()),
            _ => (norm, 0.5),
        };
        let values = (0..shape.iter().product()).map(|_| centre + width * uniform(&mut state)).collect();
        out.push(Random { name, shape: shape.to_vec(), values, turned: false });
    };
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    add(names.embedding.to_owned(), &[VOCAB, HIDDEN]);
    for layer in 0..LAYERS {
        let mut add = |template, shape: &[usize]| add(TensorNames::layer(template, layer), shape);
        add(names.attn_norm, &[HIDDEN]);
        add(names.q, &[q, HIDDEN]);
        add(names.k, &[kv, HIDDEN]);
        add(names.v, &[kv, HIDDEN]);
        add(names.o, &[HIDDEN, q]);
        add(names.q_norm, &[HEAD_DIM]);
        add(names.k_norm, &[HEAD_DIM]);
        add(names.attn_post_norm, &[HIDDEN]);
        add(names.ffn_norm, &[HIDDEN]);
        add(names.gate, &[FFN, HIDDEN]);
        add(names.up, &[FFN, HIDDEN]);
        add(names.down, &[HIDDEN, FFN]);
        add(names.ffn_post_norm, &[HIDDEN]);
    }
    add(names.final_norm.to_owned(), &[HIDDEN]);
    out
}
