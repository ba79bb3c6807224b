//! Rotary embedding of queries and keys, and the write of keys and values into the paged pool
//! (Su et al., RoFormer, <https://arxiv.org/abs/2104.09864>).
//!
//! ```text
//!   row of qkv   [ q heads          | k heads           | v heads ]     f32
//!                  norm, turn,        norm, turn          │
//!                  scale, in place    │                   │
//!   block        [kv head][ K: group of 16 x dim x 16   | V: position x dim ]     f16; as int8 see `kv.rs`
//! ```
//!
//! The unit of work is (sequence, block): no two workers write one block, and a sequence's rows in it are consecutive.

use super::isa::Isa;
use super::norm::rms_norm_in_place;
use super::pool::Pool;
use super::simd::{Kernel, LANES, Simd, dispatch};
use super::spans::{Spans, check_heads};
use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, KvType, SCALE_WORDS, SeqSpan};
use crate::memory::{Arena, Plain, SharedMut, cast_mut};
use crate::{Error, HeadShape, Result, RopePairs};

/// Positions between two whose angles are computed and not summed.
const STRIDE: usize = 256;

/// Cosines and sines of every position.
pub(crate) struct RopeTable {
    /// Pairs that turn: half the rotary dimension.
    pairs: usize,
    /// `[position][cosines of all pairs | sines of all pairs]`
    values: Arena<f32>,
}

impl RopeTable {
    /// Computes angles in f64 from inverse frequencies; cosines and sines are multiplied by `scale`.
    ///
    /// Only every [`STRIDE`]-th position and the first ones go through trigonometry; the others are sums of two angles.
    /// A context of 32,768 positions would take a noticeable part of a start otherwise.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn new(inv_freq: &[f64], scale: f64, max_positions: usize) -> Result<Self> {
        let pairs = inv_freq.len();
        let mut values = Arena::zeroed((2 * pairs).saturating_mul(max_positions), "rotary table")?;
        let angles = |position: usize| inv_freq.iter().map(move |frequency| (position as f64 * frequency).sin_cos());
        let near: Vec<(f64, f64)> = (0..STRIDE.min(max_positions)).flat_map(angles).collect();
        let row_len = (2 * pairs).max(1);
        for (stride, rows) in values.chunks_mut(row_len * STRIDE).enumerate() {
            let far: Vec<(f64, f64)> = angles(stride * STRIDE).map(|(sin, cos)| (scale * sin, scale * cos)).collect();
            for (row, near) in rows.chunks_exact_mut(row_len).zip(near.chunks_exact(pairs.max(1))) {
                let (cosines, sines) = row.split_at_mut(pairs);
                for ((cosine, sine), ((far_sin, far_cos), (sin, cos))) in
                    cosines.iter_mut().zip(sines).zip(far.iter().zip(near))
                {
                    *cosine = (far_cos * cos - far_sin * sin) as f32;
                    *sine = (far_sin * cos + far_cos * sin) as f32;
                }
            }
        }
        Ok(Self { pairs, values })
    }

    /// Positions in the table.
    pub(crate) fn positions(&self) -> usize {
        self.values.len().checked_div(2 * self.pairs).unwrap_or(usize::MAX)
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.values.bytes()
    }

    /// `[position][cosines of all pairs | sines of all pairs]`
    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// Cosines and sines of one position.
    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.values[position * 2 * self.pairs..][..2 * self.pairs].split_at(self.pairs)
    }
}

/// What [`rope_store`] does to each row.
#[derive(Clone, Copy)]
pub(crate) struct RopeStoreOp<'a> {
    /// Shape of a row of `qkv`.
    pub(crate) shape: HeadShape,
    /// Cosines and sines.
    pub(crate) rope: &'a RopeTable,
    /// Which dimensions turn together.
    pub(crate) pairs: RopePairs,
    /// Factor on queries after rotation.
    pub(crate) query_scale: f32,
    /// Norm weights over each query and key head, and their epsilon.
    pub(crate) qk_norm: Option<(&'a [f32], &'a [f32], f32)>,
    /// Shape of the pool.
    pub(crate) layout: KvLayout,
    /// Layer within the pool.
    pub(crate) layer: usize,
    /// Sequences, in row order.
    pub(crate) spans: &'a [SeqSpan],
    /// Block tables of all spans.
    pub(crate) block_table: &'a [BlockId],
}

