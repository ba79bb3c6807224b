//! The tensor kernels of Cupola: the [`Backend`] trait and its implementations.
//!
//! ```text
//!   models::decoder ──ops on handles──> Backend ──┬── cpu::CpuBackend   scalar | AVX2 | AVX-512 | NEON, found at run time
//!                                                 └── cuda::CudaBackend GPUs from compute capability 8.0, found at run time
//!
//!   weights   WeightPart (ggml blocks, floats) ──load_linear──> packed panels      LinearId
//!   numbers   f32 arenas [rows, cols]                                              BufferId
//!             activations as matrix products read them (int8 and/or f32)           ActId
//!             paged keys and values                                                KvId
//! ```
//!
//! A backend owns every buffer; callers hold small `Copy` handles. All memory is allocated before the first request, so
//! no op allocates and a memory plan made at start stays true. The arithmetic of one row never depends on the other
//! rows of a batch, nor on the number of threads: a request gives the same bits alone and in company.
//! (On a CUDA device this holds among up to 64 rows: see `docs/adr/0007-one-tile-layout-on-cuda.md`.)
//!
//! This is the only crate of the workspace with `unsafe` code.

mod checks;
pub mod cpu;
#[cfg(unix)]
pub mod cuda;
pub mod draw;
pub mod error;
pub mod format;
pub mod kv;
pub mod memory;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use draw::{Draw, Drawn, NoToken, drawn};
pub use error::{Error, Result};
pub use format::WeightType;
pub use kv::{BlockId, KvLayout, KvType, SeqSpan};

/// Handle of an f32 arena of shape `[rows, cols]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferId(pub(crate) u32);

/// Handle of an activation arena: rows in the form that matrix products read (int8 with scales, f32, or both).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActId(pub(crate) u32);

/// Handle of a vector of f32 parameters, such as a norm weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorId(pub(crate) u32);

/// Handle of a packed weight matrix of shape `[out_features, in_features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearId(pub(crate) u32);

/// Handle of a rotary-embedding table, `[max_positions, rotary_dim / 2]` cosines and sines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeId(pub(crate) u32);

/// Handle of the memory that tokens are drawn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplerId(pub(crate) u32);

/// Handle of a paged key/value pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvId(pub(crate) u32);

/// Rows of one source tensor, row-major, still in their file format.
#[derive(Clone, Copy, Debug)]
pub struct WeightPart<'a> {
    /// Element or block type of `data`.
    pub ty: WeightType,
    /// Output features (rows).
    pub rows: usize,
    /// Input features (columns).
    pub cols: usize,
    /// `rows * ty.row_bytes(cols)` bytes.
    pub data: &'a [u8],
}

/// How the parts of a linear layer are put together when packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartOrder {
    /// Rows of part 0, then rows of part 1, and so on (for example q, k, v).
    Concat,
    /// Two parts of equal shape, gate and up, interleaved so that [`Backend::gate_up`] finds both halves of a product
    /// side by side. Such a matrix is for `gate_up` alone.
    GateUp,
}

/// What a matrix product does with its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x * W^T + bias`
    Store,
    /// `out += x * W^T + bias` (a residual connection)
    Add,
}

/// The gate's non-linearity in a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateFn {
    /// `x * sigmoid(x)`
    Silu,
    /// `gelu(x)` by its tanh approximation
    GeluTanh,
}

/// Which pairs of a head's dimensions a rotary embedding turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// `(0, 1), (2, 3), ...`: GGUF files of the Llama family
    Interleaved,
    /// `(0, d/2), (1, d/2 + 1), ...`: Hugging Face checkpoints, GPT-NeoX
    Halves,
}

/// Which rows an op reads from an f32 arena.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// The first `n` rows.
    First(usize),
    /// These rows, in this order (gather).
    Picked(&'a [u32]),
}

impl Rows<'_> {
    /// Number of rows named.
    pub fn len(&self) -> usize {
        match self {
            Rows::First(n) => *n,
            Rows::Picked(rows) => rows.len(),
        }
    }

    /// True when no row is named.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Index in the arena of the `i`-th row named.
    pub fn index(&self, i: usize) -> usize {
        match self {
            Rows::First(_) => i,
            Rows::Picked(rows) => rows[i] as usize,
        }
    }
}

/// Shape of the projected row `[q heads | k heads | v heads]` and where its parts go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimensions of one head, the same for keys and values.
    pub head_dim: usize,
}

