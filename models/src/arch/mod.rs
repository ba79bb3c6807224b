//! Model families: a function each from metadata to [`DecoderSpec`].
//!
//! ```text
//!   GGUF keys    general.architecture = "llama", "gemma3"  --\
//!                                                            family table --> <family>::from_gguf | from_config --> DecoderSpec
//!   config.json  model_type = "llama", "gemma3_text", ..   --/
//! ```
//!
//! A new family is a file beside `llama.rs` and a row in each table below; what families read alike is in `metadata.rs`.

use std::path::Path;

use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::spec::{DecoderSpec, RopeSpec, TensorNames};
use crate::weights::Weights;
use crate::weights::gguf::Gguf;

pub(crate) mod gemma3;
mod llama;
mod metadata;
#[cfg(test)]
mod tests;

type FromGguf = fn(&Gguf, &str) -> Result<DecoderSpec>;
type FromConfig = fn(&HfConfig) -> Result<DecoderSpec>;

/// `general.architecture` of GGUF files. Llama 2 and 3, SmolLM2 and Mistral all call themselves `llama` there.
const GGUF_FAMILIES: &[(&str, FromGguf)] = &[("llama", llama::from_gguf), ("gemma3", gemma3::from_gguf)];

/// `model_type` of `config.json`.
const CONFIG_FAMILIES: &[(&str, FromConfig)] = &[
    ("llama", llama::from_config),
    ("mistral", llama::from_config),
    ("gemma3_text", gemma3::from_config),
    ("gemma3", gemma3::from_config),
];

/// Names in GGUF files, the same for every family.
pub(crate) const GGUF_NAMES: TensorNames = TensorNames {
    embedding: "token_embd.weight",
    head: "output.weight",
    final_norm: "output_norm.weight",
    attn_norm: "blk.{}.attn_norm.weight",
    q: "blk.{}.attn_q.weight",
    k: "blk.{}.attn_k.weight",
    v: "blk.{}.attn_v.weight",
    o: "blk.{}.attn_output.weight",
    q_norm: "blk.{}.attn_q_norm.weight",
    k_norm: "blk.{}.attn_k_norm.weight",
    attn_post_norm: "blk.{}.post_attention_norm.weight",
    ffn_norm: "blk.{}.ffn_norm.weight",
    gate: "blk.{}.ffn_gate.weight",
    up: "blk.{}.ffn_up.weight",
    down: "blk.{}.ffn_down.weight",
    ffn_post_norm: "blk.{}.post_ffw_norm.weight",
};

/// Names in Hugging Face checkpoints of the Llama family.
pub(crate) const HF_NAMES: TensorNames = TensorNames {
    embedding: "model.embed_tokens.weight",
    head: "lm_head.weight",
    final_norm: "model.norm.weight",
    attn_norm: "model.layers.{}.input_layernorm.weight",
    q: "model.layers.{}.self_attn.q_proj.weight",
    k: "model.layers.{}.self_attn.k_proj.weight",
    v: "model.layers.{}.self_attn.v_proj.weight",
    o: "model.layers.{}.self_attn.o_proj.weight",
    q_norm: "model.layers.{}.self_attn.q_norm.weight",
    k_norm: "model.layers.{}.self_attn.k_norm.weight",
    attn_post_norm: "",
    ffn_norm: "model.layers.{}.post_attention_layernorm.weight",
    gate: "model.layers.{}.mlp.gate_proj.weight",
    up: "model.layers.{}.mlp.up_proj.weight",
    down: "model.layers.{}.mlp.down_proj.weight",
    ffn_post_norm: "",
};

/// Sizes beyond which metadata is taken for damaged, so that no later product of them overflows.
const MAX_LAYERS: usize = 1 << 12;
const MAX_WIDTH: usize = 1 << 20;
const MAX_POSITIONS: usize = 1 << 24;

/// The spec of a GGUF file.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown architecture, [`Error::Missing`] or [`Error::Format`] for bad metadata.
pub(crate) fn from_gguf(gguf: &Gguf) -> Result<DecoderSpec> {
    let name = gguf.text("general.architecture")?.ok_or_else(|| gguf.missing("general.architecture"))?;
    let family = lookup(GGUF_FAMILIES, name)?;
    checked(family(gguf, name)?, gguf.path())
}

/// The spec behind a `config.json`.
///
/// # Errors
/// As [`from_gguf`].
pub(crate) fn from_config(config: &HfConfig) -> Result<DecoderSpec> {
    let family = lookup(CONFIG_FAMILIES, config.text("model_type")?)?;
    checked(family(config)?, config.path())
}

fn lookup<F: Copy>(families: &[(&str, F)], name: &str) -> Result<F> {
    match families.iter().find(|(known, _)| *known == name) {
        Some((_, family)) => Ok(*family),
        None => Err(Error::Unsupported {
            what: format!("architecture {name}"),
            hint: format!("known ones are {}", families.iter().map(|(known, _)| *known).collect::<Vec<_>>().join(", ")),
        }),
    }
}