/// Buffers of [`rope_store`] that are kept between calls.
#[derive(Default)]
pub(crate) struct StoreScratch {
    pieces: Vec<Piece>,
    /// End of each chunk within `pieces`.
    chunks: Vec<usize>,
    /// One bit for each block of the pool: set while a piece of this call writes it.
    written: Vec<u64>,
}

/// The rows of one sequence that fall into one block.
#[derive(Clone, Copy)]
struct Piece {
    row0: usize,
    rows: usize,
    pos0: usize,
    block: BlockId,
}

/// Rows that make a chunk worth handing to another thread.
const ROWS_PER_CHUNK: usize = 16;

/// Turns queries and keys of all rows of `qkv` (`[rows, qkv_cols]`), leaves the queries there, and writes keys and
/// values to their places in `kv`, the blocks of the pool.
///
/// # Errors
/// [`Error::Shape`] when rows, positions or blocks do not fit, or two sequences would write one block.
pub(crate) fn rope_store(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut StoreScratch,
    op: &RopeStoreOp<'_>,
    qkv: &mut [f32],
    kv: &mut [u16],
) -> Result<()> {
    const OP: &str = "rope_store";
    let HeadShape { heads, kv_heads, head_dim } = op.shape;
    let refuse = |expected: String, got: String| Err(Error::Shape { op: OP, expected, got });
    check_heads(OP, op.shape, op.layout)?;
    let (cols, block_len) = (op.shape.qkv_cols(), op.layout.block_words());
    let spans = Spans::check(OP, op.spans, op.block_table, op.layout.blocks_in(kv.len()), qkv.len() / cols)?;
    if 2 * op.rope.pairs > head_dim {
        return refuse(format!("at most {head_dim} rotary dimensions"), (2 * op.rope.pairs).to_string());
    }
    if let Some(span) = op.spans.iter().find(|span| span.pos0 as usize + span.rows as usize > op.rope.positions()) {
        return refuse(format!("positions below {}", op.rope.positions()), format!("{span:?}"));
    }
    if let Some((q, k, _)) = op.qk_norm
        && (q.len() != head_dim || k.len() != head_dim)
    {
        return refuse(format!("norm weights of {head_dim} values"), format!("{} and {}", q.len(), k.len()));
    }
    scratch.plan(&spans, op.layout.blocks_in(kv.len()))?;

    let StoreScratch { pieces, chunks, .. } = scratch;
    let (qkv, kv) = (SharedMut::new(qkv), SharedMut::new(kv));
    pool.run(chunks.len(), &|chunk, _worker| {
        let first = if chunk == 0 { 0 } else { chunks[chunk - 1] };
        for piece in &pieces[first..chunks[chunk]] {
            // SAFETY: `Spans::check` saw that rows of spans do not overlap, and pieces of a span have rows of their own.
            let rows = unsafe { qkv.part(piece.row0 * cols, piece.rows * cols) };
            // SAFETY: `plan` refused any block that occurs in two pieces.
            let block = unsafe { kv.part(op.layout.offset(piece.block, op.layer), block_len) };
            for (i, row) in rows.chunks_exact_mut(cols).enumerate() {
                let position = piece.pos0 + i;
                let (queries, rest) = row.split_at_mut(heads * head_dim);
                let (keys, values) = rest.split_at_mut(kv_heads * head_dim);
                if let Some((q_weight, k_weight, eps)) = op.qk_norm {
                    queries.chunks_exact_mut(head_dim).for_each(|q| rms_norm_in_place(isa, q, q_weight, eps));
                    keys.chunks_exact_mut(head_dim).for_each(|k| rms_norm_in_place(isa, k, k_weight, eps));
                }
                dispatch(isa, StoreRow { op, position, queries, keys, values, block });
            }
        }
    });
    Ok(())
}

