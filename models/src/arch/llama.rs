//! Llama 2 and 3, SmolLM2, Mistral: RMS norms before each half, SwiGLU, rotary embeddings, grouped-query attention.

use cupola_kernels::{HeadShape, RopePairs};

use super::metadata::{self, gguf_frequencies, refuse_flags, scaled_frequencies};
use super::{HF_NAMES, rope};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::spec::{DecoderSpec, SlidingSpec};
use crate::weights::gguf::Gguf;

/// Reads the keys of `<arch>.*`.
pub(super) fn from_gguf(gguf: &Gguf, arch: &str) -> Result<DecoderSpec> {
    let spec = metadata::from_gguf(gguf, arch)?;
    let inv_freq = gguf_frequencies(gguf, arch, spec.heads.head_dim)?;
    Ok(DecoderSpec { rope: rope(RopePairs::Interleaved, inv_freq), ..spec })
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
    refuse_flags(config, &["attention_bias", "mlp_bias"], "projections of this family have no bias")?;
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
        ..metadata::plain(config.text("model_type")?, hidden, shape, config.size("vocab_size")?)
    };
    spec.rope = rope(RopePairs::Halves, config_frequencies(config, head_dim)?);
    if let Some(window) = config.optional_size("sliding_window")? {
        let layers = vec![true; layers.min(super::MAX_LAYERS)];
        spec.sliding = Some(SlidingSpec { window: window.max(1), layers, rope: spec.rope.clone() });
    }
    Ok(spec)
}

/// Frequencies after `rope_scaling`; newer files keep base and scaling together in `rope_parameters`.
fn config_frequencies(config: &HfConfig, head_dim: usize) -> Result<Vec<f64>> {
    let parameters = config.section("rope_parameters")?;
    let base = match &parameters {
        Some(section) => section.number("rope_theta")?,
        None => None,
    };
    let base = match base {
        Some(base) => base,
        None => config.number("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = match parameters {
        Some(section) => Some(section),
        None => config.section("rope_scaling")?,
    };
    scaled_frequencies(base, head_dim, scaling.as_ref())
}
