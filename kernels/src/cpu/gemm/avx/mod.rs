//! Integer dot products in 256-bit registers: 8 weight rows by 4 columns in each.
//!
//! ```text
//!   avx2.rs    AVX2: products of bytes are added in pairs into 16 bits, and widened before they overflow
//!   vnni.rs    AVX-VNNI: four products of bytes are added into 32 bits at once
//!   tiles.rs   the loops over rows and blocks around either, compiled for each
//! ```
//!
//! ```text
//!   few rows     packed unit ──codes in registers──> dot
//!   more rows    packed panel ──once──> two strips of 8 rows in L1/L2 ──> dot with every tile of the group
//! ```
//!
//! A register tile is 16 weight rows (two vectors of 8) by up to 4 activation rows: 8 sums, 2 weights and 1 broadcast
//! activation fit the 16 registers; the f32 accumulators are touched once per block and lie in memory. Where a block takes
//! many runs, it is 8 weight rows: the sums of the runs stay in registers too.
//!
//! Codes of 8 bits are unsigned with a zero of 128 in a packed panel. A dot product may want them `SIGNED`: then their zero is
//! 0, and nothing pays for it.

mod memory;
#[macro_use]
mod tiles;

mod avx2;
mod vnni;

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm256_add_epi32, _mm256_and_si256, _mm256_broadcastq_epi64, _mm256_broadcastsi128_si256,
    _mm256_castps_si256, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16, _mm256_cvtepu8_epi32,
    _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_mullo_epi16, _mm256_mullo_epi32, _mm256_or_si256,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi8, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srai_epi16, _mm256_srai_epi32,
    _mm256_srli_epi16, _mm256_xor_ps, _mm256_xor_si256,
};

use self::memory::{
    load_8, load_16, load_f32, load_halves, load_ints, load_table, load_word, store_bytes, store_f32, store_ints,
};
use crate::format::ggml::BLOCK;
use crate::format::pack::{Codes, IQ4_CODES, Packed, Scales, Word, Zero, ZeroKind};
use crate::memory::Plain;

/// Rows of a vector.
const EIGHT: usize = 8;

/// A block of 8 rows as the dot product wants it: codes, `I` vectors of pairs of whole numbers, and floats.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Strip<const I: usize> {
    codes: [[u8; 32]; 8],
    ints: [[i16; 16]; I],
    d: [f32; EIGHT],
    offset: [f32; EIGHT],
}

impl<const I: usize> Plain for Strip<I> {}

/// What the codes of a block's 8 rows are multiplied with.
#[derive(Clone, Copy)]
struct Factors {
    d: __m256,
    /// Times the scaled sum of the activations, or times `d_x` for [`ZeroKind::Mins`].
    offset: __m256,
    /// Pairs of equal scales: of the first and the last 16 columns.
    scales: [__m256i; 2],
    /// Pairs for the sums of both 16 columns.
    pairs: __m256i,
}

/// Factors of rows `8 * half..` of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn factors<B: Packed, const SIGNED: bool>(unit: &B, b: usize, half: usize) -> Factors {
    let d = load_halves(unit.d(), half);
    let (scales, mut pairs) = match unit.scales(b) {
        Scales::One => ([_mm256_set1_epi16(1); 2], _mm256_setzero_si256()),
        Scales::Each(scales) => {
            let scales = both(load_8(&scales.as_chunks::<8>().0[half].map(i8::cast_unsigned)));
            ([scales; 2], scales)
        }
        Scales::Halves(scales) => {
            let pairs =
                _mm256_cvtepi8_epi16(load_16(&scales.as_chunks::<8>().0[half].map(|s| s.map(i8::cast_unsigned))));
            (each_of(pairs), pairs)
        }
        Scales::LowNibbles(packed) => {
            let bytes = _mm256_cvtepu8_epi16(load_16(&packed.as_chunks::<8>().0[half]));
            (each_of(_mm256_and_si256(bytes, _mm256_set1_epi16(15))), _mm256_srli_epi16::<4>(bytes))
        }
    };
    let minus = _mm256_set1_ps(-0.0);
    let offset = match unit.zero(b) {
        _ if has_no_zero::<B, SIGNED>() => _mm256_setzero_ps(),
        Zero::Code(z) if B::SHAPE.scales == 0 => _mm256_mul_ps(d, _mm256_set1_ps(-f32::from(z))),
        Zero::Code(z) => {
            pairs = _mm256_mullo_epi16(pairs, _mm256_set1_epi16(-i16::from(z)));
            _mm256_setzero_ps()
        }
        Zero::Add(m) => load_halves(m, half),
        Zero::Mins(dmin, mins) => {
            let mins = _mm256_cvtepu8_epi32(load_8(&mins.as_chunks::<8>().0[half]));
            _mm256_mul_ps(_mm256_xor_ps(load_halves(dmin, half), minus), _mm256_cvtepi32_ps(mins))
        }
        Zero::HighNibbles(dmin, _) => _mm256_xor_ps(load_halves(dmin, half), minus),
    };
    Factors { d, offset, scales, pairs }
}

