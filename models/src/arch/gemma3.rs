//! Gemma 3 (text): norms before and after each half and over query and key heads, a tanh-GELU gate, and layers that see
//! a window, with a rotary embedding of their own, five for each layer that sees everything
//! (Gemma Team, Gemma 3 Technical Report, <https://arxiv.org/abs/2503.19786>).

use cupola_kernels::{GateFn, HeadShape, RopePairs};
use half::{bf16, f16};

use super::metadata::{self, gguf_frequencies, refuse_flags, scaled_frequencies};
use super::{MAX_LAYERS, frequencies, rope};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::spec::{DecoderSpec, SlidingSpec, TensorNames};
use crate::weights::Weights;
use crate::weights::gguf::Gguf;

/// Each so many-th layer sees everything, where a file does not say.
const PATTERN: usize = 6;
/// Base of the windowed layers' rotary embedding, where a file does not say.
const LOCAL_BASE: f64 = 10_000.0;
/// Layers of the 27B model, the one whose queries are scaled by the width of a head and not by its dimension. GGUF
/// files do not say so; every reader goes by this number.
const LAYERS_OF_27B: usize = 62;

/// Reads the keys of `gemma3.*`. Norm weights are complete in GGUF files.
pub(super) fn from_gguf(gguf: &Gguf, arch: &str) -> Result<DecoderSpec> {
    let key = |name: &str| format!("{arch}.{name}");
    let spec = metadata::from_gguf(gguf, arch)?;
    let HeadShape { heads, head_dim, .. } = spec.heads;
    let per_head = if spec.layers == LAYERS_OF_27B { spec.hidden.checked_div(heads).unwrap_or(0) } else { head_dim };
    let window = match gguf.integer(&key("attention.sliding_window"))? {
        None | Some(0) => None,
        Some(_) => Some(gguf.size(&key("attention.sliding_window"))?),
    };
    let pattern = key("attention.sliding_window_pattern");
    let slides = if gguf.is_array(&pattern) {
        gguf.numbers(&pattern)?.unwrap_or_default().into_iter().map(|slides| slides != 0.0).collect()
    } else {
        let period = if gguf.contains(&pattern) { gguf.size(&pattern)? } else { PATTERN };
        repeat(period, spec.layers)
    };
    let local_base = gguf.float(&key("rope.freq_base_swa"))?.unwrap_or(LOCAL_BASE);
    let softcap = |name: &str| gguf.float(&key(name)).map(positive);
    Ok(DecoderSpec {
        rope: rope(RopePairs::Halves, gguf_frequencies(gguf, arch, head_dim)?),
        sliding: window.map(|window| sliding(window, slides, local_base, head_dim)),
        embedding_scale: (spec.hidden as f32).sqrt(),
        attention_softcap: softcap("attn_logit_softcapping")?,
        logit_softcap: softcap("final_logit_softcapping")?,
        ..gemma(spec, per_head as f64)
    })
}

/// Reads a `config.json` of `Gemma3ForCausalLM` (`gemma3_text`), or the text part of one of
/// `Gemma3ForConditionalGeneration` (`gemma3`). Files leave out whatever equals the default of `Gemma3TextConfig`.
pub(super) fn from_config(whole: &HfConfig) -> Result<DecoderSpec> {
    let nested = whole.section("text_config")?;
    let config = nested.as_ref().unwrap_or(whole);
    let size = |key: &str, default: usize| Ok::<_, Error>(config.optional_size(key)?.unwrap_or(default));
    let hidden = size("hidden_size", 2304)?;
    let shape = HeadShape {
        heads: size("num_attention_heads", 8)?,
        kv_heads: size("num_key_value_heads", 4)?,
        head_dim: size("head_dim", 256)?,
    };
    let layers = size("num_hidden_layers", 26)?;
    refuse_flags(config, &["attention_bias"], "projections of this family have no bias")?;
    refuse_flags(config, &["use_bidirectional_attention"], "choose a model that generates text, not embeddings")?;
    if let Some(act) = config.optional_text("hidden_activation")?.filter(|act| *act != "gelu_pytorch_tanh") {
        let hint = "this family uses gelu_pytorch_tanh".into();
        return Err(Error::Unsupported { what: format!("hidden_activation {act}"), hint });
    }

    // Newer files keep a section for each kind of layer; older ones two bases and one scaling, which is the global one.
    let parameters = config.section("rope_parameters")?;
    let section = |kind: &str| match &parameters {
        Some(all) => all.section(kind),
        None => Ok(None),
    };
    let (global, local) = (section("full_attention")?, section("sliding_attention")?);
    let base = |section: &Option<HfConfig>, key: &str, default: f64| {
        let stated = match section {
            Some(section) => section.number("rope_theta")?,
            None => config.number(key)?,
        };
        Ok::<_, Error>(stated.unwrap_or(default))
    };
    let global_base = base(&global, "rope_theta", 1_000_000.0)?;
    let local_base = base(&local, "rope_local_base_freq", LOCAL_BASE)?;
    let scaling = match global {
        Some(section) => Some(section),
        None => config.section("rope_scaling")?,
    };
    let global_freq = scaled_frequencies(global_base, shape.head_dim, scaling.as_ref())?;

    let slides = match config.get("layer_types") {
        Some(types) => layer_types(types).ok_or_else(|| Error::Format {
            path: config.path().to_owned(),
            what: format!("layer_types is {types}, expected a list of sliding_attention and full_attention"),
        })?,
        None => match config.optional_size("sliding_window_pattern")? {
            Some(period) => repeat(period, layers),
            None => repeat(size("_sliding_window_pattern", PATTERN)?, layers),
        },
    };
    let number = |key: &str, default: f64| Ok::<_, Error>(config.number(key)?.unwrap_or(default));
    let spec = metadata::plain("gemma3", hidden, shape, size("vocab_size", 262_208)?);
    Ok(DecoderSpec {
        layers,
        ffn: size("intermediate_size", 9216)?,
        max_positions: size("max_position_embeddings", 131_072)?,
        norm_eps: number("rms_norm_eps", 1e-6)? as f32,
        // Checkpoints store how far a norm weight is from one.
        norm_offset: 1.0,
        rope: rope(RopePairs::Halves, global_freq),
        sliding: Some(sliding(size("sliding_window", 4096)?, slides, local_base, shape.head_dim)),
        embedding_scale: rounded((hidden as f32).sqrt(), dtype(config)?.or(dtype(whole)?)),
        attention_softcap: positive(config.number("attn_logit_softcapping")?),
        logit_softcap: positive(config.number("final_logit_softcapping")?),
        names: SPELLINGS[usize::from(nested.is_some())],
        ..gemma(spec, number("query_pre_attn_scalar", 256.0)?)
    })
}

