//! One work item from queries to results, and the folding of results that were computed apart.
//!
//! A worker's memory holds, for all rows of an item: queries interleaved by chunk (`[dim][row]`, so that a broadcast needs
//! one address) as factors of [`Element`], the stretch's `o`, `l` and `m`, and the folded `o`, `l` and `m` of the stretches before it.

use std::marker::PhantomData;

use super::element::Element;
use super::plan::{Fold, Item, Rows};
use super::tile::{Phase, Sequence, Tile};
use super::{AttentionOp, MAX_ROWS, SLOT_HEAD, STRETCH, TILE};
use crate::cpu::act::ActWriter;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::cpu::spans::Spans;
use crate::kv::{KvType, SeqSpan};
use crate::memory::SharedMut;

/// `m` of a row that has seen nothing: below every score, and finite, so that `m - m` is 0.
const NOTHING: f32 = -1e30;

/// Where results go.
#[derive(Clone, Copy)]
pub(super) enum Out<'a> {
    /// To their consumer.
    Direct(ActWriter<'a>),
    /// To `[rows, heads * head_dim]` floats.
    Staged(SharedMut<'a, f32>),
}

/// What all items of an op share.
pub(super) struct Views<'a> {
    pub(super) op: &'a AttentionOp<'a>,
    pub(super) spans: &'a Spans<'a>,
    pub(super) out: Out<'a>,
    pub(super) slots: SharedMut<'a, f32>,
}

impl<'a> Views<'a> {
    /// Divides a row's sum by its weights, in place, and hands it over.
    ///
    /// # Safety
    /// No other thread writes this row of `rows` at the same time.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, s: S, (rows, row): (&Rows, usize), l: f32, o: &mut [[f32; LANES]]) {
        let factor = s.splat(1.0 / l);
        for o in o.iter_mut() {
            s.store(s.mul(s.load(o), factor), o);
        }
        let (heads, dim) = (self.op.shape.heads, self.op.shape.head_dim);
        let batch_row = self.op.spans[rows.span].row0 as usize + rows.token0 + row / rows.heads;
        let col = (rows.head0 + row % rows.heads) * dim;
        match self.out {
            // SAFETY: the caller is alone with this row of the item: these columns of a row of the batch.
            Out::Direct(writer) => unsafe { writer.write(s, batch_row, col, o.as_flattened()) },
            Out::Staged(floats) => {
                // SAFETY: as above.
                let out = unsafe { floats.part(batch_row * heads * dim + col, dim) };
                out.copy_from_slice(o.as_flattened());
            }
        }
    }

    /// A slot: m and l, and o.
    ///
    /// # Safety
    /// No other reference to that slot is in use.
    #[inline(always)]
    unsafe fn slot(&self, slot: usize) -> (&'a mut [f32], &'a mut [[f32; LANES]]) {
        let len = SLOT_HEAD + self.op.shape.head_dim;
        // SAFETY: the caller's contract is that of `part`.
        let slot = unsafe { self.slots.part(slot * len, len) };
        let (head, o) = slot.split_at_mut(SLOT_HEAD);
        (head, o.as_chunks_mut().0)
    }
}

/// Floats of working memory for one worker.
pub(super) fn work_len(head_dim: usize) -> usize {
    MAX_ROWS * (3 * head_dim + LANES + TILE + 6)
}

/// A worker's memory, see the module documentation.
pub(super) struct Work<'a> {
    pub(super) queries: &'a mut [f32],
    /// `[row][dim / 16]`
    pub(super) o: &'a mut [[f32; LANES]],
    total_o: &'a mut [[f32; LANES]],
    /// `[row]`: the sum of weights, still one part for each lane.
    pub(super) l: &'a mut [[f32; LANES]],
    pub(super) m: &'a mut [f32],
    total_l: &'a mut [f32],
    total_m: &'a mut [f32],
    /// By how much the tile's larger `m` shrinks what came before.
    pub(super) alpha: &'a mut [f32],
    /// What sums of products with queries are multiplied with.
    pub(super) query_scales: &'a mut [f32],
    /// The same for weights of the tile.
    pub(super) weight_scales: &'a mut [f32],
    /// Weights of the tile's positions.
    pub(super) p: &'a mut [[f32; TILE]],
}

impl<'a> Work<'a> {
    #[inline(always)]
    fn new(memory: &'a mut [f32], rows: usize, head_dim: usize) -> Self {
        let (queries, memory) = memory.split_at_mut(rows * head_dim);
        let (o, memory) = memory.split_at_mut(rows * head_dim);
        let (total_o, memory) = memory.split_at_mut(rows * head_dim);
        let (l, memory) = memory.split_at_mut(rows * LANES);
        let (m, memory) = memory.split_at_mut(rows);
        let (total_l, memory) = memory.split_at_mut(rows);
        let (total_m, memory) = memory.split_at_mut(rows);
        let (alpha, memory) = memory.split_at_mut(rows);
        let (query_scales, memory) = memory.split_at_mut(rows);
        let (weight_scales, memory) = memory.split_at_mut(rows);
        let p = memory[..rows * TILE].as_chunks_mut().0;
        let (o, total_o, l) = (o.as_chunks_mut().0, total_o.as_chunks_mut().0, l.as_chunks_mut().0);
        Self { queries, o, total_o, l, m, total_l, total_m, alpha, query_scales, weight_scales, p }
    }
}

/// Computes one item.
pub(super) struct RunItem<'a> {
    pub(super) views: &'a Views<'a>,
    pub(super) item: &'a Item,
    pub(super) work: &'a mut [f32],
}

