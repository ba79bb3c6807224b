//! One tile of positions for one chunk of rows: scores, softmax, and sums of values.
//!
//! Rows are (token, query head), token-major, and are computed in chunks of up to [`Simd::TILE`] rows. Each inner loop is
//! a kernel of its own, see [`Simd::outlined`].

use std::marker::PhantomData;

use super::element::{Element, HeadBlock};
use super::item::Work;
use super::plan::Rows;
use super::{AttentionOp, TILE};
use crate::cpu::simd::{Kernel, LANES, Simd, prefetch};
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType};
use crate::memory::{cast, cast_mut};

/// Scores are kept in units of ln 2, because powers of two are the cheapest: `e^score = 2^(score * log2 e)`.
const UNIT: f32 = std::f32::consts::LOG2_E;

/// Keys and values of one head of one sequence.
pub(super) struct Sequence<'a, E> {
    /// All blocks of the pool.
    pub(super) words: &'a [u16],
    pub(super) table: &'a [BlockId],
    pub(super) layout: KvLayout,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    pub(super) element: PhantomData<E>,
}

impl<'a, E: Element> Sequence<'a, E> {
    /// The block at `position`.
    #[inline(always)]
    fn block(&self, position: usize) -> HeadBlock<'a, E::Vector> {
        // The type is known here, so that the compiler need not ask for it.
        let len = KvLayout { ty: E::TYPE, ..self.layout }.head_words();
        let block = self.layout.offset(self.table[position / BLOCK_SIZE], self.layer);
        E::split(&self.words[block + self.kv_head * len..][..len])
    }
}

/// What is done with each chunk of rows.
#[derive(Clone, Copy)]
pub(super) enum Phase {
    /// Copy its queries, interleaved: once for an item.
    Queries,
    /// Scores and softmax.
    Scores,
    /// Weighted sums of values.
    Sums,
}

/// One tile of an item.
pub(super) struct Tile<'a, E> {
    pub(super) op: &'a AttentionOp<'a>,
    pub(super) sequence: &'a Sequence<'a, E>,
    pub(super) rows: &'a Rows,
    /// First position.
    pub(super) start: usize,
    /// Position after the item's last.
    pub(super) end: usize,
}

impl<E: Element> Tile<'_, E> {
    /// Goes through the rows in chunks, each of them with code for its number of rows.
    #[inline(always)]
    pub(super) fn each_chunk<S: Simd>(&self, s: S, phase: Phase, work: &mut Work<'_>) {
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
struct Chunk<'a, E> {
    tile: &'a Tile<'a, E>,
    /// First row within the item.
    first: usize,
}

