//! What a decoder-only transformer looks like, as plain data.
//!
//! A model family is a function from its metadata to a [`DecoderSpec`]; the one forward pass in `decoder.rs` reads
//! nothing else.

use cupola_kernels::{GateFn, HeadShape, KvLayout, KvType, RopePairs};

/// Shape and variations of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Family name, for people: `llama`, `gemma3`.
    pub family: String,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Attention heads.
    pub heads: HeadShape,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Tokens of the vocabulary, rows of the embedding.
    pub vocab: usize,
    /// Longest sequence the model was trained for, in tokens.
    pub max_positions: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Added to every norm weight (1.0 where a checkpoint stores `w - 1`).
    pub norm_offset: f32,
    /// Factor on embeddings.
    pub embedding_scale: f32,
    /// The gate's non-linearity.
    pub gate: GateFn,
    /// Factor on queries, usually `1 / sqrt(head_dim)`.
    pub query_scale: f32,
    /// Rotary embedding of layers that see everything.
    pub rope: RopeSpec,
    /// Layers that see a window only.
    pub sliding: Option<SlidingSpec>,
    /// RMS norm over each query and key head.
    pub qk_norm: bool,
    /// Norms after attention and feed-forward, before the residual is added.
    pub post_norms: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// `cap * tanh(score / cap)` on attention scores.
    pub attention_softcap: Option<f32>,
    /// `cap * tanh(logit / cap)` on logits.
    pub logit_softcap: Option<f32>,
    /// Names of the tensors in the weight files.
    pub names: TensorNames,
}

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Which dimensions turn together.
    pub pairs: RopePairs,
    /// Inverse frequencies, one a pair, with every scaling rule applied.
    pub inv_freq: Vec<f64>,
    /// Factor on cosines and sines (YaRN's attention factor, else 1).
    pub scale: f64,
}

/// Sliding-window layers.
#[derive(Clone, Debug, PartialEq)]
pub struct SlidingSpec {
    /// Positions seen, the own one included.
    pub window: usize,
    /// For each layer, whether it slides.
    pub layers: Vec<bool>,
    /// Rotary embedding of these layers.
    pub rope: RopeSpec,
}

/// Names of the tensors. `{}` stands for the layer's number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorNames {
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: &'static str,
    /// Output head, `[vocab, hidden]`; the embedding serves where the file has none.
    pub head: &'static str,
    /// Norm before the head.
    pub final_norm: &'static str,
    /// Norm before attention.
    pub attn_norm: &'static str,
    /// Query projection.
    pub q: &'static str,
    /// Key projection.
    pub k: &'static str,
    /// Value projection.
    pub v: &'static str,
    /// Output projection of attention.
    pub o: &'static str,
    /// Norm over query heads, with [`DecoderSpec::qk_norm`].
    pub q_norm: &'static str,
    /// Norm over key heads, with [`DecoderSpec::qk_norm`].
    pub k_norm: &'static str,
    /// Norm after attention, with [`DecoderSpec::post_norms`].
    pub attn_post_norm: &'static str,
    /// Norm before the feed-forward layer.
    pub ffn_norm: &'static str,
    /// Gate projection.
    pub gate: &'static str,
    /// Up projection.
    pub up: &'static str,
    /// Down projection.
    pub down: &'static str,
    /// Norm after the feed-forward layer, with [`DecoderSpec::post_norms`].
    pub ffn_post_norm: &'static str,
}

impl TensorNames {
    /// The name for layer `i`.
    pub fn layer(template: &str, i: usize) -> String {
        template.replacen("{}", &i.to_string(), 1)
    }
}

impl DecoderSpec {
    /// Shape of this decoder's key/value pool.
    pub fn kv_layout(&self, ty: KvType) -> KvLayout {
        KvLayout { layers: self.layers, kv_heads: self.heads.kv_heads, head_dim: self.heads.head_dim, ty }
    }
}
