//! The kernel of attention: one work item, tile by tile.
//!
//! Rows are (token, query head), token-major, and are computed in chunks of up to [`Simd::TILE`] accumulator rows. A
//! worker's memory holds, for all rows of an item: queries interleaved by chunk (`[dim][row]`, so that a broadcast needs
//! one address), the stretch's `o`, `l` and `m`, and the folded `o`, `l` and `m` of the stretches before it.

use super::plan::{Fold, Item, Rows};
use super::{AttentionOp, MAX_ROWS, MAX_TILE_ROWS, SLOT_HEAD, STRETCH, TILE};
use crate::cpu::act::ActWriter;
use crate::cpu::simd::{Kernel, LANES, Simd, prefetch};
use crate::cpu::spans::Spans;
use crate::kv::{BLOCK_SIZE, BlockId, SeqSpan};
use crate::memory::SharedMut;

/// `m` of a row that has seen nothing: below every score, and finite, so that `m - m` is 0.
const NOTHING: f32 = -1e30;

/// 16 halves.
type Halves = [u16; LANES];

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
    3 * MAX_ROWS * head_dim + (MAX_ROWS + 4) * LANES * 2 + MAX_TILE_ROWS * TILE
}

/// A worker's memory, see the module documentation.
struct Work<'a> {
    queries: &'a mut [f32],
    /// `[row][dim / 16]`
    o: &'a mut [[f32; LANES]],
    total_o: &'a mut [[f32; LANES]],
    /// `[row]`: the sum of weights, still one part for each lane.
    l: &'a mut [[f32; LANES]],
    m: &'a mut [f32],
    total_l: &'a mut [f32],
    total_m: &'a mut [f32],
    p: &'a mut [[f32; TILE]],
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
        let p = &mut memory[..MAX_TILE_ROWS * TILE];
        let (o, total_o, l) = (o.as_chunks_mut().0, total_o.as_chunks_mut().0, l.as_chunks_mut().0);
        Self { queries, o, total_o, l, m, total_l, total_m, p: p.as_chunks_mut().0 }
    }
}

/// Rows of the next chunk, when `left` remain: as even as can be, as registers allow.
#[inline(always)]
fn chunk_rows<S: Simd>(left: usize) -> usize {
    const { assert!(S::TILE <= MAX_TILE_ROWS) };
    left.div_ceil(left.div_ceil(S::TILE))
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
        let Self { views, item, work } = self;
        let op = views.op;
        let head_dim = op.shape.head_dim;
        let rows = item.rows.len();
        let work = &mut Work::new(work, rows, head_dim);
        let span = &op.spans[item.rows.span];
        pack_queries::<S>(op, &item.rows, work.queries);
        work.total_o.fill([0.0; LANES]);
        work.total_l.fill(0.0);
        work.total_m.fill(NOTHING);

        let sequence = Sequence {
            blocks: op.kv.as_chunks().0,
            table: views.spans.table(span),
            kv_heads: op.shape.kv_heads,
            kv_head: item.rows.kv_head,
            head_dim,
        };
        let mut start = item.start;
        while start < item.end {
            let end = item.end.min((start / STRETCH + 1) * STRETCH);
            work.o.fill([0.0; LANES]);
            work.l.fill([0.0; LANES]);
            work.m.fill(NOTHING);
            for tile in (start..end).step_by(TILE) {
                sequence.prefetch(tile + TILE, item.end);
                let mut first = 0;
                while first < rows {
                    let count = chunk_rows::<S>(rows - first);
                    let chunk =
                        Chunk { op, sequence: &sequence, rows: &item.rows, first, tile, pos0: span.pos0 as usize };
                    match count {
                        1 => chunk.run::<S, 1>(s, work),
                        2 => chunk.run::<S, 2>(s, work),
                        3 => chunk.run::<S, 3>(s, work),
                        4 => chunk.run::<S, 4>(s, work),
                        5 => chunk.run::<S, 5>(s, work),
                        6 => chunk.run::<S, 6>(s, work),
                        7 if S::TILE >= 7 => chunk.run::<S, 7>(s, work),
                        8 if S::TILE >= 8 => chunk.run::<S, 8>(s, work),
                        9 if S::TILE >= 9 => chunk.run::<S, 9>(s, work),
                        10 if S::TILE >= 10 => chunk.run::<S, 10>(s, work),
                        11 if S::TILE >= 11 => chunk.run::<S, 11>(s, work),
                        12 if S::TILE >= 12 => chunk.run::<S, 12>(s, work),
                        _ => unreachable!("a chunk has at most S::TILE rows"),
                    }
                    first += count;
                }
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
    let exponents = s.exp(s.load(&factors));
    s.store(exponents, &mut factors);
    let [old, new, ..] = factors;
    *total.m = top;
    *total.l = *total.l * old + l * new;
    let (old, new) = (s.splat(old), s.splat(new));
    for (total, o) in total_o.iter_mut().zip(o) {
        s.store(s.fma(s.load(total), old, s.mul(s.load(o), new)), total);
    }
}

/// Copies the queries of an item's rows, interleaved by chunk.
#[inline(always)]
fn pack_queries<S: Simd>(op: &AttentionOp<'_>, rows: &Rows, packed: &mut [f32]) {
    let head_dim = op.shape.head_dim;
    let cols = op.shape.qkv_cols();
    let row0 = op.spans[rows.span].row0 as usize + rows.token0;
    let mut first = 0;
    while first < rows.len() {
        let count = chunk_rows::<S>(rows.len() - first);
        let chunk = &mut packed[first * head_dim..][..count * head_dim];
        for in_chunk in 0..count {
            let row = first + in_chunk;
            let source = (row0 + row / rows.heads) * cols + (rows.head0 + row % rows.heads) * head_dim;
            for (column, value) in chunk.chunks_exact_mut(count).zip(&op.qkv[source..][..head_dim]) {
                column[in_chunk] = *value;
            }
        }
        first += count;
    }
}

/// Keys and values of one head of one sequence.
struct Sequence<'a> {
    /// All blocks of the layer.
    blocks: &'a [Halves],
    table: &'a [BlockId],
    kv_heads: usize,
    kv_head: usize,
    head_dim: usize,
}

impl<'a> Sequence<'a> {
    /// Keys `[2 groups][dim]` and values `[position][dim / 16]` of the block at `position`.
    #[inline(always)]
    fn block(&self, position: usize) -> (&'a [Halves], &'a [Halves]) {
        let half = self.head_dim * (BLOCK_SIZE / LANES);
        let block = self.table[position / BLOCK_SIZE].0 as usize;
        self.blocks[(block * self.kv_heads + self.kv_head) * 2 * half..][..2 * half].split_at(half)
    }

    /// Asks the caches for the tile at `position`, if there is one.
    #[inline(always)]
    fn prefetch(&self, position: usize, end: usize) {
        for position in (position..end.min(position + TILE)).step_by(BLOCK_SIZE) {
            let (keys, values) = self.block(position);
            prefetch(keys);
            prefetch(values);
        }
    }
}

/// Some rows of an item, at one tile.
struct Chunk<'a> {
    op: &'a AttentionOp<'a>,
    sequence: &'a Sequence<'a>,
    rows: &'a Rows,
    /// First row within the item.
    first: usize,
    /// First position.
    tile: usize,
    /// Position of the span's first token.
    pos0: usize,
}

