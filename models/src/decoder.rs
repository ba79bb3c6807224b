//! The one forward pass: a decoder-only transformer, driven by a [`DecoderSpec`], over the ops of a [`Backend`].
//!
//! ```text
//!   tokens ─embed─> x ─┬─ norm ─ qkv ─ rope+store ─ attention ─ o ──(+)─┬─ norm ─ gate·up ─ down ──(+)─> x   per layer
//!                      └────────────────────────────────────────────────┴───────────────────────────┘
//!   x[outputs] ─ final norm ─ head ─> argmax | logits ─> tokens drawn, a bounded number of rows at a time
//! ```
//!
//! All arenas are allocated in [`Decoder::load`] from [`DecoderLimits`]; a forward pass allocates nothing.

use cupola_kernels::{
    ActId, Attention, Backend, BlockId, BufferId, Draw, DrawRows, Drawn, Epilogue, KvId, KvType, LinearId, PartOrder,
    RopeId, RopeStore, Rows, SamplerId, SeqSpan, VectorId,
};

use crate::last_rows::LastRows;
use crate::spec::TensorNames;
use crate::weights::Weights;
use crate::{Batch, DecoderSpec, Error, Model, Result};

/// Rows of logits that exist at one time. More output rows are computed in several rounds, so that a large vocabulary
/// times many sequences stays a small, fixed piece of memory.
const LOGIT_ROWS: usize = 32;

/// Sizes fixed at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Most rows of one forward pass.
    pub max_batch_tokens: usize,
    /// Blocks of the key/value pool.
    pub kv_blocks: usize,
    /// What keys and values are stored as.
    pub kv_type: KvType,
    /// Longest sequence, in tokens.
    pub max_model_len: usize,
}

impl DecoderLimits {
    /// Rows of logits that exist at one time.
    pub const LOGIT_ROWS: usize = LOGIT_ROWS;

    /// Bytes of the arenas that a decoder of this shape allocates beside its weights and key/value pool.
    pub fn arena_bytes(&self, spec: &DecoderSpec) -> u64 {
        let float = size_of::<f32>();
        let heads = spec.heads.heads * spec.heads.head_dim;
        let residual = if spec.post_norms { 2 * spec.hidden } else { spec.hidden };
        // An activation arena holds int8 values with two f32 scales a block of 32, or f32 values: count the larger.
        let row = (residual + spec.heads.qkv_cols() + spec.hidden + heads + spec.ffn) * float;
        let rope = (1 + usize::from(spec.sliding.is_some())) * self.max_model_len * spec.heads.head_dim * float;
        (self.max_batch_tokens * row + LOGIT_ROWS * (spec.vocab + spec.hidden) * float + rope) as u64
    }
}

/// A loaded model that runs batches.
pub struct Decoder {
    spec: DecoderSpec,
    limits: DecoderLimits,
    backend: Box<dyn Backend>,
    embedding: LinearId,
    head: LinearId,
    final_norm: VectorId,
    layers: Vec<Layer>,
    rope: RopeId,
    sliding_rope: Option<RopeId>,
    kv: KvId,
    arenas: Arenas,
    last: LastRows,
    argmax: Vec<u32>,
    unsaved: Option<cupola_kernels::Error>,
}

struct Layer {
    attn_norm: VectorId,
    qkv: LinearId,
    qk_norm: Option<(VectorId, VectorId)>,
    o: LinearId,
    attn_post_norm: Option<VectorId>,
    ffn_norm: VectorId,
    gate_up: LinearId,
    down: LinearId,
    ffn_post_norm: Option<VectorId>,
    slides: bool,
}

/// Working memory, `[max_batch_tokens, ...]` unless said otherwise.
struct Arenas {
    /// Residual stream, `[.., hidden]`.
    x: BufferId,
    /// Result of a sub-layer that is normed before it joins the residual stream, `[.., hidden]`.
    y: Option<BufferId>,
    /// Projections, `[.., (heads + 2 kv_heads) * head_dim]`.
    qkv: BufferId,
    /// Normed residual, `[.., hidden]`.
    normed: ActId,
    /// Attention's result, `[.., heads * head_dim]`.
    attended: ActId,
    /// Gated feed-forward, `[.., ffn]`.
    gated: ActId,
    /// Normed rows for the head, `[LOGIT_ROWS, hidden]`.
    head_in: ActId,
    /// `[LOGIT_ROWS, vocab]`.
    logits: BufferId,
    /// For `LOGIT_ROWS` rows, where the backend draws tokens.
    sampler: Option<SamplerId>,
}

