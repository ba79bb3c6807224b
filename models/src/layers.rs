//! The layers of a decoder: one pass from token ids to the residual stream of the rows that are wanted.
//!
//! ```text
//!   tokens ─embed─> x ─┬─ norm ─ qkv ─ rope+store ─ attention ─ o ──(+)─┬─ norm ─ gate·up ─ down ──(+)─> x   per layer
//!                      └────────────────────────────────────────────────┴───────────────────────────┘
//! ```
//!
//! It is all that a device records of a step, so nothing in here may wait for results.

use cupola_kernels::{
    ActId, Attention, Backend, BlockId, BufferId, Epilogue, KvId, LinearId, Result, RopeId, RopeStore, Rows, SamplerId,
    SeqSpan, VectorId,
};

use crate::DecoderSpec;
use crate::decoder::LOGIT_ROWS;

/// Weights of one layer.
pub(crate) struct Layer {
    pub(crate) attn_norm: VectorId,
    pub(crate) qkv: LinearId,
    pub(crate) qk_norm: Option<(VectorId, VectorId)>,
    pub(crate) o: LinearId,
    pub(crate) attn_post_norm: Option<VectorId>,
    pub(crate) ffn_norm: VectorId,
    pub(crate) gate_up: LinearId,
    pub(crate) down: LinearId,
    pub(crate) ffn_post_norm: Option<VectorId>,
    pub(crate) slides: bool,
}

/// Working memory, `[max_batch_tokens, ...]` unless said otherwise.
pub(crate) struct Arenas {
    /// Residual stream, `[.., hidden]`.
    pub(crate) x: BufferId,
    /// Result of a sub-layer that is normed before it joins the residual stream, `[.., hidden]`.
    pub(crate) y: Option<BufferId>,
    /// Projections, `[.., (heads + 2 kv_heads) * head_dim]`.
    pub(crate) qkv: BufferId,
    /// Normed residual, `[.., hidden]`.
    pub(crate) normed: ActId,
    /// Attention's result, `[.., heads * head_dim]`.
    pub(crate) attended: ActId,
    /// Gated feed-forward, `[.., ffn]`.
    pub(crate) gated: ActId,
    /// Normed rows for the head, `[LOGIT_ROWS, hidden]`.
    pub(crate) head_in: ActId,
    /// `[LOGIT_ROWS, vocab]`.
    pub(crate) logits: BufferId,
    /// For `LOGIT_ROWS` rows, where the backend draws tokens.
    pub(crate) sampler: Option<SamplerId>,
}

/// Rows of one pass through the layers.
pub(crate) struct PassRows<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) spans: &'a [SeqSpan],
    /// Sequences and row numbers that the last layer finishes.
    pub(crate) last: (&'a [SeqSpan], &'a [u32]),
    pub(crate) block_table: &'a [BlockId],
}

/// What a pass through the layers needs beside a backend.
pub(crate) struct Layers<'a> {
    pub(crate) spec: &'a DecoderSpec,
    pub(crate) embedding: LinearId,
    pub(crate) layers: &'a [Layer],
    /// For layers that see everything, and for those with a window.
    pub(crate) ropes: (RopeId, RopeId),
    pub(crate) kv: KvId,
    pub(crate) arenas: &'a Arenas,
}

impl Layers<'_> {
    /// From token ids to the residual stream of the last rows.
    pub(crate) fn run(&self, backend: &mut dyn Backend, rows: &PassRows<'_>) -> Result<()> {
        let &Layers { spec, kv, arenas, .. } = self;
        backend.embed(self.embedding, rows.tokens, spec.embedding_scale, arenas.x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let rope = if layer.slides { self.ropes.1 } else { self.ropes.0 };
            layer.store_keys(i, backend, spec, (kv, rope), arenas, rows)?;
            let (spans, count) = if i + 1 < self.layers.len() {
                (rows.spans, rows.tokens.len())
            } else if rows.last.1.is_empty() {
                break;
            } else {
                for buffer in [arenas.x, arenas.qkv] {
                    backend.keep_rows(buffer, rows.last.1)?;
                }
                (rows.last.0, rows.last.1.len())
            };
            layer.attend(i, backend, spec, kv, arenas, (spans, rows.block_table, count))?;
            layer.feed_forward(backend, spec, arenas, count)?;
        }
        Ok(())
    }
}

