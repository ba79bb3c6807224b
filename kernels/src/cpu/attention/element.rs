//! The elements of keys and values in the pool, and how a head's part of a block is divided.

use crate::cpu::simd::{LANES, Simd};
use crate::kv::{KvType, SCALE_WORDS};
use crate::memory::{Plain, cast};

/// One head's part of a block.
pub(super) struct HeadBlock<'a, E> {
    /// `[2 groups][dim]`
    pub(super) keys: &'a [[E; LANES]],
    /// `[position][dim / 16]`
    pub(super) values: &'a [[E; LANES]],
    /// Factors of both groups of keys, then of values; nothing where elements are the numbers themselves.
    pub(super) scales: &'a [[f32; LANES]],
}

/// What keys and values are stored as.
pub(super) trait Element: Plain {
    /// Its name in a layout.
    const TYPE: KvType;

    /// Divides one head's words.
    fn split(words: &[u16]) -> HeadBlock<'_, Self>;

    /// 16 elements as floats, without their factor.
    fn load<S: Simd>(s: S, elements: &[Self; LANES]) -> S::V;
}

/// IEEE halves.
impl Element for u16 {
    const TYPE: KvType = KvType::F16;

    #[inline(always)]
    fn split(words: &[u16]) -> HeadBlock<'_, Self> {
        let vectors = words.as_chunks().0;
        let (keys, values) = vectors.split_at(vectors.len() / 2);
        HeadBlock { keys, values, scales: &[] }
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, elements: &[Self; LANES]) -> S::V {
        s.load_f16(elements)
    }
}

/// Bytes with scales.
impl Element for i8 {
    const TYPE: KvType = KvType::Int8;

    #[inline(always)]
    fn split(words: &[u16]) -> HeadBlock<'_, Self> {
        let (scales, elements) = words.split_at(SCALE_WORDS);
        let vectors = cast::<[i8; LANES]>(elements);
        let (keys, values) = vectors.split_at(vectors.len() / 2);
        HeadBlock { keys, values, scales: cast(scales) }
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, elements: &[Self; LANES]) -> S::V {
        s.load_i8(elements)
    }
}
