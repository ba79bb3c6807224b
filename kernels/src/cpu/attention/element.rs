//! The elements of keys and values in the pool: how a head's part of a block is divided, and how it is multiplied.
//!
//! A vector of the pool holds what 16 sums consume in one step: one element each as f16, two as int8.
//!
//! ```text
//!            key vectors                              value vectors                      multiplied with
//!   f16      [group of 16][dim]        16 positions   [position]       [dim / 16] 16     f32
//!   int8     [group of 16][dim / 2]    16 positions   [position / 2]   [dim / 16] 16     two i16: integer sums are exact,
//!                                      x 2 dims                        x 2 positions     and half the work
//! ```
//!
//! What int8 elements are multiplied with, queries and weights, is rounded to 15 bits of the largest in its row and tile:
//! an error a hundred times below that of the elements themselves.

use crate::cpu::simd::{LANES, Simd};
use crate::kv::{KvType, SCALE_WORDS};
use crate::memory::{Plain, cast, cast_mut};

/// One head's part of a block.
pub(super) struct HeadBlock<'a, V> {
    /// `[2 groups][dim / depth]`
    pub(super) keys: &'a [V],
    /// `[position / depth][dim / 16]`
    pub(super) values: &'a [V],
    /// Factors of both groups of keys, then of values; nothing where elements are the numbers themselves.
    pub(super) scales: &'a [[f32; LANES]],
}

/// What keys and values are stored as.
pub(super) trait Element {
    /// Its name in a layout.
    const TYPE: KvType;
    /// Elements that a vector holds for each of 16 sums.
    const DEPTH: usize;
    /// A vector of the pool.
    type Vector: Plain;
    /// What the `DEPTH` elements for one sum are multiplied with.
    type Factor: Plain;
    /// Sixteen sums.
    type Acc<S: Simd>: Copy;

    /// Divides one head's words.
    fn split(words: &[u16]) -> HeadBlock<'_, Self::Vector>;

    /// Sums that start at `before` where they can, at 0 where [`Element::end`] adds it.
    fn begin<S: Simd>(s: S, before: S::V) -> Self::Acc<S>;

    /// `sums[r] += vector * factors[r]`
    fn accumulate<S: Simd, const R: usize>(
        s: S,
        vector: &Self::Vector,
        factors: &[Self::Factor; R],
        sums: &mut [Self::Acc<S>; R],
    );

    /// `before + scale * sums`, for sums that began at `before`.
    fn end<S: Simd>(s: S, sums: Self::Acc<S>, before: S::V, scale: f32) -> S::V;

    /// Replaces values by factors of `DEPTH` values each, from the start of their memory on, and returns what `end` is to
    /// multiply sums with. No value is larger than `largest`; a sum has `terms` products.
    fn to_factors<S: Simd>(s: S, memory: &mut [[f32; LANES]], largest: f32, terms: usize) -> f32;
}

/// IEEE halves.
impl Element for u16 {
    const TYPE: KvType = KvType::F16;
    const DEPTH: usize = 1;
    type Vector = [u16; LANES];
    type Factor = f32;
    type Acc<S: Simd> = S::V;

    #[inline(always)]
    fn split(words: &[u16]) -> HeadBlock<'_, Self::Vector> {
        let vectors = words.as_chunks().0;
        let (keys, values) = vectors.split_at(vectors.len() / 2);
        HeadBlock { keys, values, scales: &[] }
    }

    #[inline(always)]
    fn begin<S: Simd>(_: S, before: S::V) -> S::V {
        before
    }

    #[inline(always)]
    fn accumulate<S: Simd, const R: usize>(s: S, vector: &Self::Vector, factors: &[f32; R], sums: &mut [S::V; R]) {
        s.fma_f16(vector, factors, sums);
    }

    #[inline(always)]
    fn end<S: Simd>(_: S, sums: S::V, _: S::V, _: f32) -> S::V {
        sums
    }

    #[inline(always)]
    fn to_factors<S: Simd>(_: S, _: &mut [[f32; LANES]], _: f32, _: usize) -> f32 {
        1.0
    }
}

/// Bytes with scales.
impl Element for i8 {
    const TYPE: KvType = KvType::Int8;
    const DEPTH: usize = 2;
    type Vector = [i8; 2 * LANES];
    type Factor = [i16; 2];
    type Acc<S: Simd> = S::I;

    #[inline(always)]
    fn split(words: &[u16]) -> HeadBlock<'_, Self::Vector> {
        let (scales, elements) = words.split_at(SCALE_WORDS);
        let vectors = cast::<Self::Vector>(elements);
        let (keys, values) = vectors.split_at(vectors.len() / 2);
        HeadBlock { keys, values, scales: cast(scales) }
    }

    #[inline(always)]
    fn begin<S: Simd>(s: S, _: S::V) -> S::I {
        s.zero_sums()
    }

    #[inline(always)]
    fn accumulate<S: Simd, const R: usize>(s: S, vector: &Self::Vector, pairs: &[[i16; 2]; R], sums: &mut [S::I; R]) {
        s.dot_pairs(vector, pairs, sums);
    }

    #[inline(always)]
    fn end<S: Simd>(s: S, sums: S::I, before: S::V, scale: f32) -> S::V {
        s.fma(s.sums_to_f32(sums), s.splat(scale), before)
    }

    #[inline(always)]
    fn to_factors<S: Simd>(s: S, memory: &mut [[f32; LANES]], largest: f32, terms: usize) -> f32 {
        /// Below this, everything counts as zero: the inverse must stay finite.
        const SMALLEST: f32 = 1e-33;
        // The largest factor: a sum of `terms` products with bytes stays within an i32. From heads of 1,024 on, that is
        // less than 15 bits.
        let limit = (i32::MAX as usize / (128 * terms)).min(i16::MAX as usize) as f32;
        let (scale, inverse) = if largest > SMALLEST { (largest / limit, limit / largest) } else { (0.0, 0.0) };
        let inverse = s.splat(inverse);
        for part in 0..memory.len() {
            let scaled = s.mul(s.load(&memory[part]), inverse);
            // Integers take half the room of the floats: they never overtake those that are still to be read.
            s.store_i16(scaled, &mut cast_mut(memory)[part]);
        }
        scale
    }
}