impl Layer {
    /// Projects every row and stores its keys and values.
    fn store_keys(
        &self,
        index: usize,
        backend: &mut dyn Backend,
        spec: &DecoderSpec,
        (kv, rope): (KvId, RopeId),
        arenas: &Arenas,
        pass: &PassRows<'_>,
    ) -> Result<()> {
        let rows = pass.tokens.len();
        backend.rms_norm(arenas.x, Rows::First(rows), (self.attn_norm, spec.norm_eps), self.qkv, arenas.normed)?;
        backend.linear(arenas.normed, rows, self.qkv, Epilogue::Store, arenas.qkv)?;
        backend.rope_store(RopeStore {
            qkv: arenas.qkv,
            shape: spec.heads,
            rope,
            pairs: spec.rope.pairs,
            query_scale: spec.query_scale,
            qk_norm: self.qk_norm.map(|(q, k)| (q, k, spec.norm_eps)),
            kv,
            layer: index,
            spans: pass.spans,
            block_table: pass.block_table,
        })
    }

    /// Attention of the rows of these spans over what is stored, and its output projection.
    fn attend(
        &self,
        index: usize,
        backend: &mut dyn Backend,
        spec: &DecoderSpec,
        kv: KvId,
        arenas: &Arenas,
        (spans, block_table, rows): (&[SeqSpan], &[BlockId], usize),
    ) -> Result<()> {
        backend.attention(Attention {
            qkv: arenas.qkv,
            shape: spec.heads,
            softcap: spec.attention_softcap,
            window: spec.sliding.as_ref().filter(|_| self.slides).map(|s| s.window),
            kv,
            layer: index,
            spans,
            block_table,
            out: arenas.attended,
            consumer: self.o,
        })?;
        add_to_residual(backend, spec, arenas, (arenas.attended, rows), self.o, self.attn_post_norm)
    }

    fn feed_forward(&self, backend: &mut dyn Backend, spec: &DecoderSpec, arenas: &Arenas, rows: usize) -> Result<()> {
        backend.rms_norm(arenas.x, Rows::First(rows), (self.ffn_norm, spec.norm_eps), self.gate_up, arenas.normed)?;
        backend.gate_up(arenas.normed, rows, self.gate_up, spec.gate, self.down, arenas.gated)?;
        add_to_residual(backend, spec, arenas, (arenas.gated, rows), self.down, self.ffn_post_norm)
    }
}

/// `x += input * weight^T`, through a norm where the family has one there.
fn add_to_residual(
    backend: &mut dyn Backend,
    spec: &DecoderSpec,
    arenas: &Arenas,
    (input, rows): (ActId, usize),
    weight: LinearId,
    post_norm: Option<VectorId>,
) -> Result<()> {
    match (post_norm, arenas.y) {
        (Some(norm), Some(y)) => {
            backend.linear(input, rows, weight, Epilogue::Store, y)?;
            backend.rms_norm_add(y, rows, (norm, spec.norm_eps), arenas.x)?;
        }
        _ => backend.linear(input, rows, weight, Epilogue::Add, arenas.x)?,
    }
    Ok(())
}

impl Arenas {
    /// Allocates all of them for passes of up to `rows` rows.
    pub(crate) fn alloc(spec: &DecoderSpec, rows: usize, backend: &mut dyn Backend) -> Result<Self> {
        Ok(Self {
            x: backend.alloc_buffer(rows, spec.hidden)?,
            y: if spec.post_norms { Some(backend.alloc_buffer(rows, spec.hidden)?) } else { None },
            qkv: backend.alloc_buffer(rows, spec.heads.qkv_cols())?,
            normed: backend.alloc_act(rows, spec.hidden)?,
            attended: backend.alloc_act(rows, spec.heads.heads * spec.heads.head_dim)?,
            gated: backend.alloc_act(rows, spec.ffn)?,
            head_in: backend.alloc_act(LOGIT_ROWS, spec.hidden)?,
            logits: backend.alloc_buffer(LOGIT_ROWS, spec.vocab)?,
            sampler: backend.alloc_sampler(LOGIT_ROWS, spec.vocab)?,
        })
    }
}
