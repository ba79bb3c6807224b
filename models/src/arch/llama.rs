//! Llama 2 and 3, SmolLM2, Mistral: RMS norms before each half, SwiGLU, rotary embeddings, grouped-query attention.

use std::f64::consts::TAU;

use cupola_kernels::{GateFn, HeadShape, RopePairs};

use super::{GGUF_NAMES, HF_NAMES, frequencies, rope};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::spec::{DecoderSpec, SlidingSpec};
use crate::weights::gguf::Gguf;

/// Reads the keys of `<arch>.*`.
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
    let mut spec = DecoderSpec {
        layers: gguf.size(&key("block_count"))?,
        ffn: gguf.size(&key("feed_forward_length"))?,
        max_positions: gguf.size(&key("context_length"))?,
        norm_eps: norm_eps.ok_or_else(|| gguf.missing(&key("attention.layer_norm_rms_epsilon")))? as f32,
        names: GGUF_NAMES,
        qkv_bias: gguf.shape("blk.0.attn_q.bias").is_some(),
        ..plain(arch, hidden, shape, vocab)
    };
    let base = gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let mut inv_freq = frequencies(base, head_dim);
    match gguf.text(&key("rope.scaling.type"))? {
        None | Some("none") => {}
        Some("linear") => {
            let factor = gguf.float(&key("rope.scaling.factor"))?.unwrap_or(1.0);
            inv_freq.iter_mut().for_each(|f| *f /= factor);
        }
        Some(other) => return Err(unknown_scaling(other)),
    }
    spec.rope = rope(RopePairs::Interleaved, inv_freq);
    Ok(spec)
}

/// Divides the frequencies by the factors of `rope_freqs.weight`: how GGUF files carry Llama 3's scaling.
pub(super) fn apply_rope_factors(spec: &mut DecoderSpec, factors: &[f32]) -> std::result::Result<(), String> {
    if factors.len() != spec.rope.inv_freq.len() || !factors.iter().all(|f| f.is_finite() && *f > 0.0) {
        return Err(format!(
            "tensor rope_freqs.weight has {} values, expected {} positive ones",
            factors.len(),
            spec.rope.inv_freq.len()
        ));
    }
    spec.rope.inv_freq.iter_mut().zip(factors).for_each(|(freq, factor)| *freq /= f64::from(*factor));
    Ok(())
}

/// Reads a `config.json` of `LlamaForCausalLM` or `MistralForCausalLM`.
pub(super) fn from_config(config: &HfConfig) -> Result<DecoderSpec> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let head_dim = match config.optional_size("head_dim")? {
        Some(dim) => dim,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    let kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(heads);
    let shape = HeadShape { heads, kv_heads, head_dim };
    for key in ["attention_bias", "mlp_bias"] {
        if config.boolean(key)?.unwrap_or(false) {
            return Err(Error::Unsupported {
                what: format!("{key} = true in {}", config.path().display()),
                hint: "projections of this family have no bias".into(),
            });
        }
    }
    if let Some(act) = config.optional_text("hidden_act")?.filter(|act| *act != "silu") {
        return Err(Error::Unsupported { what: format!("hidden_act {act}"), hint: "this family uses silu".into() });
    }
    let layers = config.size("num_hidden_layers")?;
    let mut spec = DecoderSpec {
        layers,
        ffn: config.size("intermediate_size")?,
        max_positions: config.size("max_position_embeddings")?,
        norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        names: HF_NAMES,
        ..plain(config.text("model_type")?, hidden, shape, config.size("vocab_size")?)
    };
    spec.rope = rope(RopePairs::Halves, scaled_frequencies(config, head_dim)?);
    if let Some(window) = config.optional_size("sliding_window")? {
        let layers = vec![true; layers.min(super::MAX_LAYERS)];
        spec.sliding = Some(SlidingSpec { window: window.max(1), layers, rope: spec.rope.clone() });
    }
    Ok(spec)
}

/// Frequencies after `rope_scaling`; newer files keep base and scaling together in `rope_parameters`.
fn scaled_frequencies(config: &HfConfig, head_dim: usize) -> Result<Vec<f64>> {
    let parameters = config.section("rope_parameters")?;
    let scaling = match parameters {
        Some(_) => parameters.clone(),
        None => config.section("rope_scaling")?,
    };
    let base = match &parameters {
        Some(section) => section.number("rope_theta")?,
        None => None,
    };
    let base = match base {
        Some(base) => base,
        None => config.number("rope_theta")?.unwrap_or(10_000.0),
    };
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

fn unknown_scaling(kind: &str) -> Error {
    Error::Unsupported { what: format!("rope scaling {kind}"), hint: "known kinds are linear and llama3".into() }
}

/// What all models of the family have in common.
fn plain(family: &str, hidden: usize, heads: HeadShape, vocab: usize) -> DecoderSpec {
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