/// What all models of the family have in common.
fn gemma(spec: DecoderSpec, query_scalar: f64) -> DecoderSpec {
    DecoderSpec {
        gate: GateFn::GeluTanh,
        query_scale: (1.0 / query_scalar.max(1.0).sqrt()) as f32,
        qk_norm: true,
        post_norms: true,
        ..spec
    }
}

/// Files write 0 or nothing for "no cap".
fn positive(cap: Option<f64>) -> Option<f32> {
    cap.map(|cap| cap as f32).filter(|cap| *cap > 0.0)
}

fn sliding(window: usize, layers: Vec<bool>, base: f64, head_dim: usize) -> SlidingSpec {
    SlidingSpec { window, layers, rope: rope(RopePairs::Halves, frequencies(base, head_dim)) }
}

/// All layers slide but each `period`-th; a period of 0 lets all of them slide.
fn repeat(period: usize, layers: usize) -> Vec<bool> {
    (1..=layers.min(MAX_LAYERS)).map(|layer| period == 0 || !layer.is_multiple_of(period)).collect()
}

fn layer_types(types: &serde_json::Value) -> Option<Vec<bool>> {
    let slides = |kind: &serde_json::Value| match kind.as_str()? {
        "sliding_attention" => Some(true),
        "full_attention" => Some(false),
        _ => None,
    };
    types.as_array()?.iter().map(slides).collect()
}

/// The type that a checkpoint is computed in, by the older and the newer name of the key.
fn dtype(config: &HfConfig) -> Result<Option<&str>> {
    match config.optional_text("dtype")? {
        Some(dtype) => Ok(Some(dtype)),
        None => config.optional_text("torch_dtype"),
    }
}

/// The embedding's factor as training had it: in the type of the weights.
fn rounded(scale: f32, dtype: Option<&str>) -> f32 {
    match dtype {
        Some("bfloat16") => bf16::from_f32(scale).to_f32(),
        Some("float16") => f16::from_f32(scale).to_f32(),
        _ => scale,
    }
}

/// Names in checkpoints whose text model's names begin with `$model`.
macro_rules! names {
    ($model:literal, $head:literal) => {
        TensorNames {
            embedding: concat!($model, "embed_tokens.weight"),
            head: $head,
            final_norm: concat!($model, "norm.weight"),
            attn_norm: concat!($model, "layers.{}.input_layernorm.weight"),
            q: concat!($model, "layers.{}.self_attn.q_proj.weight"),
            k: concat!($model, "layers.{}.self_attn.k_proj.weight"),
            v: concat!($model, "layers.{}.self_attn.v_proj.weight"),
            o: concat!($model, "layers.{}.self_attn.o_proj.weight"),
            q_norm: concat!($model, "layers.{}.self_attn.q_norm.weight"),
            k_norm: concat!($model, "layers.{}.self_attn.k_norm.weight"),
            attn_post_norm: concat!($model, "layers.{}.post_attention_layernorm.weight"),
            ffn_norm: concat!($model, "layers.{}.pre_feedforward_layernorm.weight"),
            gate: concat!($model, "layers.{}.mlp.gate_proj.weight"),
            up: concat!($model, "layers.{}.mlp.up_proj.weight"),
            down: concat!($model, "layers.{}.mlp.down_proj.weight"),
            ffn_post_norm: concat!($model, "layers.{}.post_feedforward_layernorm.weight"),
        }
    };
}

/// Names in checkpoints: of text models, of models with a vision part, and of those as newer tools write them.
pub(crate) const SPELLINGS: [TensorNames; 3] = [
    names!("model.", "lm_head.weight"),
    names!("language_model.model.", "language_model.lm_head.weight"),
    names!("model.language_model.", "lm_head.weight"),
];

/// Takes the names that the weight files use; `config.json` does not tell.
pub(super) fn respell(spec: &mut DecoderSpec, weights: &Weights) {
    if let Some(names) = SPELLINGS.iter().find(|names| weights.contains(names.embedding)) {
        spec.names = *names;
    }
}