impl StoreScratch {
    /// Cuts the spans at block boundaries and groups the pieces into chunks.
    fn plan(&mut self, spans: &Spans<'_>, blocks: usize) -> Result<()> {
        self.pieces.clear();
        self.chunks.clear();
        self.written.clear();
        self.written.resize(blocks.div_ceil(64), 0);
        let mut rows_in_chunk = 0;
        for span in spans.spans {
            let (mut row, mut position) = (span.row0 as usize, span.pos0 as usize);
            let end = position + span.rows as usize;
            while position < end {
                let next = (position / BLOCK_SIZE + 1) * BLOCK_SIZE;
                let rows = next.min(end) - position;
                let block = spans.table(span)[position / BLOCK_SIZE];
                let (word, bit) = (block.0 as usize / 64, 1 << (block.0 % 64));
                if self.written[word] & bit != 0 {
                    return Err(Error::Shape {
                        op: "rope_store",
                        expected: "a block of its own for every sequence to write to".into(),
                        got: format!("{block:?} twice"),
                    });
                }
                self.written[word] |= bit;
                self.pieces.push(Piece { row0: row, rows, pos0: position, block });
                rows_in_chunk += rows;
                if rows_in_chunk >= ROWS_PER_CHUNK {
                    self.chunks.push(self.pieces.len());
                    rows_in_chunk = 0;
                }
                (row, position) = (row + rows, position + rows);
            }
        }
        if rows_in_chunk > 0 {
            self.chunks.push(self.pieces.len());
        }
        Ok(())
    }
}

/// Turns the heads of one row and stores its keys and values.
struct StoreRow<'a> {
    op: &'a RopeStoreOp<'a>,
    position: usize,
    queries: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a [f32],
    block: &'a mut [u16],
}

impl Kernel for StoreRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let head_dim = self.op.shape.head_dim;
        let (cosines, sines) = self.op.rope.at(self.position);
        let slot = self.position % BLOCK_SIZE;
        let scale = s.splat(self.op.query_scale);
        for head in self.queries.chunks_exact_mut(head_dim) {
            turn(s, head, cosines, sines, self.op.pairs);
            for values in head.as_chunks_mut::<LANES>().0 {
                s.store(s.mul(s.load(values), scale), values);
            }
        }
        let heads = self.keys.chunks_exact_mut(head_dim).zip(self.values.chunks_exact(head_dim));
        for ((key, value), block) in heads.zip(self.block.chunks_exact_mut(self.op.layout.head_words())) {
            turn(s, key, cosines, sines, self.op.pairs);
            match self.op.layout.ty {
                KvType::F16 => {
                    let (keys, values) = block.split_at_mut(head_dim * BLOCK_SIZE);
                    for (part, source) in key.as_chunks::<LANES>().0.iter().enumerate() {
                        put_key(keys, (head_dim, slot), part, &to_halves(s, source));
                    }
                    let row = &mut values[slot * head_dim..][..head_dim];
                    for (source, out) in value.as_chunks::<LANES>().0.iter().zip(row.as_chunks_mut::<LANES>().0) {
                        *out = to_halves(s, source);
                    }
                }
                KvType::Int8 => {
                    let (scales, elements) = block.split_at_mut(SCALE_WORDS);
                    let (key_scales, value_scales) = cast_mut::<f32>(scales).split_at_mut(BLOCK_SIZE);
                    // Two dimensions of a key lie side by side, and the values of two positions.
                    let (keys, values) = cast_mut::<[i8; 2]>(elements).split_at_mut(head_dim / 2 * BLOCK_SIZE);
                    key_scales[slot] = to_bytes(s, key, |part, bytes| {
                        let pairs: &[[i8; 2]; LANES / 2] = bytes.as_chunks().0.as_array().expect("half as many pairs");
                        put_key(keys, (head_dim / 2, slot), part, pairs);
                    });
                    let row = &mut values[slot / 2 * head_dim..][..head_dim];
                    let row = row.as_chunks_mut::<LANES>().0;
                    value_scales[slot] = to_bytes(s, value, |part, bytes| {
                        for (pair, byte) in row[part].iter_mut().zip(bytes) {
                            pair[slot % 2] = *byte;
                        }
                    });
                }
                KvType::Fp8 => unreachable!("`alloc_kv` refuses it"),
            }
        }
    }
}