/// True where the codes' zero is 0.
const fn has_no_zero<B: Packed, const SIGNED: bool>() -> bool {
    SIGNED && B::SHAPE.bits == 8
}

/// Adds a block to the accumulator of a row, given its scaled integer sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<B: Packed, const SIGNED: bool>(
    acc: __m256,
    sum: __m256i,
    w: &Factors,
    [d_x, s_x]: [f32; 2],
    x_sums: [i16; 2],
) -> __m256 {
    let scale = _mm256_mul_ps(w.d, _mm256_set1_ps(d_x));
    if has_no_zero::<B, SIGNED>() {
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc);
    }
    let mut sum = sum;
    let zero = match B::SHAPE.zero {
        ZeroKind::Float => None,
        ZeroKind::Codes | ZeroKind::Mins => Some(_mm256_madd_epi16(w.pairs, both_sums(x_sums))),
    };
    if let (ZeroKind::Codes, Some(zero)) = (B::SHAPE.zero, zero) {
        sum = _mm256_add_epi32(sum, zero);
    }
    let acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, acc);
    match (B::SHAPE.zero, zero) {
        (ZeroKind::Float, _) => _mm256_fmadd_ps(w.offset, _mm256_set1_ps(s_x), acc),
        (ZeroKind::Mins, Some(zero)) => {
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(zero), _mm256_mul_ps(w.offset, _mm256_set1_ps(d_x)), acc)
        }
        _ => acc,
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<B: Packed, const SIGNED: bool, const I: usize>(unit: &B, b: usize, half: usize, out: &mut Strip<I>) {
    let w = factors::<B, SIGNED>(unit, b, half);
    store_f32(w.d, &mut out.d);
    store_f32(w.offset, &mut out.offset);
    for (out, ints) in out.ints.iter_mut().zip([w.scales[0], w.scales[1], w.pairs]) {
        store_ints(ints, out);
    }
    each_group!(j => {
        store_bytes(group::<SIGNED>(unit.codes(b), j, half), &mut out.codes[j]);
    });
}

/// What [`unpack`] kept of [`Factors`], without the scales.
#[inline]
#[target_feature(enable = "avx2")]
fn strip_factors<const I: usize>(block: &Strip<I>, scales: [__m256i; 2]) -> Factors {
    let pairs = block.ints.get(2).map_or_else(|| _mm256_setzero_si256(), |pairs| load_ints(pairs));
    Factors { d: load_f32(&block.d), offset: load_f32(&block.offset), scales, pairs }
}

/// What [`unpack`] kept of [`Factors::scales`].
#[inline]
#[target_feature(enable = "avx2")]
fn strip_scales<const I: usize>(block: &Strip<I>) -> [__m256i; 2] {
    match block.ints.as_slice() {
        [] => [_mm256_set1_epi16(1); 2],
        [both] => [load_ints(both); 2],
        [first, second, ..] => [load_ints(first), load_ints(second)],
    }
}

/// Codes of group `j` of a block, rows `8 * half..`.
#[inline]
#[target_feature(enable = "avx2")]
fn group<const SIGNED: bool>(codes: Codes<'_>, j: usize, half: usize) -> __m256i {
    let nibble = |words: &[Word; 4]| bits(load_word(&words[j % 4], half), 4 * (j / 4), 0, 0x0f);
    let pair = |words: &[Word; 2], to: usize| bits(load_word(&words[j / 4], half), 2 * (j % 4), to, 0x03 << to);
    let bit = |word: &Word, to: usize| bits(load_word(word, half), j, to, 0x01 << to);
    match codes {
        Codes::Two(low) => pair(low, 0),
        Codes::Three(low, high) => _mm256_or_si256(pair(low, 0), bit(high, 2)),
        Codes::Four(low) => nibble(low),
        Codes::Five(low, high) => _mm256_or_si256(nibble(low), bit(high, 4)),
        Codes::Six(low, high) => _mm256_or_si256(nibble(low), pair(high, 4)),
        Codes::Eight(words) => {
            let word = load_word(&words[j], half);
            if SIGNED { _mm256_xor_si256(word, _mm256_set1_epi8(-128)) } else { word }
        }
        Codes::Table(low) => {
            let table = IQ4_CODES.map(|code| if SIGNED { code ^ 0x80 } else { code });
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_table(&table)), nibble(low))
        }
    }
}