impl Chunk<'_> {
    /// Positions that a row sees: the first, and one past the last.
    #[inline(always)]
    fn sees(&self, row: usize) -> (usize, usize) {
        let end = self.pos0 + self.rows.token0 + (self.first + row) / self.rows.heads + 1;
        (self.op.window.map_or(0, |window| end.saturating_sub(window)), end)
    }

    #[inline(always)]
    fn run<S: Simd, const R: usize>(&self, s: S, work: &mut Work<'_>) {
        // Rows ascend by token, so the last one sees the furthest and the first one the earliest.
        let ((earliest, shortest), (latest, end)) = (self.sees(0), self.sees(R - 1));
        if end <= self.tile || earliest >= self.tile + TILE {
            return;
        }
        let positions = TILE.min(end - self.tile);
        let groups = positions.div_ceil(LANES);
        let all_seen = latest <= self.tile && self.tile + groups * LANES <= shortest;
        let p = work.p.first_chunk_mut::<R>().expect("there is room for the largest chunk");

        self.scores(s, work.queries, groups, p);
        let m = work.m[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
        let alpha = self.softmax(s, p, groups, all_seen, m, &mut work.l[self.first..]);

        let width = self.sequence.head_dim / LANES;
        let o = &mut work.o[self.first * width..][..R * width];
        let mut column = 0;
        if 2 * R <= S::TILE {
            while column + 2 <= width {
                self.weigh::<S, R, 2>(s, p, positions, &alpha, column, o);
                column += 2;
            }
        }
        while column < width {
            self.weigh::<S, R, 1>(s, p, positions, &alpha, column, o);
            column += 1;
        }
    }

    /// `p = q . K` for the first `groups` groups of the tile.
    #[inline(always)]
    fn scores<S: Simd, const R: usize>(&self, s: S, queries: &[f32], groups: usize, p: &mut [[f32; TILE]; R]) {
        let dim = self.sequence.head_dim;
        let queries = queries[self.first * dim..][..R * dim].as_chunks::<R>().0;
        let mut group = 0;
        while group < groups {
            let position = self.tile + group * LANES;
            let keys = &self.sequence.block(position).0[position % BLOCK_SIZE / LANES * dim..];
            if 2 * R <= S::TILE && group % 2 == 0 && group + 1 < groups {
                let sums = dot::<S, R, 2>(s, queries, [&keys[..dim], &keys[dim..2 * dim]]);
                put(s, &sums[0], p, group);
                put(s, &sums[1], p, group + 1);
                group += 2;
            } else {
                let sums = dot::<S, R, 1>(s, queries, [&keys[..dim]]);
                put(s, &sums[0], p, group);
                group += 1;
            }
        }
    }

    /// Turns scores into weights relative to the new largest score, updates `m` and `l`, and returns by how much earlier
    /// weights shrink.
    #[inline(always)]
    fn softmax<S: Simd, const R: usize>(
        &self,
        s: S,
        p: &mut [[f32; TILE]; R],
        groups: usize,
        all_seen: bool,
        m: &mut [f32; R],
        l: &mut [[f32; LANES]],
    ) -> [f32; LANES] {
        let mut shrink = [0.0; LANES];
        for r in 0..R {
            let (from, to) = self.sees(r);
            let mut top = s.splat(f32::NEG_INFINITY);
            for (group, scores) in p[r].as_chunks_mut::<LANES>().0[..groups].iter_mut().enumerate() {
                let mut v = s.load(scores);
                if let Some(cap) = self.op.softcap {
                    v = s.mul(s.tanh(s.mul(v, s.splat(1.0 / cap))), s.splat(cap));
                }
                if !all_seen {
                    let position = self.tile + group * LANES;
                    let (first, end) = (from.saturating_sub(position), to.saturating_sub(position));
                    v = s.keep_lanes(v, first, end, f32::NEG_INFINITY);
                }
                s.store(v, scores);
                top = s.max(top, v);
            }
            let top = s.reduce_max(top);
            let top = if top > m[r] { top } else { m[r] };
            shrink[r] = m[r] - top;
            m[r] = top;
        }
        let alpha = s.exp(s.load(&shrink));
        let mut alphas = [0.0; LANES];
        s.store(alpha, &mut alphas);
        for r in 0..R {
            let top = s.splat(m[r]);
            let mut sum = s.splat(0.0);
            for scores in &mut p[r].as_chunks_mut::<LANES>().0[..groups] {
                let weight = s.exp(s.sub(s.load(scores), top));
                s.store(weight, scores);
                sum = s.add(sum, weight);
            }
            s.store(s.fma(s.load(&l[r]), s.splat(alphas[r]), sum), &mut l[r]);
        }
        alphas
    }

    /// `o = o * alpha + p . V` for the dimensions of `C` vectors from `column` on.
    #[inline(always)]
    fn weigh<S: Simd, const R: usize, const C: usize>(
        &self,
        s: S,
        p: &[[f32; TILE]; R],
        positions: usize,
        alpha: &[f32; LANES],
        column: usize,
        o: &mut [[f32; LANES]],
    ) {
        let width = self.sequence.head_dim / LANES;
        let mut sums = [[s.splat(0.0); R]; C];
        for c in 0..C {
            for r in 0..R {
                sums[c][r] = s.mul(s.load(&o[r * width + column + c]), s.splat(alpha[r]));
            }
        }
        for first in (0..positions).step_by(BLOCK_SIZE) {
            let values = self.sequence.block(self.tile + first).1;
            let count = BLOCK_SIZE.min(positions - first);
            for (i, row) in values.chunks_exact(width).take(count).enumerate() {
                let row = row[column..].first_chunk::<C>().expect("a row has all columns");
                for c in 0..C {
                    let v = s.load_f16(&row[c]);
                    for r in 0..R {
                        sums[c][r] = s.fma(s.splat(p[r][first + i]), v, sums[c][r]);
                    }
                }
            }
        }
        for c in 0..C {
            for r in 0..R {
                s.store(sums[c][r], &mut o[r * width + column + c]);
            }
        }
    }
}

/// Scores of `R` queries with `C` groups of 16 keys.
#[inline(always)]
fn dot<S: Simd, const R: usize, const C: usize>(s: S, queries: &[[f32; R]], keys: [&[Halves]; C]) -> [[S::V; R]; C] {
    let mut sums = [[s.splat(0.0); R]; C];
    for (i, query) in queries.iter().enumerate() {
        for c in 0..C {
            let k = s.load_f16(&keys[c][i]);
            for r in 0..R {
                sums[c][r] = s.fma(s.splat(query[r]), k, sums[c][r]);
            }
        }
    }
    sums
}

/// Stores the scores of one group.
#[inline(always)]
fn put<S: Simd, const R: usize>(s: S, sums: &[S::V; R], p: &mut [[f32; TILE]; R], group: usize) {
    for r in 0..R {
        s.store(sums[r], &mut p[r].as_chunks_mut::<LANES>().0[group]);
    }
}