impl<E: Element> Chunk<'_, E> {
    /// Positions that a row sees: the first, and one past the last.
    #[inline(always)]
    fn sees(&self, row: usize) -> (usize, usize) {
        let end = self.tile.rows.first_position + (self.first + row) / self.tile.rows.heads + 1;
        (self.tile.op.window.map_or(0, |window| end.saturating_sub(window)), end)
    }

    #[inline(always)]
    fn run<S: Simd, const R: usize>(&self, s: S, phase: Phase, work: &mut Work<'_>) {
        if matches!(phase, Phase::Queries) {
            let width = self.tile.sequence.layout.head_dim / LANES;
            let scales =
                work.query_scales[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
            // The item's sums have not begun: their memory serves as a buffer.
            let rows = &mut work.o[self.first * width..][..R * width];
            return self.interleave(s, work.queries, rows, scales);
        }
        // Rows ascend by token, so the last one sees the furthest and the first one the earliest.
        let ((earliest, shortest), (latest, end)) = (self.sees(0), self.sees(R - 1));
        if end <= self.tile.start || earliest >= self.tile.start + TILE {
            return;
        }
        let positions = TILE.min(end - self.tile.start);
        let p = work.p[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
        let alpha = work.alpha[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
        let weight_scales = work.weight_scales[self.first..].first_chunk_mut::<R>();
        let weight_scales = weight_scales.expect("the chunk lies within the item");
        match phase {
            Phase::Queries => unreachable!("that phase has returned"),
            Phase::Scores => {
                let groups = positions.div_ceil(LANES);
                let all_seen = latest <= self.tile.start && self.tile.start + groups * LANES <= shortest;
                let m = work.m[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
                let l = work.l[self.first..].first_chunk_mut::<R>().expect("the chunk lies within the item");
                let scales = work.query_scales[self.first..].first_chunk().expect("the chunk lies within the item");
                s.outlined(Scores { chunk: self, queries: work.queries, scales, groups, p });
                s.outlined(Softmax { chunk: self, groups, all_seen, p, scales: weight_scales, m, l, alpha });
            }
            Phase::Sums => {
                let width = self.tile.sequence.layout.head_dim / LANES;
                let o = &mut work.o[self.first * width..][..R * width];
                s.outlined(Sums { chunk: self, positions, p, scales: weight_scales, alpha, o });
            }
        }
    }

    /// Copies queries as `[dim / depth][row]` factors, in the unit of the softmax; `rows` is a buffer for them.
    #[inline(always)]
    fn interleave<S: Simd, const R: usize>(
        &self,
        s: S,
        queries: &mut [f32],
        rows: &mut [[f32; LANES]],
        scales: &mut [f32; R],
    ) {
        let &Tile { op, rows: &Rows { span, heads, head0, token0, .. }, .. } = self.tile;
        let (dim, cols) = (op.shape.head_dim, op.shape.qkv_cols());
        // A cap works on the scores themselves; the unit comes after it.
        let unit = if op.softcap.is_some() { 1.0 } else { UNIT };
        let row0 = op.spans[span].row0 as usize + token0;
        for (r, (row, scale)) in rows.chunks_exact_mut(dim / LANES).zip(scales).enumerate() {
            let (token, head) = ((self.first + r) / heads, (self.first + r) % heads);
            let source = &op.qkv[(row0 + token) * cols + (head0 + head) * dim..][..dim];
            let mut largest = s.splat(0.0);
            for (out, source) in row.iter_mut().zip(source.as_chunks::<LANES>().0) {
                let v = s.mul(s.load(source), s.splat(unit));
                largest = s.max(largest, s.abs(v));
                s.store(v, out);
            }
            *scale = E::to_factors(s, row, s.reduce_max(largest), dim);
        }
        let steps = dim / E::DEPTH;
        let rows = cast::<E::Factor>(rows);
        let rows: [&[E::Factor]; R] = std::array::from_fn(|r| &rows[r * dim..][..steps]);
        let columns = cast_mut::<E::Factor>(&mut queries[self.first * dim..]).as_chunks_mut::<R>().0;
        for (i, column) in columns[..steps].iter_mut().enumerate() {
            for r in 0..R {
                column[r] = rows[r][i];
            }
        }
    }

    /// Keys of the tile after this one, from vector `at` on; of this tile when it is the last.
    #[inline(always)]
    fn next_keys(&self, at: usize) -> &[E::Vector] {
        let next = self.tile.start + TILE;
        let in_block = self.tile.sequence.layout.head_dim * (BLOCK_SIZE / LANES) / E::DEPTH;
        let position = next + at / in_block * BLOCK_SIZE;
        let position = if position < self.tile.end { position } else { self.tile.start };
        &self.tile.sequence.block(position).keys[at % in_block..]
    }
}

/// `p = q . K` for the first `groups` groups of the tile.
struct Scores<'a, E, const R: usize> {
    chunk: &'a Chunk<'a, E>,
    queries: &'a [f32],
    /// What sums of products with them are multiplied with.
    scales: &'a [f32; R],
    groups: usize,
    p: &'a mut [[f32; TILE]; R],
}

impl<E: Element, const R: usize> Kernel for Scores<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { chunk: &Chunk { tile, first }, queries, scales: query_scales, groups, p } = self;
        let dim = tile.sequence.layout.head_dim;
        // Vectors of the keys of 16 positions. As many hold their values: those are asked for meanwhile.
        let steps = dim / E::DEPTH;
        let queries = &cast::<E::Factor>(&queries[first * dim..]).as_chunks::<R>().0[..steps];
        let mut group = 0;
        while group < groups {
            let position = tile.start + group * LANES;
            let HeadBlock { keys, values, scales } = tile.sequence.block(position);
            let in_block = position % BLOCK_SIZE / LANES;
            let within = in_block * steps;
            if two_columns::<S, E, R>() && within == 0 && group + 1 < groups {
                let keys = keys[..2 * steps].split_at(steps);
                let sums = dot::<S, E, R, 2>(s, queries, [keys.0, keys.1], &values[..2 * steps]);
                put::<S, E, R>(s, &sums[0], query_scales, scales.first(), p, group);
                put::<S, E, R>(s, &sums[1], query_scales, scales.get(1), p, group + 1);
                group += 2;
            } else {
                let sums = dot::<S, E, R, 1>(s, queries, [&keys[within..][..steps]], &values[within..][..steps]);
                put::<S, E, R>(s, &sums[0], query_scales, scales.get(in_block), p, group);
                group += 1;
            }
        }
    }
}

