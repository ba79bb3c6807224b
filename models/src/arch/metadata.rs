//! What the families read alike: sizes from GGUF keys, and rotary frequencies with their scaling.

use std::f64::consts::TAU;

use cupola_kernels::{GateFn, HeadShape, RopePairs};

use super::{GGUF_NAMES, HF_NAMES, frequencies, rope};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::spec::DecoderSpec;
use crate::weights::gguf::Gguf;

/// A decoder without any variation, as Llama 2 is one.
pub(super) fn plain(family: &str, hidden: usize, heads: HeadShape, vocab: usize) -> DecoderSpec {
    DecoderSpec {
        family: family.to_owned(),
        layers: 0,
        hidden,
        heads,
        ffn: 0,
        vocab,
        max_positions: 0,
        norm_eps: 0.0,
        norm_offset: 0.0,
        embedding_scale: 1.0,
        gate: GateFn::Silu,
        query_scale: 1.0 / (heads.head_dim.max(1) as f32).sqrt(),
        rope: rope(RopePairs::Halves, Vec::new()),
        sliding: None,
        qk_norm: false,
        post_norms: false,
        qkv_bias: false,
        attention_softcap: None,
        logit_softcap: None,
        names: HF_NAMES,
    }
}

/// A plain decoder with the sizes that every GGUF file states under `<arch>.*`; its rotary embedding is the family's
/// to add.
pub(super) fn from_gguf(gguf: &Gguf, arch: &str) -> Result<DecoderSpec> {
    let key = |name: &str| format!("{arch}.{name}");
    let hidden = gguf.size(&key("embedding_length"))?;
    let heads = gguf.size(&key("attention.head_count"))?;
    let optional = |name: &str, default: usize| {
        if gguf.contains(&key(name)) { gguf.size(&key(name)) } else { Ok(default) }
    };
    let head_dim = optional("attention.key_length", hidden.checked_div(heads).unwrap_or(0))?;
    let shape = HeadShape { heads, kv_heads: optional("attention.head_count_kv", heads)?, head_dim };
    for (name, expected) in [("attention.value_length", head_dim), ("rope.dimension_count", head_dim)] {
        let got = optional(name, expected)?;
        // Without heads there is nothing to compare with; that is refused by name later.
        if got != expected && expected > 0 {
            return Err(Error::Unsupported {
                what: format!("{} = {got}", key(name)),
                hint: format!("it must equal the head dimension {expected}"),
            });
        }
    }
    if optional("expert_count", 0)? != 0 {
        return Err(Error::Unsupported { what: "a mixture of experts".into(), hint: "choose a dense model".into() });
    }
    let vocab = match gguf.shape(GGUF_NAMES.embedding) {
        Some(&[rows, _]) => rows,
        _ => {
            return Err(Error::Missing {
                path: gguf.path().to_owned(),
                what: format!("matrix {}", GGUF_NAMES.embedding),
            });
        }
    };
    let norm_eps = gguf.float(&key("attention.layer_norm_rms_epsilon"))?;
    Ok(DecoderSpec {
        layers: gguf.size(&key("block_count"))?,
        ffn: gguf.size(&key("feed_forward_length"))?,
        max_positions: gguf.size(&key("context_length"))?,
        norm_eps: norm_eps.ok_or_else(|| gguf.missing(&key("attention.layer_norm_rms_epsilon")))? as f32,
        names: GGUF_NAMES,
        qkv_bias: gguf.shape("blk.0.attn_q.bias").is_some(),
        ..plain(arch, hidden, shape, vocab)
    })
}

/// Frequencies by `<arch>.rope.freq_base` and `<arch>.rope.scaling.*`.
pub(super) fn gguf_frequencies(gguf: &Gguf, arch: &str, head_dim: usize) -> Result<Vec<f64>> {
    let key = |name: &str| format!("{arch}.rope.{name}");
    let base = gguf.float(&key("freq_base"))?.unwrap_or(10_000.0);
    let mut inv_freq = frequencies(base, head_dim);
    match gguf.text(&key("scaling.type"))? {
        None | Some("none") => {}
        Some("linear") => {
            let factor = gguf.float(&key("scaling.factor"))?.unwrap_or(1.0);
            inv_freq.iter_mut().for_each(|f| *f /= factor);
        }
        Some(other) => return Err(unknown_scaling(other)),
    }
    Ok(inv_freq)
}

/// Frequencies of `base` as a `rope_scaling` object of `config.json` changes them.
pub(super) fn scaled_frequencies(base: f64, head_dim: usize, scaling: Option<&HfConfig>) -> Result<Vec<f64>> {
    let mut inv_freq = frequencies(base, head_dim);
    let Some(scaling) = scaling else { return Ok(inv_freq) };
    let kind = match scaling.optional_text("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.optional_text("type")?,
    };
    match kind.unwrap_or("default") {
        "default" => {}
        "linear" => {
            let factor = scaling.required_number("factor")?;
            inv_freq.iter_mut().for_each(|f| *f /= factor);
        }
        "llama3" => {
            let factor = scaling.required_number("factor")?;
            let low = scaling.required_number("low_freq_factor")?;
            let high = scaling.required_number("high_freq_factor")?;
            let trained = scaling.required_number("original_max_position_embeddings")?;
            // Long waves are stretched by `factor`, short ones kept, those between blended.
            for freq in &mut inv_freq {
                let turns = trained * *freq / TAU;
                let keep =
                    if high > low { ((turns - low) / (high - low)).clamp(0.0, 1.0) } else { f64::from(turns >= high) };
                *freq = *freq * keep + *freq / factor * (1.0 - keep);
            }
        }
        other => return Err(unknown_scaling(other)),
    }
    Ok(inv_freq)
}

/// Refuses a `config.json` that sets one of these booleans.
pub(super) fn refuse_flags(config: &HfConfig, keys: &[&str], hint: &str) -> Result<()> {
    for key in keys {
        if config.boolean(key)?.unwrap_or(false) {
            return Err(Error::Unsupported {
                what: format!("{key} = true in {}", config.path().display()),
                hint: hint.to_owned(),
            });
        }
    }
    Ok(())
}

fn unknown_scaling(kind: &str) -> Error {
    Error::Unsupported { what: format!("rope scaling {kind}"), hint: "known kinds are linear and llama3".into() }
}