impl HeadShape {
    /// Columns of a projected row: `(heads + 2 * kv_heads) * head_dim`.
    pub fn qkv_cols(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Arguments of [`Backend::rope_store`].
#[derive(Clone, Copy, Debug)]
pub struct RopeStore<'a> {
    /// Projected rows, `[rows, qkv_cols]`; queries are turned and scaled in place.
    pub qkv: BufferId,
    /// Shape of a projected row.
    pub shape: HeadShape,
    /// Cosines and sines.
    pub rope: RopeId,
    /// Which dimensions turn together.
    pub pairs: RopePairs,
    /// Factor on queries after rotation, usually `1 / sqrt(head_dim)`.
    pub query_scale: f32,
    /// Weights and epsilon of RMS norms over each query and key head before rotation (Qwen 3, Gemma 3).
    pub qk_norm: Option<(VectorId, VectorId, f32)>,
    /// Pool that keys and values go to.
    pub kv: KvId,
    /// Layer within the pool.
    pub layer: usize,
    /// Sequences of this batch, in row order.
    pub spans: &'a [SeqSpan],
    /// Block tables of all spans, one after the other.
    pub block_table: &'a [BlockId],
}

/// Arguments of [`Backend::attention`].
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Projected rows as [`Backend::rope_store`] left them; only the query part is read.
    pub qkv: BufferId,
    /// Shape of a projected row.
    pub shape: HeadShape,
    /// `score = cap * tanh(score / cap)` before the softmax, when set.
    pub softcap: Option<f32>,
    /// A position sees itself and the `window - 1` before it, when set.
    pub window: Option<usize>,
    /// Pool with keys and values.
    pub kv: KvId,
    /// Layer within the pool.
    pub layer: usize,
    /// Sequences of this batch, in row order.
    pub spans: &'a [SeqSpan],
    /// Block tables of all spans, one after the other.
    pub block_table: &'a [BlockId],
    /// Result, `[rows, heads * head_dim]`, in the form that `consumer` reads.
    pub out: ActId,
    /// The matrix product that reads `out`.
    pub consumer: LinearId,
}

/// Arguments of [`Backend::draw`].
#[derive(Clone, Copy, Debug)]
pub struct DrawRows<'a> {
    /// Memory for so many rows of this vocabulary.
    pub sampler: SamplerId,
    /// `[rows, vocab]`; what the rows named hold afterwards is undefined.
    pub logits: BufferId,
    /// `logit = cap * tanh(logit / cap)` before anything else, when set.
    pub softcap: Option<f32>,
    /// Rows, ascending, and how their tokens are drawn.
    pub draws: &'a [(u32, Draw<'a>)],
}

/// Sizes of the largest pass of a decoder, for [`Backend::reserve`].
#[derive(Clone, Copy, Debug)]
pub struct PassLimits<'a> {
    /// Most rows.
    pub rows: usize,
    /// Most sequences.
    pub sequences: usize,
    /// Positions of the longest sequence.
    pub positions: usize,
    /// Query heads for each key/value head.
    pub group: usize,
    /// Windows that its layers have, `None` for layers without one; each once.
    pub windows: &'a [Option<usize>],
    /// The matrix of [`Backend::linear_argmax`].
    pub head: LinearId,
    /// Most rows of one [`Backend::linear_argmax`].
    pub head_rows: usize,
}

/// One of the two places that passes leave their results in, in turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// The first place.
    #[default]
    A,
    /// The second place.
    B,
}

impl Turn {
    /// The place of the pass before, and of the one after.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// 0 or 1.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// What the ops of one forward pass will read of its rows and sequences, for [`Backend::begin_pass`].
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Token ids, one a row.
    pub tokens: &'a [u32],
    /// For the first rows, instead of their token ids: which results of the pass of the other turn these are. Their places in
    /// `tokens` hold any token. Only for a device on which work is submitted.
    pub carried: &'a [u32],
    /// Where the results of this pass go.
    pub turn: Turn,
    /// The sequences of all rows. Rows at the end may belong to none.
    pub spans: &'a [SeqSpan],
    /// The sequences of the rows that the last layer finishes.
    pub last_spans: &'a [SeqSpan],
    /// Those rows, where they are not all: the argument of [`Backend::keep_rows`].
    pub kept: &'a [u32],
    /// Block tables of all spans, one after the other.
    pub block_table: &'a [BlockId],
    /// Set when every sequence has one row and the ops are given to [`Backend::replay`]: how long sequences will be on
    /// average, at least, as far as choosing among recordings is concerned.
    pub repeated: Option<usize>,
}

/// What a backend has recorded of repeated passes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Recordings that it holds.
    pub graphs: usize,
    /// Why it records no more, after a recording failed.
    pub failed: Option<String>,
}