/// Sums times a scale that is given as pairs of equal numbers of 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn scaled(sums: __m256i, scales: __m256i) -> __m256i {
    _mm256_mullo_epi32(sums, _mm256_srai_epi32::<16>(scales))
}

/// The sums of whole blocks, each times its row's first scale.
#[inline]
#[target_feature(enable = "avx2")]
fn all_scaled<const N: usize, const H: usize>(
    mut sums: [[__m256i; H]; N],
    scales: [[__m256i; 2]; H],
) -> [[__m256i; H]; N] {
    for sums in &mut sums {
        for (sum, scales) in sums.iter_mut().zip(scales) {
            *sum = scaled(*sum, scales[0]);
        }
    }
    sums
}

/// Bits `from..` of each byte, moved to `to..`, as far as the mask reaches.
#[inline]
#[target_feature(enable = "avx2")]
fn bits(bytes: __m256i, from: usize, to: usize, mask: i8) -> __m256i {
    // Shifts work on 16 bits; what crosses from one byte to the next, the mask takes away.
    let moved = match (from, to) {
        (1, 0) | (5, 4) | (3, 2) => _mm256_srli_epi16::<1>(bytes),
        (2, 0) | (6, 4) | (4, 2) => _mm256_srli_epi16::<2>(bytes),
        (3, 0) | (7, 4) | (5, 2) => _mm256_srli_epi16::<3>(bytes),
        (4, 0) | (6, 2) => _mm256_srli_epi16::<4>(bytes),
        (7, 2) => _mm256_srli_epi16::<5>(bytes),
        (6, 0) => _mm256_srli_epi16::<6>(bytes),
        (3, 4) | (1, 2) => _mm256_slli_epi16::<1>(bytes),
        (2, 4) | (0, 2) => _mm256_slli_epi16::<2>(bytes),
        (1, 4) => _mm256_slli_epi16::<3>(bytes),
        (0, 4) => _mm256_slli_epi16::<4>(bytes),
        _ => bytes,
    };
    _mm256_and_si256(moved, _mm256_set1_epi8(mask))
}

/// The same place, which the compiler takes for one that others know of: between two [`barrier`]s it may be in registers, and
/// at each it is in memory. Sums that are touched once a block are kept out of the way so; the compiler itself would move all of
/// them between registers and the stack, and to other registers, in every block.
#[inline(always)]
fn in_memory<T>(place: &mut T) -> &mut T {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("/* {0} */", in(reg) &raw mut *place, options(nostack, preserves_flags)) };
    place
}

/// See [`in_memory`].
#[inline(always)]
fn barrier() {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("", options(nostack, preserves_flags)) };
}

/// Columns `4j..4j + 4` of an activation block in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(x: &[i8; BLOCK], j: usize) -> __m256i {
    let group = x.as_chunks::<4>().0[j];
    // As a float: two neighbours loaded as integers would become one load, with moves and a shift to part them.
    _mm256_castps_si256(_mm256_set1_ps(f32::from_ne_bytes(group.map(i8::cast_unsigned))))
}

/// Both sums of an activation block in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn both_sums([low, high]: [i16; 2]) -> __m256i {
    _mm256_set1_epi32(i32::from(low) & 0xffff | i32::from(high) << 16)
}

/// Pairs of equal numbers from 8 signed bytes, which lie in each half of the vector.
#[inline]
#[target_feature(enable = "avx2")]
fn both(bytes: __m128i) -> __m256i {
    const Z: i8 = -128;
    // Each byte to the upper half of two 16-bit places, then down with its sign.
    let places = _mm256_setr_epi8(
        Z, 0, Z, 0, Z, 1, Z, 1, Z, 2, Z, 2, Z, 3, Z, 3, Z, 4, Z, 4, Z, 5, Z, 5, Z, 6, Z, 6, Z, 7, Z, 7,
    );
    _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(_mm256_broadcastq_epi64(bytes), places))
}

/// From pairs `(a, b)`: pairs `(a, a)` and pairs `(b, b)`.
#[inline]
#[target_feature(enable = "avx2")]
fn each_of(pairs: __m256i) -> [__m256i; 2] {
    let first = _mm256_setr_epi8(
        0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13, 0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13,
    );
    let second = _mm256_or_si256(first, _mm256_set1_epi8(2));
    [_mm256_shuffle_epi8(pairs, first), _mm256_shuffle_epi8(pairs, second)]
}