impl Decoder {
    /// Packs the weights of `model` for `backend` and allocates every arena. `progress(done, total)` is called once a
    /// layer.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape than the model's metadata say, or a type without a kernel.
    pub fn load(
        model: &Model,
        mut backend: Box<dyn Backend>,
        limits: DecoderLimits,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let spec = model.spec.clone();
        let mut loader = Loader { spec: &spec, weights: &model.weights, backend: backend.as_mut() };
        let names = &spec.names;

        let embedding = loader.linear(&[(names.embedding.to_owned(), spec.vocab)], spec.hidden)?;
        let head = if model.weights.contains(names.head) {
            loader.linear(&[(names.head.to_owned(), spec.vocab)], spec.hidden)?
        } else {
            embedding
        };
        let final_norm = loader.norm(names.final_norm.to_owned(), spec.hidden)?;
        let mut layers = Vec::with_capacity(spec.layers);
        for i in 0..spec.layers {
            layers.push(loader.layer(i)?);
            progress(i + 1, spec.layers);
        }
        let unsaved = backend.weights_loaded().err();

        let positions = limits.max_model_len;
        let rope = backend.load_rope(&spec.rope.inv_freq, spec.rope.scale, positions)?;
        let sliding_rope = match &spec.sliding {
            Some(sliding) => Some(backend.load_rope(&sliding.rope.inv_freq, sliding.rope.scale, positions)?),
            None => None,
        };
        let kv = backend.alloc_kv(spec.kv_layout(limits.kv_type), limits.kv_blocks)?;
        let arenas = Arenas::alloc(&spec, &limits, backend.as_mut())?;
        Ok(Self {
            spec,
            limits,
            backend,
            embedding,
            head,
            final_norm,
            layers,
            rope,
            sliding_rope,
            kv,
            arenas,
            last: LastRows::with_capacity(limits.max_batch_tokens),
            argmax: Vec::with_capacity(limits.max_batch_tokens),
            unsaved,
        })
    }

    /// Why packed weights could not be kept for the next start, if they were to be.
    pub fn unsaved(&self) -> Option<&cupola_kernels::Error> {
        self.unsaved.as_ref()
    }

    /// Shape of this model.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Sizes this decoder was built for.
    pub fn limits(&self) -> DecoderLimits {
        self.limits
    }

    /// The device that runs it, for people.
    pub fn describe_backend(&self) -> String {
        self.backend.describe()
    }

    /// Bytes held in weights, arenas and key/value pool.
    pub fn allocated_bytes(&self) -> u64 {
        self.backend.allocated_bytes()
    }

    /// Runs one batch through every layer: writes its keys and values, and makes its output rows ready for
    /// [`Decoder::argmax`] (greedy batches) or [`Decoder::for_each_logits`] and [`Decoder::draw`] (all others).
    ///
    /// # Errors
    /// A batch that is larger than the limits, or a token id beyond the vocabulary.
    pub fn forward(&mut self, batch: &Batch) -> Result<()> {
        let (backend, arenas, spec) = (self.backend.as_mut(), &self.arenas, &self.spec);
        let rows = batch.tokens.len();
        if rows > self.limits.max_batch_tokens {
            return Err(cupola_kernels::Error::Shape {
                op: "forward",
                expected: format!("at most {} rows", self.limits.max_batch_tokens),
                got: rows.to_string(),
            }
            .into());
        }
        backend.embed(self.embedding, &batch.tokens, spec.embedding_scale, arenas.x)?;
        self.last.set(batch);
        for (i, layer) in self.layers.iter().enumerate() {
            let rope = if layer.slides { self.sliding_rope.unwrap_or(self.rope) } else { self.rope };
            layer.store_keys(i, backend, spec, (self.kv, rope), arenas, batch)?;
            let (spans, rows) = if i + 1 < self.layers.len() {
                (&batch.spans, rows)
            } else if batch.outputs.is_empty() {
                break;
            } else {
                for buffer in [arenas.x, arenas.qkv] {
                    backend.keep_rows(buffer, &batch.outputs)?;
                }
                (&self.last.spans, batch.outputs.len())
            };
            layer.attend(i, backend, spec, self.kv, arenas, (spans, &batch.block_table, rows))?;
            layer.feed_forward(backend, spec, arenas, rows)?;
        }
        self.argmax.clear();
        if batch.greedy {
            for start in (0..self.last.outputs.len()).step_by(LOGIT_ROWS) {
                let rows = self.norm_for_head(start)?;
                self.backend.linear_argmax(self.arenas.head_in, rows, self.head, &mut self.argmax)?;
            }
        }
        Ok(())
    }