/// Refuses shapes that no model has.
fn checked(spec: DecoderSpec, path: &Path) -> Result<DecoderSpec> {
    let heads = spec.heads;
    let sizes = [
        ("number of layers", spec.layers, MAX_LAYERS),
        ("hidden size", spec.hidden, MAX_WIDTH),
        ("number of attention heads", heads.heads, MAX_WIDTH),
        ("number of key/value heads", heads.kv_heads, heads.heads),
        ("head dimension", heads.head_dim, 1 << 12),
        ("feed-forward size", spec.ffn, MAX_WIDTH),
        ("vocabulary size", spec.vocab, 1 << 24),
        ("context length", spec.max_positions, MAX_POSITIONS),
    ];
    let bad = |what: String| Err(Error::Format { path: path.to_owned(), what });
    for (what, size, max) in sizes {
        if size == 0 || size > max {
            return bad(format!("its {what} is {size}, expected 1 to {max}"));
        }
    }
    if !heads.heads.is_multiple_of(heads.kv_heads) {
        return bad(format!(
            "{} attention heads are not a multiple of {} key/value heads",
            heads.heads, heads.kv_heads
        ));
    }
    if !heads.head_dim.is_multiple_of(2) {
        return bad(format!("its head dimension is {}, expected an even number", heads.head_dim));
    }
    if !(spec.norm_eps.is_finite() && spec.norm_eps > 0.0) {
        return bad(format!("the epsilon of its norms is {}, expected a small positive number", spec.norm_eps));
    }
    for (what, cap) in [("attention scores", spec.attention_softcap), ("logits", spec.logit_softcap)] {
        if cap.is_some_and(|cap| !(cap.is_finite() && cap > 0.0)) {
            return bad(format!("the cap on its {what} is {cap:?}, expected a positive number"));
        }
    }
    if let Some(sliding) = &spec.sliding {
        if sliding.window == 0 || sliding.window > MAX_POSITIONS {
            return bad(format!("its attention window is {}, expected 1 to {MAX_POSITIONS}", sliding.window));
        }
        if sliding.layers.len() != spec.layers {
            let got = sliding.layers.len();
            return bad(format!("it says of {got} layers whether they slide, expected {}", spec.layers));
        }
    }
    let ropes = [Some(&spec.rope), spec.sliding.as_ref().map(|s| &s.rope)];
    for rope in ropes.into_iter().flatten() {
        if rope.inv_freq.len() * 2 != heads.head_dim || !rope.inv_freq.iter().all(|f| f.is_finite() && *f >= 0.0) {
            return bad("its rotary embedding has frequencies that are not finite".to_owned());
        }
    }
    Ok(spec)
}

/// Applies `rope_freqs.weight` where a file has it.
///
/// # Errors
/// [`Error::Format`] when it does not fit the model.
pub(crate) fn apply_rope_factors(spec: &mut DecoderSpec, weights: &Weights, path: &Path) -> Result<()> {
    const NAME: &str = "rope_freqs.weight";
    if !weights.contains(NAME) {
        return Ok(());
    }
    let factors = weights.vector(NAME)?;
    llama::apply_rope_factors(spec, &factors).map_err(|what| Error::Format { path: path.to_owned(), what })
}

/// Settles what only the weight files of a folder tell: how they spell the names of their tensors.
pub(crate) fn respell(spec: &mut DecoderSpec, weights: &Weights) {
    if spec.family == "gemma3" {
        gemma3::respell(spec, weights);
    }
}

/// Compares the shape of every tensor that the decoder will ask for, so that a wrong file is refused before any work.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Format`] naming the tensor.
pub(crate) fn check_tensors(spec: &DecoderSpec, weights: &Weights, path: &Path) -> Result<()> {
    let check = |name: &str, expected: &[usize]| match weights.shape(name) {
        Some(shape) if shape == expected => Ok(()),
        Some(shape) => Err(Error::Format {
            path: path.to_owned(),
            what: format!("tensor {name} has shape {shape:?}, expected {expected:?}"),
        }),
        None => Err(Error::Missing { path: path.to_owned(), what: format!("tensor {name}") }),
    };
    if weights.contains(spec.names.head) {
        check(spec.names.head, &[spec.vocab, spec.hidden])?;
    }
    tensors(spec).iter().try_for_each(|(name, shape)| check(name, shape))
}

/// Names and shapes of the tensors that a decoder cannot be without: all but the output head and biases.
pub(crate) fn tensors(spec: &DecoderSpec) -> Vec<(String, Vec<usize>)> {
    let (hidden, ffn, heads) = (spec.hidden, spec.ffn, spec.heads);
    let (q_rows, kv_rows) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let names = &spec.names;
    let mut all =
        vec![(names.embedding.to_owned(), vec![spec.vocab, hidden]), (names.final_norm.to_owned(), vec![hidden])];
    for layer in 0..spec.layers {
        let mut add = |template: &str, shape: &[usize]| all.push((TensorNames::layer(template, layer), shape.to_vec()));
        add(names.attn_norm, &[hidden]);
        add(names.q, &[q_rows, hidden]);
        add(names.k, &[kv_rows, hidden]);
        add(names.v, &[kv_rows, hidden]);
        add(names.o, &[hidden, q_rows]);
        add(names.ffn_norm, &[hidden]);
        add(names.gate, &[ffn, hidden]);
        add(names.up, &[ffn, hidden]);
        add(names.down, &[hidden, ffn]);
        if spec.qk_norm {
            add(names.q_norm, &[heads.head_dim]);
            add(names.k_norm, &[heads.head_dim]);
        }
        if spec.post_norms {
            add(names.attn_post_norm, &[hidden]);
            add(names.ffn_post_norm, &[hidden]);
        }
    }
    all
}

/// Inverse frequencies `base^(-2i / dim)`, one a pair of dimensions
/// (Su et al., RoFormer, <https://arxiv.org/abs/2104.09864>).
fn frequencies(base: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| base.powf(-2.0 * i as f64 / dim as f64)).collect()
}

/// A rotary embedding without scaling of its cosines and sines.
fn rope(pairs: cupola_kernels::RopePairs, inv_freq: Vec<f64>) -> RopeSpec {
    RopeSpec { pairs, inv_freq, scale: 1.0 }
}