/// Turns scores into weights relative to the new largest score, updates `m` and `l`, and finds by how much earlier weights
/// shrink. The weights take the factors of their values with them.
struct Softmax<'a, E, const R: usize> {
    chunk: &'a Chunk<'a, E>,
    groups: usize,
    /// True when every row sees every position of the groups.
    all_seen: bool,
    p: &'a mut [[f32; TILE]; R],
    /// What sums of products with the weights are multiplied with.
    scales: &'a mut [f32; R],
    m: &'a mut [f32; R],
    l: &'a mut [[f32; LANES]; R],
    alpha: &'a mut [f32; R],
}

impl<E: Element, const R: usize> Kernel for Softmax<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { chunk, groups, all_seen, p, scales, m, l, alpha } = self;
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
            let (mut sum, mut largest) = (s.splat(0.0), s.splat(0.0));
            for (group, scores) in p[r].as_chunks_mut::<LANES>().0[..groups].iter_mut().enumerate() {
                let weight = s.exp2_weight(s.sub(s.load(scores), top));
                sum = s.add(sum, weight);
                let position = chunk.tile.start + group * LANES;
                // The scales of values come after those of the two groups of keys.
                let scale = match E::TYPE {
                    KvType::F16 | KvType::Fp8 => None,
                    KvType::Int8 => chunk.tile.sequence.block(position).scales.get(2 + position % BLOCK_SIZE / LANES),
                };
                let weight = scale.map_or(weight, |scale| s.mul(weight, s.load(scale)));
                largest = s.max(largest, weight);
                s.store(weight, scores);
            }
            let weights = &mut p[r].as_chunks_mut().0[..groups];
            scales[r] = E::to_factors(s, weights, s.reduce_max(largest), TILE);
            s.store(s.fma(s.load(&l[r]), s.splat(alpha[r]), sum), &mut l[r]);
        }
    }
}

/// `o = o * alpha + p . V`
struct Sums<'a, E, const R: usize> {
    chunk: &'a Chunk<'a, E>,
    positions: usize,
    /// The weights as factors.
    p: &'a [[f32; TILE]; R],
    scales: &'a [f32; R],
    alpha: &'a [f32; R],
    o: &'a mut [[f32; LANES]],
}