    /// After a greedy batch: the most likely token of each output row.
    pub fn argmax(&self) -> &[u32] {
        &self.argmax
    }

    /// Calls `f(output index, logits)` for every output row of the last batch, several at a time on the worker threads.
    /// `f` may change the logits.
    pub fn for_each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        let cap = self.spec.logit_softcap;
        for start in (0..self.last.outputs.len()).step_by(LOGIT_ROWS) {
            let rows = self.logits(start)?;
            self.backend.take_rows(self.arenas.logits, Rows::First(rows), &|row, logits| {
                softcap(cap, logits);
                f(start + row, logits);
            })?;
        }
        Ok(())
    }

    /// True when the backend draws tokens, which is what [`Decoder::draw`] needs.
    pub fn draws(&self) -> bool {
        self.arenas.sampler.is_some()
    }

    /// Draws a token for the output rows of the last batch that have a draw in `draws`, one place an output row; `drawn`
    /// receives these tokens in order. For the other rows it calls `f` as [`Decoder::for_each_logits`] does.
    ///
    /// # Errors
    /// A number of draws that is not that of the output rows, a backend that draws no tokens, and what
    /// [`cupola_kernels::Backend::draw`] refuses.
    pub fn draw(
        &mut self,
        draws: &[Option<Draw<'_>>],
        drawn: &mut Vec<Drawn>,
        f: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<()> {
        let (Some(sampler), true) = (self.arenas.sampler, draws.len() == self.last.outputs.len()) else {
            return Err(cupola_kernels::Error::Shape {
                op: "draw",
                expected: format!("{} rows, on a device that draws tokens", self.last.outputs.len()),
                got: format!("{} on {}", draws.len(), self.backend.describe()),
            }
            .into());
        };
        let cap = self.spec.logit_softcap;
        let (mut picked, mut others, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        drawn.clear();
        for (start, draws) in (0..).step_by(LOGIT_ROWS).zip(draws.chunks(LOGIT_ROWS)) {
            self.logits(start)?;
            picked.clear();
            others.clear();
            for (row, draw) in (0..).zip(draws) {
                match draw {
                    Some(draw) => picked.push((row, *draw)),
                    None => others.push(row),
                }
            }
            let logits = self.arenas.logits;
            if !picked.is_empty() {
                self.backend.draw(DrawRows { sampler, logits, softcap: cap, draws: &picked }, &mut tokens)?;
                drawn.append(&mut tokens);
            }
            self.backend.take_rows(logits, Rows::Picked(&others), &|i, logits| {
                softcap(cap, logits);
                f(start + others[i] as usize, logits);
            })?;
        }
        Ok(())
    }

    /// The logits of up to [`LOGIT_ROWS`] output rows from index `start` on; returns how many.
    fn logits(&mut self, start: usize) -> Result<usize> {
        let rows = self.norm_for_head(start)?;
        self.backend.linear(self.arenas.head_in, rows, self.head, Epilogue::Store, self.arenas.logits)?;
        Ok(rows)
    }

    /// Norms up to [`LOGIT_ROWS`] output rows from index `start` on; returns how many.
    fn norm_for_head(&mut self, start: usize) -> Result<usize> {
        let picked = &self.last.outputs[start..self.last.outputs.len().min(start + LOGIT_ROWS)];
        let norm = (self.final_norm, self.spec.norm_eps);
        self.backend.rms_norm(self.arenas.x, Rows::Picked(picked), norm, self.head, self.arenas.head_in)?;
        Ok(picked.len())
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
        batch: &Batch,
    ) -> Result<()> {
        let rows = batch.tokens.len();
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
            spans: &batch.spans,
            block_table: &batch.block_table,
        })?;
        Ok(())
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

/// `logit = cap * tanh(logit / cap)`, where the model has a cap.
fn softcap(cap: Option<f32>, logits: &mut [f32]) {
    if let Some(cap) = cap {
        logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
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
    fn alloc(spec: &DecoderSpec, limits: &DecoderLimits, backend: &mut dyn Backend) -> Result<Self> {
        let rows = limits.max_batch_tokens;
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

/// Moves tensors from their files into a backend, checking every shape against the spec.
struct Loader<'a> {
    spec: &'a DecoderSpec,
    weights: &'a Weights,
    backend: &'a mut dyn Backend,
}

impl Loader<'_> {
    fn layer(&mut self, i: usize) -> Result<Layer> {
        let (spec, names) = (self.spec, &self.spec.names);
        let name = |template: &str| TensorNames::layer(template, i);
        let heads = spec.heads;
        let (q_rows, kv_rows) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);

        let qkv_parts = [(name(names.q), q_rows), (name(names.k), kv_rows), (name(names.v), kv_rows)];
        let bias = if spec.qkv_bias { Some(self.biases(&qkv_parts)?) } else { None };
        Ok(Layer {
            attn_norm: self.norm(name(names.attn_norm), spec.hidden)?,
            qkv: self.pack(&qkv_parts, spec.hidden, PartOrder::Concat, bias.as_deref())?,
            qk_norm: if spec.qk_norm {
                Some((self.norm(name(names.q_norm), heads.head_dim)?, self.norm(name(names.k_norm), heads.head_dim)?))
            } else {
                None
            },
            o: self.linear(&[(name(names.o), spec.hidden)], q_rows)?,
            attn_post_norm: self.post_norm(name(names.attn_post_norm))?,
            ffn_norm: self.norm(name(names.ffn_norm), spec.hidden)?,
            gate_up: self.pack(
                &[(name(names.gate), spec.ffn), (name(names.up), spec.ffn)],
                spec.hidden,
                PartOrder::GateUp,
                None,
            )?,
            down: self.linear(&[(name(names.down), spec.hidden)], spec.ffn)?,
            ffn_post_norm: self.post_norm(name(names.ffn_post_norm))?,
            slides: spec.sliding.as_ref().is_some_and(|s| s.layers[i]),
        })
    }

    fn linear(&mut self, parts: &[(String, usize)], cols: usize) -> Result<LinearId> {
        self.pack(parts, cols, PartOrder::Concat, None)
    }

    /// Packs tensors of `(name, rows)` and lets their file pages go.
    fn pack(
        &mut self,
        parts: &[(String, usize)],
        cols: usize,
        order: PartOrder,
        bias: Option<&[f32]>,
    ) -> Result<LinearId> {
        let mut found = Vec::with_capacity(parts.len());
        for (name, rows) in parts {
            let part = self.weights.part(name)?;
            if (part.rows, part.cols) != (*rows, cols) {
                return Err(self.misshapen(
                    name,
                    format!("[{rows}, {cols}]"),
                    format!("[{}, {}]", part.rows, part.cols),
                ));
            }
            found.push(part);
        }
        let packed = self.backend.load_linear(&found, order, bias)?;
        parts.iter().for_each(|(name, _)| self.weights.release(name));
        Ok(packed)
    }

    fn biases(&self, parts: &[(String, usize)]) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for (weight, rows) in parts {
            let name = weight.strip_suffix("weight").map_or_else(|| weight.clone(), |stem| format!("{stem}bias"));
            all.extend(self.vector(&name, *rows)?);
        }
        Ok(all)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = self.weights.vector(name)?;
        if values.len() != len {
            return Err(self.misshapen(name, format!("[{len}]"), format!("[{}]", values.len())));
        }
        Ok(values)
    }

    fn norm(&mut self, name: String, len: usize) -> Result<VectorId> {
        let mut values = self.vector(&name, len)?;
        values.iter_mut().for_each(|w| *w += self.spec.norm_offset);
        Ok(self.backend.load_vector(&values)?)
    }

    fn post_norm(&mut self, name: String) -> Result<Option<VectorId>> {
        if self.spec.post_norms { Ok(Some(self.norm(name, self.spec.hidden)?)) } else { Ok(None) }
    }

    fn misshapen(&self, name: &str, expected: String, got: String) -> Error {
        Error::Format {
            path: self.weights.path().to_owned(),
            what: format!("tensor {name} has shape {got}, the model's metadata say {expected}"),
        }
    }
}
