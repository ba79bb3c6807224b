//! The kernel of attention: one work item, tile by tile.
//!
//! Rows are (token, query head), token-major, and are computed in chunks of up to [`Simd::TILE`] accumulator rows. A
//! worker's memory holds, for all rows of an item: queries interleaved by chunk (`[dim][row]`, so that a broadcast needs
//! one address), the stretch's `o`, `l` and `m`, and the folded `o`, `l` and `m` of the stretches before it.

use super::plan::{Fold, Item, Rows};
use super::{AttentionOp, MAX_ROWS, SLOT_HEAD, STRETCH, TILE};
use crate::cpu::act::ActWriter;
use crate::cpu::simd::{Kernel, LANES, Simd, prefetch};
use crate::cpu::spans::Spans;
use crate::kv::{BLOCK_SIZE, BlockId, SeqSpan};
use crate::memory::SharedMut;

/// Scores are kept in units of ln 2, because powers of two are the cheapest: `e^score = 2^(score * log2 e)`.
const UNIT: f32 = std::f32::consts::LOG2_E;

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
    MAX_ROWS * (3 * head_dim + LANES + TILE + 4)
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
    /// By how much the tile's larger `m` shrinks what came before.
    alpha: &'a mut [f32],
    /// Weights of the tile's positions.
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
        let (alpha, memory) = memory.split_at_mut(rows);
        let p = memory[..rows * TILE].as_chunks_mut().0;
        let (o, total_o, l) = (o.as_chunks_mut().0, total_o.as_chunks_mut().0, l.as_chunks_mut().0);
        Self { queries, o, total_o, l, m, total_l, total_m, alpha, p }
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
        let Self { views, item, work } = self;
        let op = views.op;
        let head_dim = op.shape.head_dim;
        let rows = item.rows.len();
        let work = &mut Work::new(work, rows, head_dim);
        work.total_o.fill([0.0; LANES]);
        work.total_l.fill(0.0);
        work.total_m.fill(NOTHING);

        let sequence = Sequence {
            blocks: op.kv.as_chunks().0,
            table: views.spans.table(&op.spans[item.rows.span]),
            kv_heads: op.shape.kv_heads,
            kv_head: item.rows.kv_head,
            head_dim,
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
}

/// What is done with each chunk of rows.
#[derive(Clone, Copy)]
enum Phase {
    /// Copy its queries, interleaved: once for an item.
    Queries,
    /// Scores and softmax.
    Scores,
    /// Weighted sums of values.
    Sums,
}

/// One tile of an item.
#[derive(Clone, Copy)]
struct Tile<'a> {
    op: &'a AttentionOp<'a>,
    sequence: &'a Sequence<'a>,
    rows: &'a Rows,
    /// First position.
    start: usize,
    /// Position after the item's last.
    end: usize,
}

impl Tile<'_> {
    /// Goes through the rows in chunks, each of them with code for its number of rows.
    #[inline(always)]
    fn each_chunk<S: Simd>(self, s: S, phase: Phase, work: &mut Work<'_>) {
        const { assert!(S::TILE <= 12, "there is code for chunks of up to 12 rows") };
        let rows = self.rows.len();
        let mut first = 0;
        while first < rows {
            let left = rows - first;
            // As even as can be.
            let count = left.div_ceil(left.div_ceil(S::TILE));
            let chunk = Chunk { tile: self, first };
            match count {
                1 => chunk.run::<S, 1>(s, phase, work),
                2 => chunk.run::<S, 2>(s, phase, work),
                3 => chunk.run::<S, 3>(s, phase, work),
                4 => chunk.run::<S, 4>(s, phase, work),
                5 => chunk.run::<S, 5>(s, phase, work),
                6 => chunk.run::<S, 6>(s, phase, work),
                7 if S::TILE >= 7 => chunk.run::<S, 7>(s, phase, work),
                8 if S::TILE >= 8 => chunk.run::<S, 8>(s, phase, work),
                9 if S::TILE >= 9 => chunk.run::<S, 9>(s, phase, work),
                10 if S::TILE >= 10 => chunk.run::<S, 10>(s, phase, work),
                11 if S::TILE >= 11 => chunk.run::<S, 11>(s, phase, work),
                12 if S::TILE >= 12 => chunk.run::<S, 12>(s, phase, work),
                _ => unreachable!("a chunk has at most S::TILE rows"),
            }
            first += count;
        }
    }
}

/// Some rows of an item, at one tile.
struct Chunk<'a> {
    tile: Tile<'a>,
    /// First row within the item.
    first: usize,
}