/// Puts elements `N * part..` of a key, of `len` elements, into the column of its position.
#[inline(always)]
fn put_key<E: Plain, const N: usize>(keys: &mut [E], (len, slot): (usize, usize), part: usize, elements: &[E; N]) {
    let group = &mut keys[slot / LANES * len * LANES..][..len * LANES];
    let columns = &mut group.as_chunks_mut::<LANES>().0[part * N..][..N];
    for (column, element) in columns.iter_mut().zip(elements) {
        column[slot % LANES] = *element;
    }
}

/// The largest IEEE half. What is larger becomes this: an infinity in the pool would turn a weight of zero into NaN.
const LARGEST: f32 = 65_504.0;

/// 16 values, none of them larger than [`LARGEST`].
#[inline(always)]
fn bounded<S: Simd>(s: S, source: &[f32; LANES]) -> S::V {
    s.max(s.min(s.load(source), s.splat(LARGEST)), s.splat(-LARGEST))
}

/// Quantises the key or value of a head to bytes, hands them over 16 at a time, and returns their scale.
#[inline(always)]
fn to_bytes<S: Simd>(s: S, source: &[f32], mut put: impl FnMut(usize, &[i8; LANES])) -> f32 {
    /// Below this, everything counts as zero: `127 / largest` must stay finite.
    const SMALLEST: f32 = 1e-36;
    let parts = source.as_chunks::<LANES>().0;
    let largest = parts.iter().fold(s.splat(0.0), |largest, part| s.max(largest, s.abs(bounded(s, part))));
    let largest = s.reduce_max(largest);
    let (scale, inverse) = if largest > SMALLEST { (largest / 127.0, 127.0 / largest) } else { (0.0, 0.0) };
    let inverse = s.splat(inverse);
    for (pair, parts) in parts.chunks(2).enumerate() {
        let scaled = |i: usize| parts.get(i).map_or(s.splat(0.0), |part| s.mul(bounded(s, part), inverse));
        let mut bytes = [0; 2 * LANES];
        s.round_i8([scaled(0), scaled(1)], &mut bytes);
        for (i, bytes) in bytes.as_chunks::<LANES>().0[..parts.len()].iter().enumerate() {
            put(2 * pair + i, bytes);
        }
    }
    scale
}

/// Rounds to IEEE halves.
#[inline(always)]
fn to_halves<S: Simd>(s: S, source: &[f32; LANES]) -> [u16; LANES] {
    let mut halves = [0; LANES];
    s.store_f16(bounded(s, source), &mut halves);
    halves
}

/// Turns the first `2 * cosines.len()` dimensions of a head.
#[inline(always)]
fn turn<S: Simd>(s: S, head: &mut [f32], cosines: &[f32], sines: &[f32], pairs: RopePairs) {
    let turning = &mut head[..2 * cosines.len()];
    match pairs {
        RopePairs::Interleaved => {
            for (pair, (&cos, &sin)) in turning.as_chunks_mut::<2>().0.iter_mut().zip(cosines.iter().zip(sines)) {
                let [x, y] = *pair;
                *pair = [x * cos - y * sin, y * cos + x * sin];
            }
        }
        RopePairs::Halves => {
            let (first, second) = turning.split_at_mut(cosines.len());
            let (first, first_tail) = first.as_chunks_mut::<LANES>();
            let (second, second_tail) = second.as_chunks_mut::<LANES>();
            let (cosines, cosines_tail) = cosines.as_chunks::<LANES>();
            let (sines, sines_tail) = sines.as_chunks::<LANES>();
            for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cosines.iter().zip(sines)) {
                let (x, y, cos, sin) = (s.load(first), s.load(second), s.load(cos), s.load(sin));
                s.store(s.sub(s.mul(x, cos), s.mul(y, sin)), first);
                s.store(s.add(s.mul(y, cos), s.mul(x, sin)), second);
            }
            let tails = first_tail.iter_mut().zip(second_tail).zip(cosines_tail.iter().zip(sines_tail));
            for ((first, second), (cos, sin)) in tails {
                (*first, *second) = (*first * cos - *second * sin, *second * cos + *first * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests;