impl Kernel for RunItem<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.views.op.layout.ty {
            KvType::F16 => self.over::<S, u16>(s),
            KvType::Int8 => self.over::<S, i8>(s),
            KvType::Fp8 => unreachable!("`alloc_kv` refuses it"),
        }
    }
}

impl RunItem<'_> {
    /// Over a pool of elements `E`.
    #[inline(always)]
    fn over<S: Simd, E: Element>(self, s: S) {
        let Self { views, item, work } = self;
        let op = views.op;
        let head_dim = op.shape.head_dim;
        let rows = item.rows.len();
        let work = &mut Work::new(work, rows, head_dim);
        work.total_o.fill([0.0; LANES]);
        work.total_l.fill(0.0);
        work.total_m.fill(NOTHING);

        let sequence = Sequence {
            words: op.kv,
            table: views.spans.table(&op.spans[item.rows.span]),
            layout: op.layout,
            layer: op.layer,
            kv_head: item.rows.kv_head,
            element: PhantomData::<E>,
        };
        let mut start = item.start;
        Tile { op, sequence: &sequence, rows: &item.rows, start, end: item.end }.each_chunk(s, Phase::Queries, work);
        while start < item.end {
            let end = item.end.min((start / STRETCH + 1) * STRETCH);
            work.o.fill([0.0; LANES]);
            work.l.fill([0.0; LANES]);
            work.m.fill(NOTHING);
            for tile in (start..end).step_by(TILE) {
                // All scores come before all sums: then a tile's keys, and after them its values, stay in the first cache
                // for all rows, while the other half is being fetched.
                let tile = Tile { op, sequence: &sequence, rows: &item.rows, start: tile, end: item.end };
                tile.each_chunk(s, Phase::Scores, work);
                tile.each_chunk(s, Phase::Sums, work);
            }
            let width = head_dim / LANES;
            for row in 0..rows {
                let (m, l) = (work.m[row], s.reduce_add(s.load(&work.l[row])));
                let o = &work.o[row * width..][..width];
                if let Some(slot) = item.slot {
                    // SAFETY: the plan gives every stretch of every row a slot of its own, and folds come after all items.
                    let (head, slot_o) = unsafe { views.slot(slot + row) };
                    (head[0], head[1]) = (m, l);
                    slot_o.copy_from_slice(o);
                } else {
                    let total = Total { m: &mut work.total_m[row], l: &mut work.total_l[row] };
                    fold(s, total, &mut work.total_o[row * width..][..width], (m, l), o);
                }
            }
            start = end;
        }
        if item.slot.is_none() {
            let width = head_dim / LANES;
            for row in 0..rows {
                let o = &mut work.total_o[row * width..][..width];
                // SAFETY: items have different rows, except for the stretches of a split one, which have slots instead.
                unsafe { views.finish(s, (&item.rows, row), work.total_l[row], o) };
            }
        }
    }
}

/// Folds the slots of split rows and writes the result.
pub(super) struct FoldSlots<'a> {
    pub(super) views: &'a Views<'a>,
    pub(super) fold: &'a Fold,
    pub(super) work: &'a mut [f32],
}

impl Kernel for FoldSlots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Fold { rows, slot0, stretches } = *self.fold;
        let total_o = self.work[..self.views.op.shape.head_dim].as_chunks_mut().0;
        for row in 0..rows.len() {
            let (mut m, mut l) = (NOTHING, 0.0);
            total_o.fill([0.0; LANES]);
            for stretch in 0..stretches {
                // SAFETY: folds have different slots, and all items are done.
                let (head, o) = unsafe { self.views.slot(slot0 + stretch * rows.len() + row) };
                fold(s, Total { m: &mut m, l: &mut l }, total_o, (head[0], head[1]), o);
            }
            // SAFETY: folds have different rows, and all items are done.
            unsafe { self.views.finish(s, (&rows, row), l, total_o) };
        }
    }
}

/// Hands the staged rows of one span to their consumer.
pub(super) struct Unstage<'a> {
    pub(super) staged: &'a [f32],
    pub(super) span: &'a SeqSpan,
    pub(super) out: ActWriter<'a>,
}

impl Kernel for Unstage<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.out.cols();
        for row in self.span.row0 as usize..(self.span.row0 + self.span.rows) as usize {
            // SAFETY: the rows of spans do not overlap, and each span is handled once.
            unsafe { self.out.write(s, row, 0, &self.staged[row * cols..][..cols]) };
        }
    }
}

/// Largest score and sum of weights of the stretches so far.
struct Total<'a> {
    m: &'a mut f32,
    l: &'a mut f32,
}

/// Adds a stretch to a row's result. A stretch or a result without any position changes no bit.
#[inline(always)]
fn fold<S: Simd>(s: S, total: Total<'_>, total_o: &mut [[f32; LANES]], (m, l): (f32, f32), o: &[[f32; LANES]]) {
    let top = if m > *total.m { m } else { *total.m };
    let mut factors = [0.0; LANES];
    (factors[0], factors[1]) = (*total.m - top, m - top);
    let exponents = s.exp2_weight(s.load(&factors));
    s.store(exponents, &mut factors);
    let [old, new, ..] = factors;
    *total.m = top;
    *total.l = *total.l * old + l * new;
    let (old, new) = (s.splat(old), s.splat(new));
    for (total, o) in total_o.iter_mut().zip(o) {
        s.store(s.fma(s.load(total), old, s.mul(s.load(o), new)), total);
    }
}
