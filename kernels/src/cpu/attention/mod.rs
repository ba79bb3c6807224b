//! Causal attention over the paged pool (Kwon et al., PagedAttention, <https://arxiv.org/abs/2309.06180>), with the online
//! softmax of Dao et al., FlashAttention, <https://arxiv.org/abs/2205.14135>.
//!
//! ```text
//!   item = (sequence, kv head, query heads x tokens: up to 24 rows)          plan.rs
//!     for each stretch of 512 positions: a partial result m, l, o per row      item.rs
//!       for each tile of 64 positions             (two blocks of the pool)
//!         for each up to 6 rows (12 with AVX-512)                              tile.rs
//!           p = q . K                 K block [group of 16][dim][16]: 16 scores to a vector; f16 or int8, floats or integers: element.rs
//!           softmax of p, with m and l
//!         for each up to 6 rows (every K and V vector that is loaded serves all of them)
//!           o = o * alpha + p . V     V block [position][dim]
//!       fold the stretch into the row's result
//! ```
//!
//! **The same bits in any company.** A row's stretches and tiles begin at fixed positions, and positions that a row must not
//! see weigh exactly 0, which changes no sum. So a row's result does not depend on which rows share its item. The
//! stretches of an item can also be computed by several threads, each leaving its partial result in a slot; folding the
//! slots in order is the same arithmetic.

mod element;
mod item;
mod plan;
mod tile;

#[cfg(test)]
mod tests;

use super::act::ActWriter;
use super::isa::Isa;
use super::pool::Pool;
use super::simd::dispatch;
use super::spans::{Spans, check_heads};
use crate::format::ggml::BLOCK;
use crate::kv::{BlockId, KvLayout, SeqSpan};
use crate::memory::{Arena, SharedMut};
use crate::{Error, HeadShape, Result};
use item::{FoldSlots, Out, RunItem, Unstage, Views, work_len};
use plan::Plan;

/// Positions of a stretch: the unit in which an item can be split over threads.
const STRETCH: usize = 512;
/// Positions of a tile: the unit of the online softmax.
const TILE: usize = 64;
/// Rows (query head of a token) of an item.
const MAX_ROWS: usize = 24;

/// What [`attention`] reads.
#[derive(Clone, Copy)]
pub(crate) struct AttentionOp<'a> {
    /// Projected rows, `[rows, qkv_cols]`; only the queries are read.
    pub(crate) qkv: &'a [f32],
    /// Shape of a projected row.
    pub(crate) shape: HeadShape,
    /// `score = cap * tanh(score / cap)`, when set.
    pub(crate) softcap: Option<f32>,
    /// A position sees itself and the `window - 1` before it, when set.
    pub(crate) window: Option<usize>,
    /// All blocks of the pool.
    pub(crate) kv: &'a [u16],
    /// Layer within them.
    pub(crate) layer: usize,
    /// Shape of the pool.
    pub(crate) layout: KvLayout,
    /// Sequences, in row order.
    pub(crate) spans: &'a [SeqSpan],
    /// Block tables of all spans.
    pub(crate) block_table: &'a [BlockId],
}

/// Working memory of [`attention`], for heads of one size.
pub(crate) struct AttentionScratch {
    head_dim: usize,
    plan: Plan,
    /// One part for each worker.
    workers: Arena<f32>,
    /// Partial results of split items: `[slot][m, l, padding | o]`.
    slots: Arena<f32>,
    /// Results as `[rows, heads * head_dim]`, for heads that are not whole blocks of the activation: empty with all
    /// others, and grown by the first batch that needs it.
    staged: Vec<f32>,
}

/// Floats before `o` in a slot: m and l, padded to a cache line.
const SLOT_HEAD: usize = 16;

impl AttentionScratch {
    /// Allocates for `threads` workers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn new(threads: usize, head_dim: usize) -> Result<Self> {
        let slots = (512 * threads).max(2048);
        Ok(Self {
            head_dim,
            plan: Plan::new(slots),
            workers: Arena::zeroed(threads * work_len(head_dim), "attention work memory")?,
            slots: Arena::zeroed(slots * (SLOT_HEAD + head_dim), "attention partial results")?,
            staged: Vec::new(),
        })
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.workers.bytes() + self.slots.bytes() + self.staged.capacity() * size_of::<f32>()
    }
}

/// Attention of every row over its own sequence; `out` holds rows of `heads * head_dim` columns.
///
/// # Errors
/// [`Error::Shape`] when rows, heads or blocks do not fit.
pub(crate) fn attention(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut AttentionScratch,
    op: &AttentionOp<'_>,
    out: &ActWriter<'_>,
) -> Result<()> {
    const OP: &str = "attention";
    let refuse = |expected: String, got: String| Err(Error::Shape { op: OP, expected, got });
    check_heads(OP, op.shape, op.layout)?;
    let HeadShape { heads, kv_heads, head_dim } = op.shape;
    let (cols, work_len) = (heads * head_dim, work_len(head_dim));
    if scratch.head_dim != head_dim || scratch.workers.len() < pool.threads() * work_len {
        return refuse(format!("heads of {}, as in the pool", scratch.head_dim), head_dim.to_string());
    }
    if op.window == Some(0) {
        return refuse("a window of at least one position".into(), "0".into());
    }
    if op.softcap.is_some_and(|cap| cap <= 0.0 || cap.is_nan()) {
        return refuse("a positive softcap".into(), format!("{:?}", op.softcap));
    }
    if out.cols() != cols {
        return refuse(format!("an output of {cols} columns"), out.cols().to_string());
    }
    let rows = (op.qkv.len() / op.shape.qkv_cols()).min(out.rows());
    let blocks = op.layout.blocks_in(op.kv.len());
    let spans = Spans::check(OP, op.spans, op.block_table, blocks, rows)?;

    let AttentionScratch { plan, workers, slots, staged, .. } = scratch;
    plan.make(op.spans, (heads / kv_heads, kv_heads), op.window, pool.threads());
    let (items, folds) = (plan.items(), plan.folds());
    let stage = out.in_blocks() && !head_dim.is_multiple_of(BLOCK);
    if stage && staged.len() < rows * cols {
        staged.resize(rows * cols, 0.0);
    }
    let (workers, slots) = (SharedMut::new(workers), SharedMut::new(slots));
    let to = if stage { Out::Staged(SharedMut::new(staged)) } else { Out::Direct(*out) };
    let views = &Views { op, spans: &spans, out: to, slots };
    // SAFETY: no two chunks that run at one time have the same worker index.
    let work = |worker| unsafe { workers.part(worker * work_len, work_len) };

    // Below this many multiplications, waking another thread costs more than it saves.
    let inline = plan.cost() * head_dim < 50_000;
    pool.run(if inline { 1 } else { items.len() }, &|chunk, worker| {
        for item in if inline { items } else { &items[chunk..=chunk] } {
            dispatch(isa, RunItem { views, item, work: work(worker) });
        }
    });
    pool.run(folds.len(), &|chunk, worker| {
        dispatch(isa, FoldSlots { views, fold: &folds[chunk], work: work(worker) });
    });
    if stage {
        let staged = &staged[..];
        pool.run(op.spans.len(), &|chunk, _worker| {
            dispatch(isa, Unstage { staged, span: &op.spans[chunk], out: *out });
        });
    }
    Ok(())
}