impl<E: Element, const R: usize> Kernel for Sums<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let width = self.chunk.tile.sequence.layout.head_dim / LANES;
        let mut column = 0;
        if two_columns::<S, E, R>() {
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

impl<E: Element, const R: usize> Sums<'_, E, R> {
    /// The dimensions of `C` vectors from `column` on. Asks for part of the next tile's keys meanwhile: for all of them when
    /// it was done for all columns.
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&mut self, s: S, column: usize) {
        let Self { chunk, positions, p, scales, alpha, ref mut o } = *self;
        let tile = chunk.tile;
        let width = tile.sequence.layout.head_dim / LANES;
        let mut sums = [[E::begin(s, s.splat(0.0)); R]; C];
        for c in 0..C {
            for r in 0..R {
                sums[c][r] = E::begin(s, s.mul(s.load(&o[r * width + column + c]), s.splat(alpha[r])));
            }
        }
        for first in (0..positions).step_by(BLOCK_SIZE) {
            let values = tile.sequence.block(tile.start + first).values;
            // A step with one position too many is none: what is not seen weighs 0.
            let steps = BLOCK_SIZE.min(positions - first).div_ceil(E::DEPTH);
            let ahead = chunk.next_keys((column * TILE + first * C) / E::DEPTH);
            let weights: [&[E::Factor]; R] =
                std::array::from_fn(|r| &cast(&p[r])[first / E::DEPTH..][..BLOCK_SIZE / E::DEPTH]);
            for (i, row) in (0..BLOCK_SIZE / E::DEPTH).zip(values.chunks_exact(width).take(steps)) {
                let row = row[column..].first_chunk::<C>().expect("a row has all columns");
                // The block of keys may end before this one of values does.
                if let Some(ahead) = ahead.get(i * C..(i + 1) * C) {
                    prefetch(ahead);
                }
                let factors: [E::Factor; R] = std::array::from_fn(|r| weights[r][i]);
                for c in 0..C {
                    E::accumulate(s, &row[c], &factors, &mut sums[c]);
                }
            }
        }
        for c in 0..C {
            for r in 0..R {
                let o = &mut o[r * width + column + c];
                let before = s.mul(s.load(o), s.splat(alpha[r]));
                s.store(E::end(s, sums[c][r], before, scales[r]), o);
            }
        }
    }
}

/// True when the registers hold two columns of sums for each of `R` rows, beside what they are made of. With one column,
/// few rows of floats wait for their own sums: an FMA takes 4 cycles, and a CPU begins two of them in each. Integer sums
/// wait for one cycle only, and need a register for their products.
const fn two_columns<S: Simd, E: Element, const R: usize>() -> bool {
    if E::DEPTH == 1 { 2 * R <= S::TILE } else { 2 * R < S::TILE }
}

/// Scores of `R` queries with `C` groups of 16 keys; asks for what comes `next` meanwhile, as many vectors.
#[inline(always)]
fn dot<S: Simd, E: Element, const R: usize, const C: usize>(
    s: S,
    queries: &[[E::Factor; R]],
    keys: [&[E::Vector]; C],
    next: &[E::Vector],
) -> [[E::Acc<S>; R]; C] {
    let mut sums = [[E::begin(s, s.splat(0.0)); R]; C];
    for ((i, query), next) in queries.iter().enumerate().zip(next.chunks_exact(C)) {
        prefetch(next);
        for c in 0..C {
            E::accumulate(s, &keys[c][i], query, &mut sums[c]);
        }
    }
    sums
}

/// Stores the scores of one group, times the factors of its queries and keys.
#[inline(always)]
fn put<S: Simd, E: Element, const R: usize>(
    s: S,
    sums: &[E::Acc<S>; R],
    query_scales: &[f32; R],
    scale: Option<&[f32; LANES]>,
    p: &mut [[f32; TILE]; R],
    group: usize,
) {
    for r in 0..R {
        let scores = E::end(s, sums[r], s.splat(0.0), query_scales[r]);
        let scores = scale.map_or(scores, |scale| s.mul(scores, s.load(scale)));
        s.store(scores, &mut p[r].as_chunks_mut::<LANES>().0[group]);
    }
}
