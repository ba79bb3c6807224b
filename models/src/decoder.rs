//! The one forward pass: a decoder-only transformer, driven by a [`DecoderSpec`], over the ops of a [`Backend`].
//!
//! ```text
//!   Batch ──┬── as it is ──────────────────────────┬──> layers ──> x     (`layers.rs`)
//!           └── one row a sequence: padded, repeated ┘
//!   x[outputs] ─ final norm ─ head ─> argmax | logits ─> tokens drawn, a bounded number of rows at a time
//! ```
//!
//! All arenas are allocated in [`Decoder::load`] from [`DecoderLimits`]; a forward pass allocates nothing.

use cupola_kernels::{
    Backend, Draw, DrawRows, Drawn, Epilogue, KvId, KvType, LinearId, PartOrder, Pass, PassLimits, Recorded, RopeId,
    Rows, SamplerId, Turn, VectorId,
};

use crate::last_rows::LastRows;
use crate::layers::{Arenas, Layer, Layers, PassRows};
use crate::spec::TensorNames;
use crate::weights::Weights;
use crate::{Batch, DecoderSpec, Error, Model, Result};

/// Rows of logits that exist at one time. More output rows are computed in several rounds, so that a large vocabulary
/// times many sequences stays a small, fixed piece of memory.
pub(crate) const LOGIT_ROWS: usize = 32;

/// Most rows of a pass that is recorded where a device does that; larger ones are long enough to hide their launches.
const RECORDED_ROWS: usize = 64;