impl Chunk<'_> {
    /// Positions that a row sees: the first, and one past the last.
    #[inline(always)]
    fn sees(&self, row: usize) -> (usize, usize) {
        let end = self.tile.rows.first_position + (self.first + row) / self.tile.rows.heads + 1;
        (self.tile.op.window.map_or(0, |window| end.saturating_sub(window)), end)
    }

    #[inline(always)]
    fn run<S: Simd, const R: usize>(&self, s: S, phase: Phase, work: &mut Work<'_>) {
        if matches!(phase, Phase::Queries) {
            return self.interleave::<R>(work.queries);
        }
        // Rows ascend by token, so the last one sees the furthest and the first one the earliest.
        let ((earliest, shortest), (latest, end)) = (self.sees(0), self.sees(R - 1));
        if end <= self.tile.start || earliest >= self.tile.start + TILE {
            return;
        }
        let positions = TILE.min(end - self.tile.start);
        let p = work.p[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
        let alpha = work.alpha[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
        match phase {
            Phase::Queries => unreachable!("that phase has returned"),
            Phase::Scores => {
                let groups = positions.div_ceil(LANES);
                let all_seen = latest <= self.tile.start && self.tile.start + groups * LANES <= shortest;
                let m = work.m[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
                let l = work.l[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
                s.outlined(Scores { chunk: self, queries: work.queries, groups, p });
                s.outlined(Softmax { chunk: self, groups, all_seen, p, m, l, alpha });
            }
            Phase::Sums => {
                let width = self.tile.sequence.head_dim / LANES;
                let o = &mut work.o[self.first * width..][..R * width];
                s.outlined(Sums { chunk: self, positions, p, alpha, o });
            }
        }
    }

    /// Copies queries as `[dim][row]`, in the unit of the softmax.
    #[inline(always)]
    fn interleave<const R: usize>(&self, queries: &mut [f32]) {
        let Tile { op, rows, .. } = self.tile;
        let (dim, cols) = (op.shape.head_dim, op.shape.qkv_cols());
        // A cap works on the scores themselves; the unit comes after it.
        let unit = if op.softcap.is_some() { 1.0 } else { UNIT };
        let row0 = op.spans[rows.span].row0 as usize + rows.token0;
        let sources: [&[f32]; R] = std::array::from_fn(|r| {
            let (token, head) = ((self.first + r) / rows.heads, (self.first + r) % rows.heads);
            &op.qkv[(row0 + token) * cols + (rows.head0 + head) * dim..][..dim]
        });
        for (i, column) in queries[self.first * dim..][..R * dim].as_chunks_mut::<R>().0.iter_mut().enumerate() {
            for r in 0..R {
                column[r] = sources[r][i] * unit;
            }
        }
    }

    /// Keys of the tile after this one, from vector `at` on; of this tile when it is the last.
    #[inline(always)]
    fn next_keys(&self, at: usize) -> &[Halves] {
        let next = self.tile.start + TILE;
        let in_block = self.tile.sequence.head_dim * (BLOCK_SIZE / LANES);
        let position = next + at / in_block * BLOCK_SIZE;
        let position = if position < self.tile.end { position } else { self.tile.start };
        &self.tile.sequence.block(position).0[at % in_block..]
    }
}

/// `p = q . K` for the first `groups` groups of the tile.
struct Scores<'a, const R: usize> {
    chunk: &'a Chunk<'a>,
    queries: &'a [f32],
    groups: usize,
    p: &'a mut [[f32; TILE]; R],
}

impl<const R: usize> Kernel for Scores<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { chunk: &Chunk { tile, first }, queries, groups, p } = self;
        let dim = tile.sequence.head_dim;
        let queries = queries[first * dim..][..R * dim].as_chunks::<R>().0;
        let mut group = 0;
        while group < groups {
            let position = tile.start + group * LANES;
            let (keys, values) = tile.sequence.block(position);
            let within = position % BLOCK_SIZE / LANES * dim;
            // As many vectors hold the values of 16 positions as hold their keys: they are asked for meanwhile.
            if two_columns::<S, R>() && within == 0 && group + 1 < groups {
                let (keys, values) = (keys[..2 * dim].split_at(dim), values[..2 * dim].split_at(dim));
                let sums = dot::<S, R, 2>(s, queries, [keys.0, keys.1], [values.0, values.1]);
                put(s, &sums[0], p, group);
                put(s, &sums[1], p, group + 1);
                group += 2;
            } else {
                let sums = dot::<S, R, 1>(s, queries, [&keys[within..][..dim]], [&values[within..][..dim]]);
                put(s, &sums[0], p, group);
                group += 1;
            }
        }
    }
}