/// A machine that runs the ops of a decoder.
///
/// Every op checks its shapes against the arenas it names and returns [`Error::Shape`] when they do not fit; none of
/// them allocates in proportion to its input. Rows are independent: see the crate documentation.
pub trait Backend: Send {
    /// One line for people: device, instruction set, threads.
    fn describe(&self) -> String;

    /// What multiplies matrices of many rows, for people, where that is found at run time.
    fn describe_products(&self) -> Option<String> {
        None
    }

    /// Worker threads that run an op (1 for a device that is not the CPU).
    fn threads(&self) -> usize;

    /// Bytes held by this backend in weights, arenas and key/value pools.
    fn allocated_bytes(&self) -> u64;

    /// Bytes of memory that this backend can move in a second, measured now: what it reads on the CPU, what it copies on a
    /// device, where read and written bytes count.
    fn bandwidth(&mut self) -> Result<f64>;

    /// Bytes that a product with this matrix reads of it.
    fn linear_bytes(&self, weight: LinearId) -> u64;

    /// Bytes of the keys and values of one position in all layers of a pool.
    fn kv_position_bytes(&self, kv: KvId) -> u64;

    /// Takes a vector of parameters.
    fn load_vector(&mut self, values: &[f32]) -> Result<VectorId>;

    /// Packs a weight matrix. All parts have the same number of columns.
    ///
    /// # Errors
    /// [`Error::UnsupportedWeight`] names a type or shape that has no kernel; [`Error::Shape`] a length that does not
    /// match its shape.
    fn load_linear(&mut self, parts: &[WeightPart<'_>], order: PartOrder, bias: Option<&[f32]>) -> Result<LinearId>;

    /// Says that the last matrix was loaded: what is kept for the next start is written now.
    ///
    /// # Errors
    /// [`Error::PackedFile`]; the backend works all the same.
    fn weights_loaded(&mut self) -> Result<()> {
        Ok(())
    }

    /// Builds a rotary table from `rotary_dim / 2` inverse frequencies; cosines and sines are multiplied by `scale`.
    fn load_rope(&mut self, inv_freq: &[f64], scale: f64, max_positions: usize) -> Result<RopeId>;

    /// Allocates an f32 arena.
    fn alloc_buffer(&mut self, rows: usize, cols: usize) -> Result<BufferId>;

    /// Allocates an activation arena.
    fn alloc_act(&mut self, rows: usize, cols: usize) -> Result<ActId>;

    /// Allocates a pool of `num_blocks` key/value blocks.
    fn alloc_kv(&mut self, layout: KvLayout, num_blocks: usize) -> Result<KvId>;

    /// Makes room to draw tokens from up to `rows` rows of `vocab` logits at a time. `None`: this backend leaves that to its
    /// caller, who gets the logits by [`Backend::take_rows`] at no cost.
    fn alloc_sampler(&mut self, _rows: usize, _vocab: usize) -> Result<Option<SamplerId>> {
        Ok(None)
    }

    /// Allocates what passes need beside the arenas, so that none within these limits allocates anything.
    fn reserve(&mut self, _limits: &PassLimits<'_>) -> Result<()> {
        Ok(())
    }

    /// True for a device on which ops only submit work, and return before it is done. Whatever gives results waits.
    fn is_asynchronous(&self) -> bool {
        false
    }

    /// Says what the ops of the next pass will read, so that a device gets it in one copy.
    ///
    /// # Errors
    /// [`Error::Shape`] for spans that do not fit their rows, and for carried tokens that are not there to be carried.
    fn begin_pass(&mut self, pass: &Pass<'_>) -> Result<()> {
        if pass.carried.is_empty() {
            return Ok(());
        }
        let (expected, got) = ("tokens that are known".into(), format!("{} carried ones", pass.carried.len()));
        Err(Error::Shape { op: "begin_pass", expected, got })
    }

    /// Runs `ops`, or on a device that records passes does again what they did before: for another pass of as many rows
    /// that was begun with [`Pass::repeated`]. `ops` may not wait for results.
    fn replay(&mut self, ops: &mut dyn FnMut(&mut dyn Backend) -> Result<()>) -> Result<()>;

    /// Lets [`Backend::replay`] record, or not. Says whether it will.
    fn record_passes(&mut self, _wanted: bool) -> bool {
        false
    }

    /// What was recorded.
    fn recorded(&self) -> Recorded {
        Recorded::default()
    }

    /// `out[i] = scale * table[tokens[i]]`; `table` is `[vocab, hidden]` and may also serve as the output head.
    fn embed(&mut self, table: LinearId, tokens: &[u32], scale: f32, out: BufferId) -> Result<()>;

    /// Moves row `rows[i]` of an arena to row `i`; `rows` ascends. What lay in the rows moved to is lost.
    fn keep_rows(&mut self, buffer: BufferId, rows: &[u32]) -> Result<()>;

    /// `out[i] = x[rows[i]] / sqrt(mean(x^2) + eps) * weight`, in the form that `consumer` reads
    /// (Zhang and Sennrich, Root Mean Square Layer Normalization, <https://arxiv.org/abs/1910.07467>).
    fn rms_norm(
        &mut self,
        x: BufferId,
        rows: Rows<'_>,
        weight: (VectorId, f32),
        consumer: LinearId,
        out: ActId,
    ) -> Result<()>;

    /// `x[i] += rms_norm(y[i])`: the norm after a sub-layer of Gemma 2 and 3, with its residual connection.
    fn rms_norm_add(&mut self, y: BufferId, rows: usize, weight: (VectorId, f32), x: BufferId) -> Result<()>;

    /// Matrix product of the first `rows` rows of `x` with a [`PartOrder::Concat`] matrix.
    fn linear(&mut self, x: ActId, rows: usize, weight: LinearId, epilogue: Epilogue, out: BufferId) -> Result<()>;

    /// `out = f(x * gate^T) * (x * up^T)` for a [`PartOrder::GateUp`] matrix, in the form that `consumer` reads.
    fn gate_up(
        &mut self,
        x: ActId,
        rows: usize,
        weight: LinearId,
        f: GateFn,
        consumer: LinearId,
        out: ActId,
    ) -> Result<()>;

    /// Rotates queries and keys (Su et al., RoFormer, <https://arxiv.org/abs/2104.09864>) and writes keys and values
    /// into their blocks.
    fn rope_store(&mut self, op: RopeStore<'_>) -> Result<()>;

    /// Causal attention of every row over its own sequence, read through the block tables
    /// (Kwon et al., PagedAttention, <https://arxiv.org/abs/2309.06180>).
    fn attention(&mut self, op: Attention<'_>) -> Result<()>;

    /// `argmax(x * W^T)` for the first `rows` rows, the lowest index among equals; logits are not kept. The results are
    /// numbered from `first` on, for [`Backend::chosen`].
    fn linear_argmax(&mut self, x: ActId, rows: usize, weight: LinearId, first: usize) -> Result<()>;

    /// The results `0..count` of [`Backend::linear_argmax`] and [`Backend::submit_draws`] in the last pass of this turn, for
    /// [`drawn`]; waits for them. A backend that computes at once has those of the last pass alone.
    fn chosen(&mut self, turn: Turn, count: usize) -> Result<&[u32]>;

    /// Runs `f(row, values)` for the first `rows` rows of an arena, several at a time on the worker threads.
    fn for_each_row(&mut self, buffer: BufferId, rows: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()>;

    /// Runs `f(i, values)` for the `i`-th of these rows as [`Backend::for_each_row`] does; [`Rows::Picked`] ascend. What the rows
    /// hold afterwards is undefined: a device need not copy back what `f` leaves.
    fn take_rows(&mut self, buffer: BufferId, rows: Rows<'_>, f: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        match rows {
            Rows::First(rows) => self.for_each_row(buffer, rows, f),
            Rows::Picked(picked) => {
                let rows = picked.last().map_or(0, |&last| last as usize + 1);
                self.for_each_row(buffer, rows, &|row, values| {
                    if let Ok(i) = picked.binary_search_by_key(&row, |&row| row as usize) {
                        f(i, values);
                    }
                })
            }
        }
    }

    /// Draws a token from each of these rows; `out` receives them in the order of `draws`. A row's token depends on the row
    /// and its draw alone.
    ///
    /// # Errors
    /// [`Error::Shape`] for a token beyond the vocabulary or a number out of its range, for more rows than the sampler has
    /// room for, and from backends without a sampler.
    fn draw(&mut self, _op: DrawRows<'_>, _out: &mut Vec<Drawn>) -> Result<()> {
        let (expected, got) = ("a backend that draws tokens".into(), self.describe());
        Err(Error::Shape { op: "draw", expected, got })
    }

    /// As [`Backend::draw`], without waiting: the results are numbered from `first` on, for [`Backend::chosen`].
    ///
    /// # Errors
    /// As [`Backend::draw`].
    fn submit_draws(&mut self, _op: DrawRows<'_>, _first: usize) -> Result<()> {
        let (expected, got) = ("a backend that draws tokens".into(), self.describe());
        Err(Error::Shape { op: "draw", expected, got })
    }
}