/// Sizes fixed at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderLimits {
    /// Most rows of one forward pass.
    pub max_batch_tokens: usize,
    /// Most sequences of one forward pass.
    pub max_seqs: usize,
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
    /// Padded token ids of a pass that is repeated.
    padded: Vec<u32>,
    /// Numbers of rows that such passes are padded to, ascending; none where nothing is recorded.
    sizes: Vec<usize>,
    /// Tokens that the last pass of each turn has chosen, and the turn of the last one.
    chosen: [usize; 2],
    turn: Turn,
    unsaved: Option<cupola_kernels::Error>,
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
        let arenas = Arenas::alloc(&spec, limits.max_batch_tokens, backend.as_mut())?;
        let window = spec.sliding.as_ref().map(|sliding| Some(sliding.window));
        let windows: Vec<_> = window.into_iter().chain([None]).collect();
        backend.reserve(&PassLimits {
            rows: limits.max_batch_tokens,
            sequences: limits.max_seqs,
            positions,
            group: spec.heads.heads / spec.heads.kv_heads,
            windows: &windows,
            head,
            head_rows: LOGIT_ROWS,
        })?;
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
            padded: Vec::with_capacity(RECORDED_ROWS),
            sizes: Vec::new(),
            chosen: [0; 2],
            turn: Turn::default(),
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

    /// What multiplies matrices of many rows, for people, where that is found at run time.
    pub fn describe_products(&self) -> Option<String> {
        self.backend.describe_products()
    }

    /// Bytes held in weights, arenas and key/value pool.
    pub fn allocated_bytes(&self) -> u64 {
        self.backend.allocated_bytes()
    }

    /// What was recorded by [`Decoder::record_passes`].
    pub fn recorded(&self) -> Recorded {
        self.backend.recorded()
    }

    /// Bytes that a step of one row for each of `sequences` reads: every weight once, and the keys and values of the `length`
    /// positions that each of them sees. Activations are small beside both.
    pub fn step_bytes(&self, sequences: usize, length: usize) -> u64 {
        let weights = self.layers.iter().flat_map(|layer| [layer.qkv, layer.o, layer.gate_up, layer.down]);
        let weights: u64 = weights.chain([self.head]).map(|weight| self.backend.linear_bytes(weight)).sum();
        let seen = |layer: &Layer| match &self.spec.sliding {
            Some(sliding) if layer.slides => length.min(sliding.window),
            _ => length,
        };
        let positions: usize = self.layers.iter().map(seen).sum();
        let position = self.backend.kv_position_bytes(self.kv) / self.layers.len() as u64;
        weights + (sequences * positions) as u64 * position
    }

    /// True for a device on which [`Decoder::forward`] returns before its work is done.
    pub fn is_asynchronous(&self) -> bool {
        self.backend.is_asynchronous()
    }

    /// Records the passes in which every sequence has one row, where the backend does that, for each of the sizes that they
    /// are padded to and up to the longest sequences. Must come before the first batch: the rows of these passes belong to
    /// no sequence. `progress(done, total)` is called once a size.
    ///
    /// # Errors
    /// Those of the ops. A recording that fails is none: passes then run as they are, and the result says why.
    pub fn record_passes(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<Recorded> {
        /// Once to load what the ops need, once to record and run the recording.
        const TIMES: usize = 2;
        /// Sequences up to this length need no recordings of their own.
        const SHORT: usize = 256;
        if !self.backend.record_passes(true) {
            return Ok(self.backend.recorded());
        }
        self.sizes = sizes_up_to(self.limits.max_seqs.min(self.limits.max_batch_tokens).min(RECORDED_ROWS));
        for (done, rows) in self.sizes.clone().into_iter().enumerate().rev() {
            let mut reach = SHORT;
            // Powers of two that cover the longest sequence.
            while reach < 2 * self.limits.max_model_len {
                for _ in 0..TIMES {
                    self.run_repeated(rows, reach, &Batch::default())?;
                }
                reach *= 2;
            }
            progress(self.sizes.len() - done, self.sizes.len());
            if self.backend.recorded().failed.is_some() {
                self.sizes.clear();
                break;
            }
        }
        Ok(self.backend.recorded())
    }

    /// Runs one batch through every layer: writes its keys and values, and makes its output rows ready for
    /// [`Decoder::argmax`] (greedy batches) or [`Decoder::for_each_logits`] and [`Decoder::draw`] (all others).
    ///
    /// # Errors
    /// A batch that is larger than the limits, or a token id beyond the vocabulary.
    pub fn forward(&mut self, batch: &Batch) -> Result<()> {
        let rows = batch.tokens.len();
        let refuse = |expected: String, got: String| {
            Err(Error::from(cupola_kernels::Error::Shape { op: "forward", expected, got }))
        };
        if rows > self.limits.max_batch_tokens {
            return refuse(format!("at most {} rows", self.limits.max_batch_tokens), rows.to_string());
        }
        if let Some(token) = batch.tokens.iter().find(|&&token| token as usize >= self.spec.vocab) {
            return refuse(format!("tokens below {}", self.spec.vocab), token.to_string());
        }
        (self.turn, self.chosen[batch.turn.index()]) = (batch.turn, 0);
        self.last.set(batch);
        let one_row_each = batch.spans.len() == rows && batch.outputs.len() == rows && rows > 0;
        match self.sizes.iter().copied().find(|&size| one_row_each && size >= rows) {
            Some(size) => self.run_repeated(size, 0, batch)?,
            None => self.run(batch)?,
        }
        if batch.greedy {
            for start in (0..self.last.outputs.len()).step_by(LOGIT_ROWS) {
                let rows = self.norm_for_head(start)?;
                self.backend.linear_argmax(self.arenas.head_in, rows, self.head, start)?;
                self.chosen[self.turn.index()] = start + rows;
            }
        }
        Ok(())
    }

    /// Runs the layers on a batch as it is.
    fn run(&mut self, batch: &Batch) -> Result<()> {
        let Self { backend, last, .. } = self;
        let all_stay = batch.outputs.len() == batch.tokens.len();
        backend.begin_pass(&Pass {
            tokens: &batch.tokens,
            carried: &batch.carried,
            turn: batch.turn,
            spans: &batch.spans,
            last_spans: &last.spans,
            kept: if all_stay { &[] } else { &batch.outputs },
            block_table: &batch.block_table,
            repeated: None,
        })?;
        let last = std::mem::take(&mut self.last);
        let finished = (last.spans.as_slice(), batch.outputs.as_slice());
        let rows =
            PassRows { tokens: &batch.tokens, spans: &batch.spans, last: finished, block_table: &batch.block_table };
        let (backend, layers) = self.split();
        let ran = layers.run(backend, &rows);
        self.last = last;
        Ok(ran?)
    }

    /// Runs the layers on a batch with one row for each sequence, as a pass of `size` rows that was run before or will be
    /// again.
    fn run_repeated(&mut self, size: usize, reach: usize, batch: &Batch) -> Result<()> {
        let mut padded = std::mem::take(&mut self.padded);
        padded.clear();
        padded.extend_from_slice(&batch.tokens);
        padded.resize(size, 0);
        let (spans, block_table) = (batch.spans.as_slice(), batch.block_table.as_slice());
        let pass = Pass {
            tokens: &padded,
            carried: &batch.carried,
            turn: batch.turn,
            spans,
            last_spans: spans,
            kept: &[],
            block_table,
            repeated: Some(reach),
        };
        let begun = self.backend.begin_pass(&pass);
        let all: [u32; RECORDED_ROWS] = std::array::from_fn(|row| row as u32);
        let rows = PassRows { tokens: &padded, spans, last: (spans, &all[..size]), block_table };
        let (backend, layers) = self.split();
        let ran = begun.and_then(|()| backend.replay(&mut |backend| layers.run(backend, &rows)));
        self.padded = padded;
        Ok(ran?)
    }

    fn split(&mut self) -> (&mut dyn Backend, Layers<'_>) {
        let Self { backend, spec, embedding, layers, rope, sliding_rope, kv, arenas, .. } = self;
        let ropes = (*rope, sliding_rope.unwrap_or(*rope));
        (backend.as_mut(), Layers { spec, embedding: *embedding, layers, ropes, kv: *kv, arenas })
    }

    /// After a greedy batch: the most likely token of each output row. Waits for it.
    ///
    /// # Errors
    /// Those of the work that was submitted.
    pub fn argmax(&mut self) -> Result<&[u32]> {
        self.chosen(self.turn)
    }

    /// What the last batch of this turn has chosen for each output row, for [`cupola_kernels::drawn`]: after a greedy one, and
    /// after [`Decoder::submit_draws`]. Waits for it, not for a batch after it.
    ///
    /// # Errors
    /// Those of the work that was submitted.
    pub fn chosen(&mut self, turn: Turn) -> Result<&[u32]> {
        Ok(self.backend.chosen(turn, self.chosen[turn.index()])?)
    }

    /// True when tokens of a batch may be carried from the one before: a device that computes while the host goes on and
    /// that chooses every kind of token.
    pub fn carries(&self) -> bool {
        self.is_asynchronous() && self.draws()
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
        let sampler = self.sampler_of(draws.len())?;
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

    /// Draws a token for every output row of the last batch, without waiting: [`Decoder::chosen`] has them.
    ///
    /// # Errors
    /// As [`Decoder::draw`].
    pub fn submit_draws(&mut self, draws: &[Draw<'_>]) -> Result<()> {
        let sampler = self.sampler_of(draws.len())?;
        let softcap = self.spec.logit_softcap;
        let mut rows = Vec::with_capacity(LOGIT_ROWS);
        for (start, draws) in (0..).step_by(LOGIT_ROWS).zip(draws.chunks(LOGIT_ROWS)) {
            self.logits(start)?;
            rows.clear();
            rows.extend((0..).zip(draws.iter().copied()));
            let op = DrawRows { sampler, logits: self.arenas.logits, softcap, draws: &rows };
            self.backend.submit_draws(op, start)?;
            self.chosen[self.turn.index()] = start + draws.len();
        }
        Ok(())
    }

    /// What draws tokens of the last batch, for so many draws.
    fn sampler_of(&self, draws: usize) -> Result<SamplerId> {
        match self.arenas.sampler {
            Some(sampler) if draws == self.last.outputs.len() => Ok(sampler),
            _ => Err(cupola_kernels::Error::Shape {
                op: "draw",
                expected: format!("{} rows, on a device that draws tokens", self.last.outputs.len()),
                got: format!("{draws} on {}", self.backend.describe()),
            }
            .into()),
        }
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

/// `logit = cap * tanh(logit / cap)`, where the model has a cap.
fn softcap(cap: Option<f32>, logits: &mut [f32]) {
    if let Some(cap) = cap {
        logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
    }
}

/// Numbers of rows that repeated passes are padded to: 1, 2, 4, then multiples of 8, and `most`.
fn sizes_up_to(most: usize) -> Vec<usize> {
    let mut sizes: Vec<_> = [1, 2, 4].into_iter().chain((8..).step_by(8)).take_while(|&size| size < most).collect();
    sizes.push(most);
    sizes
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