/// Turns scores into weights relative to the new largest score, updates `m` and `l`, and finds by how much earlier weights
/// shrink.
struct Softmax<'a, const R: usize> {
    chunk: &'a Chunk<'a>,
    groups: usize,
    /// True when every row sees every position of the groups.
    all_seen: bool,
    p: &'a mut [[f32; TILE]; R],
    m: &'a mut [f32; R],
    l: &'a mut [[f32; LANES]; R],
    alpha: &'a mut [f32; R],
}

impl<const R: usize> Kernel for Softmax<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { chunk, groups, all_seen, p, m, l, alpha } = self;
        let softcap = chunk.tile.op.softcap;
        let mut shrink = [0.0; LANES];
        for r in 0..R {
            let (from, to) = chunk.sees(r);
            let mut top = s.splat(f32::NEG_INFINITY);
            for (group, scores) in p[r].as_chunks_mut::<LANES>().0[..groups].iter_mut().enumerate() {
                let mut v = s.load(scores);
                if let Some(cap) = softcap {
                    v = s.mul(s.tanh(s.mul(v, s.splat(1.0 / cap))), s.splat(cap * UNIT));
                }
                if !all_seen {
                    let position = chunk.tile.start + group * LANES;
                    let (first, end) = (from.saturating_sub(position), to.saturating_sub(position));
                    v = s.keep_lanes(v, first, end, f32::NEG_INFINITY);
                }
                if softcap.is_some() || !all_seen {
                    s.store(v, scores);
                }
                top = s.max(top, v);
            }
            let top = s.reduce_max(top);
            let top = if top > m[r] { top } else { m[r] };
            shrink[r] = m[r] - top;
            m[r] = top;
        }
        let exponents = s.exp2_weight(s.load(&shrink));
        s.store(exponents, &mut shrink);
        alpha.copy_from_slice(&shrink[..R]);
        for r in 0..R {
            let top = s.splat(m[r]);
            let mut sum = s.splat(0.0);
            for scores in &mut p[r].as_chunks_mut::<LANES>().0[..groups] {
                let weight = s.exp2_weight(s.sub(s.load(scores), top));
                s.store(weight, scores);
                sum = s.add(sum, weight);
            }
            s.store(s.fma(s.load(&l[r]), s.splat(alpha[r]), sum), &mut l[r]);
        }
    }
}

/// `o = o * alpha + p . V`
struct Sums<'a, const R: usize> {
    chunk: &'a Chunk<'a>,
    positions: usize,
    p: &'a [[f32; TILE]; R],
    alpha: &'a [f32; R],
    o: &'a mut [[f32; LANES]],
}

impl<const R: usize> Kernel for Sums<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let width = self.chunk.tile.sequence.head_dim / LANES;
        let mut column = 0;
        if two_columns::<S, R>() {
            while column + 2 <= width {
                self.columns::<S, 2>(s, column);
                column += 2;
            }
        }
        while column < width {
            self.columns::<S, 1>(s, column);
            column += 1;
        }
    }
}

impl<const R: usize> Sums<'_, R> {
    /// The dimensions of `C` vectors from `column` on. Asks for part of the next tile's keys meanwhile: for all of them when
    /// it was done for all columns.
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&mut self, s: S, column: usize) {
        let Self { chunk, positions, p, alpha, ref mut o } = *self;
        let tile = chunk.tile;
        let width = tile.sequence.head_dim / LANES;
        let mut sums = [[s.splat(0.0); R]; C];
        for c in 0..C {
            for r in 0..R {
                sums[c][r] = s.mul(s.load(&o[r * width + column + c]), s.splat(alpha[r]));
            }
        }
        for first in (0..positions).step_by(BLOCK_SIZE) {
            let values = tile.sequence.block(tile.start + first).1;
            let count = BLOCK_SIZE.min(positions - first);
            let ahead = chunk.next_keys(column * TILE + first * C);
            for (i, (row, ahead)) in values.chunks_exact(width).zip(ahead.chunks_exact(C)).take(count).enumerate() {
                let row = row[column..].first_chunk::<C>().expect("a row has all columns");
                prefetch(ahead);
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

/// True when the registers hold two columns of sums for each of `R` rows, beside what they are made of.
const fn two_columns<S: Simd, const R: usize>() -> bool {
    2 * R < S::TILE
}

/// Scores of `R` queries with `C` groups of 16 keys; asks for what comes `next` meanwhile.
#[inline(always)]
fn dot<S: Simd, const R: usize, const C: usize>(
    s: S,
    queries: &[[f32; R]],
    keys: [&[Halves]; C],
    next: [&[Halves]; C],
) -> [[S::V; R]; C] {
    let mut sums = [[s.splat(0.0); R]; C];
    for (i, query) in queries.iter().enumerate() {
        for c in 0..C {
            prefetch(&next[c][i..=i]);
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
