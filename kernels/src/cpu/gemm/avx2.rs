//! Integer dot products with AVX2, which multiplies unsigned by signed bytes but adds the pairs into 16 bits.
//!
//! How many products of a code with 127 fit 16 bits decides how many words are summed before the sums are widened, and the
//! multiplication that widens them applies the whole-number scale on the way:
//!
//! ```text
//!   up to 4 bits   8 words, a whole block       16 * 15 * 127 = 30,480
//!   5 bits         4 words, 16 columns           8 * 31 * 127 = 31,496
//!   6 bits         2 words                       4 * 63 * 127 = 32,004
//!   8 bits         two planes of nibbles, `16 * high + low`
//! ```
//!
//! ```text
//!   up to 3 rows   packed unit ──codes in registers──> dot
//!   more rows      packed panel ──once──> two strips of 8 rows in L1/L2 ──> dot with every tile of the group
//! ```
//!
//! A register tile is 16 weight rows (two vectors of 8) by up to 4 activation rows: 8 sums of 16 bits, 2 weights and 1
//! broadcast activation fit the 16 registers; the f32 accumulators are touched once per block and may spill. Where a block
//! takes several runs or planes, it is 8 weight rows: sums of 32 bits stay in registers too.

mod memory;

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_broadcastq_epi64,
    _mm256_broadcastsi128_si256, _mm256_castps_si256, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
    _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_mullo_epi16,
    _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi8,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_srai_epi16,
    _mm256_srli_epi16, _mm256_xor_ps,
};

use self::memory::{
    half_mut, load_8, load_16, load_bytes, load_f32, load_halves, load_ints, load_table, load_word, store_bytes,
    store_f32, store_ints,
};
use super::{Group, IntDot, Lanes, PREFETCH, TileActs, TileQuants, exact, prefetch};
use crate::cpu::act::Tile;
use crate::cpu::simd::Avx2;
use crate::format::ggml::BLOCK;
use crate::format::pack::{Codes, IQ4_CODES, Packed, Scales, Word, Zero, ZeroKind};
use crate::memory::{Plain, cast, cast_mut};

/// From this many rows on, a panel is unpacked before it is used.
const UNPACK_ROWS: usize = 12;

/// Rows of a vector.
const EIGHT: usize = 8;

/// A block of 8 rows as the dot product wants it: `P` planes of codes, `I` vectors of pairs of whole numbers, and floats.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Strip<const P: usize, const I: usize> {
    codes: [[[u8; 32]; 8]; P],
    ints: [[i16; 16]; I],
    d: [f32; EIGHT],
    offset: [f32; EIGHT],
}

impl<const P: usize, const I: usize> Plain for Strip<P, I> {}

/// Repeats the body for each of the 8 groups of a block, unrolled.
macro_rules! each_group {
    ($j:ident => $body:block) => {
        each_group!(@each $j $body 0 1 2 3 4 5 6 7)
    };
    (@each $j:ident $body:block $($group:literal)*) => {
        $({
            let $j: usize = $group;
            $body
        })*
    };
}

impl IntDot for Avx2 {
    const TILE_ROWS: usize = 4;

    fn scratch_bytes(cols: usize) -> usize {
        2 * (cols / BLOCK) * size_of::<Strip<2, 3>>()
    }

    #[inline(always)]
    fn panel<B: Packed>(self, panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
        // SAFETY: `self` came from `detect`, which saw AVX2, FMA and F16C.
        unsafe { any_rows(panel, rows, scratch, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn any_rows<B: Packed>(panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
    if rows.len() < UNPACK_ROWS {
        for tile in rows.tiles() {
            let out = &mut out[tile.row - rows.first..][..tile.len];
            match tile.len {
                4 => packed_tile::<B, 4>(panel, rows.acts(tile), exact(out)),
                2 => packed_tile::<B, 2>(panel, rows.acts(tile), exact(out)),
                _ => packed_tile::<B, 1>(panel, rows.acts(tile), exact(out)),
            }
        }
        return;
    }
    match (B::SHAPE.bits == 8, B::SHAPE.scales) {
        (false, 0) => unpacked::<B, 1, 0>(panel, rows, scratch, out),
        (false, 1) => unpacked::<B, 1, 1>(panel, rows, scratch, out),
        (false, _) => unpacked::<B, 1, 3>(panel, rows, scratch, out),
        (true, 0) => unpacked::<B, 2, 0>(panel, rows, scratch, out),
        (true, _) => unpacked::<B, 2, 3>(panel, rows, scratch, out),
    }
}

/// Words whose products are summed in 16 bits.
const fn run_words<B: Packed>() -> usize {
    match (B::SHAPE.bits, B::SHAPE.scales) {
        (6, _) => 2,
        (5, _) | (_, 2) => 4,
        _ => 8,
    }
}

/// True where a block is summed in 16 bits from end to end, so that both vectors of a panel's rows find registers.
const fn one_run<B: Packed>() -> bool {
    B::SHAPE.bits < 8 && run_words::<B>() == 8
}

/// What the codes of a block's 8 rows are multiplied with.
#[derive(Clone, Copy)]
struct Factors {
    d: __m256,
    /// Times the scaled sum of the activations, or times `d_x` for [`ZeroKind::Mins`].
    offset: __m256,
    /// Pairs of equal scales: of the first and the last 16 columns; with two planes, of the low and the high one.
    scales: [__m256i; 2],
    /// Pairs for the sums of both 16 columns.
    pairs: __m256i,
}

/// Factors of rows `8 * half..` of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn factors<B: Packed>(unit: &B, b: usize, half: usize) -> Factors {
    let d = load_halves(unit.d(), half);
    let (scales, mut pairs) = match unit.scales(b) {
        Scales::One if B::SHAPE.bits == 8 => ([_mm256_set1_epi16(1), _mm256_set1_epi16(16)], _mm256_setzero_si256()),
        Scales::One => ([_mm256_set1_epi16(1); 2], _mm256_setzero_si256()),
        Scales::Each(scales) => {
            let scales = both(load_8(&scales.as_chunks::<8>().0[half].map(i8::cast_unsigned)));
            let second = if B::SHAPE.bits == 8 { _mm256_slli_epi16::<4>(scales) } else { scales };
            ([scales, second], scales)
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

/// Adds a block to the accumulator of a row, given its scaled integer sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<B: Packed>(acc: __m256, sum: __m256i, w: &Factors, [d_x, s_x]: [f32; 2], x_sums: [i16; 2]) -> __m256 {
    let mut sum = sum;
    let zero = match B::SHAPE.zero {
        ZeroKind::Float => None,
        ZeroKind::Codes | ZeroKind::Mins => Some(_mm256_madd_epi16(w.pairs, both_sums(x_sums))),
    };
    if let (ZeroKind::Codes, Some(zero)) = (B::SHAPE.zero, zero) {
        sum = _mm256_add_epi32(sum, zero);
    }
    let d_x = _mm256_set1_ps(d_x);
    let acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(w.d, d_x), acc);
    match (B::SHAPE.zero, zero) {
        (ZeroKind::Float, _) => _mm256_fmadd_ps(w.offset, _mm256_set1_ps(s_x), acc),
        (ZeroKind::Mins, Some(zero)) => _mm256_fmadd_ps(_mm256_cvtepi32_ps(zero), _mm256_mul_ps(w.offset, d_x), acc),
        _ => acc,
    }
}

/// Multiplies a packed panel with one tile.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn packed_tile<B: Packed, const N: usize>(panel: &[B], acts: TileActs<'_, N>, out: &mut [Lanes; N]) {
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    for (unit, acts) in panel.iter().zip(acts.split(B::BLOCKS)) {
        for b in 0..B::BLOCKS {
            prefetch(unit, b, PREFETCH);
            let ([d_x, s_x], x_sums) = (acts.scales[b], &acts.sums[b]);
            let w = [factors(unit, b, 0), factors(unit, b, 1)];
            let codes = |j, half| planes(unit.codes(b), j, half);
            let mut sums = [[_mm256_setzero_si256(); 2]; N];
            if one_run::<B>() {
                sums = dots::<B, N, 2>(codes, [w[0].scales, w[1].scales], &acts.quants[b]);
            } else {
                // Half by half: sums of 16 and of 32 bits at once would need too many registers.
                for half in 0..2 {
                    let part = dots::<B, N, 1>(|j, _| codes(j, half), [w[half].scales], &acts.quants[b]);
                    for n in 0..N {
                        sums[n][half] = part[n][0];
                    }
                }
            }
            for n in 0..N {
                for half in 0..2 {
                    acc[n][half] = accumulate::<B>(acc[n][half], sums[n][half], &w[half], [d_x[n], s_x[n]], x_sums[n]);
                }
            }
        }
    }
    for ([low, high], out) in acc.into_iter().zip(out) {
        store_f32(low, half_mut(out, 0));
        store_f32(high, half_mut(out, 1));
    }
}

/// Unpacks a panel, then multiplies it with every tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpacked<B: Packed, const P: usize, const I: usize>(
    panel: &[B],
    rows: Group<'_>,
    scratch: &mut [u8],
    out: &mut [Lanes],
) {
    let blocks = panel.len() * B::BLOCKS;
    let scratch = &mut scratch[..2 * blocks * size_of::<Strip<P, I>>()];
    let strips = cast_mut::<Strip<P, I>>(scratch);
    for (i, unit) in panel.iter().enumerate() {
        for b in 0..B::BLOCKS {
            for half in 0..2 {
                let block = i * B::BLOCKS + b;
                // Side by side where both are multiplied at once, one after the other where not.
                let place = if one_run::<B>() { 2 * block + half } else { half * blocks + block };
                unpack(unit, b, half, &mut strips[place]);
            }
        }
    }
    let strips = cast::<Strip<P, I>>(scratch);
    // The next panel arrives while this one is multiplied with the first tile.
    let mut this = Some(panel);
    if one_run::<B>() {
        for tile in rows.tiles() {
            strip_tiles::<B, P, I, 2>(strips.as_chunks().0, (0, this.take()), (rows, tile), out);
        }
    } else {
        for (half, strip) in strips.chunks_exact(blocks).enumerate() {
            for tile in rows.tiles() {
                strip_tiles::<B, P, I, 1>(strip.as_chunks().0, (half, this.take()), (rows, tile), out);
            }
        }
    }
}

/// Multiplies `H` strips side by side, from `first` on, with one tile; asks meanwhile for what follows the panel, when it is given.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn strip_tiles<B: Packed, const P: usize, const I: usize, const H: usize>(
    strips: &[[Strip<P, I>; H]],
    first: (usize, Option<&[B]>),
    (rows, tile): (Group<'_>, Tile),
    out: &mut [Lanes],
) {
    let out = &mut out[tile.row - rows.first..][..tile.len];
    match tile.len {
        4 => strip_tile::<B, P, I, H, 4>(strips, first, rows.acts(tile), exact(out)),
        2 => strip_tile::<B, P, I, H, 2>(strips, first, rows.acts(tile), exact(out)),
        _ => strip_tile::<B, P, I, H, 1>(strips, first, rows.acts(tile), exact(out)),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<B: Packed, const P: usize, const I: usize>(unit: &B, b: usize, half: usize, out: &mut Strip<P, I>) {
    let w = factors(unit, b, half);
    store_f32(w.d, &mut out.d);
    store_f32(w.offset, &mut out.offset);
    for (out, ints) in out.ints.iter_mut().zip([w.scales[0], w.scales[1], w.pairs]) {
        store_ints(ints, out);
    }
    each_group!(j => {
        let planes = planes(unit.codes(b), j, half);
        for (out, plane) in out.codes.iter_mut().zip(planes) {
            store_bytes(plane, &mut out[j]);
        }
    });
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn strip_tile<B: Packed, const P: usize, const I: usize, const H: usize, const N: usize>(
    strips: &[[Strip<P, I>; H]],
    (first, panel): (usize, Option<&[B]>),
    acts: TileActs<'_, N>,
    out: &mut [Lanes; N],
) {
    let mut place = [[_mm256_setzero_ps(); H]; N];
    let acc = in_memory(&mut place);
    let acts = acts.quants.iter().zip(acts.scales.iter().zip(acts.sums));
    for (i, (strips, (quants, ([d_x, s_x], x_sums)))) in strips.iter().zip(acts).enumerate() {
        if let Some(panel) = panel {
            prefetch(&panel[i / B::BLOCKS], i % B::BLOCKS, size_of_val(panel));
        }
        let mut scales = [[_mm256_setzero_si256(); 2]; H];
        for (scales, strip) in scales.iter_mut().zip(strips) {
            *scales = strip_scales(strip);
        }
        barrier();
        let codes = |j: usize, h: usize| [load_bytes(&strips[h].codes[0][j]), load_bytes(&strips[h].codes[P - 1][j])];
        let sums = dots::<B, N, H>(codes, scales, quants);
        let w: [Factors; H] = std::array::from_fn(|h| strip_factors(&strips[h], scales[h]));
        for n in 0..N {
            let mut sum = acc[n];
            for h in 0..H {
                sum[h] = accumulate::<B>(sum[h], sums[n][h], &w[h], [d_x[n], s_x[n]], x_sums[n]);
            }
            acc[n] = sum;
        }
    }
    for (acc, out) in acc.iter().zip(out) {
        for (h, acc) in acc.iter().enumerate() {
            store_f32(*acc, half_mut(out, first + h));
        }
    }
}

/// What [`unpack`] kept of [`Factors`], without the scales.
#[inline]
#[target_feature(enable = "avx2")]
fn strip_factors<const P: usize, const I: usize>(block: &Strip<P, I>, scales: [__m256i; 2]) -> Factors {
    let pairs = block.ints.get(2).map_or_else(|| _mm256_setzero_si256(), |pairs| load_ints(pairs));
    Factors { d: load_f32(&block.d), offset: load_f32(&block.offset), scales, pairs }
}

/// What [`unpack`] kept of [`Factors::scales`].
#[inline]
#[target_feature(enable = "avx2")]
fn strip_scales<const P: usize, const I: usize>(block: &Strip<P, I>) -> [__m256i; 2] {
    match block.ints.as_slice() {
        [] => [_mm256_set1_epi16(1), _mm256_set1_epi16(if P == 2 { 16 } else { 1 })],
        [both] => [load_ints(both); 2],
        [first, second, ..] => [load_ints(first), load_ints(second)],
    }
}

/// Scaled dot products of a block's rows, in `H` vectors of 8, with `N` rows of activations; `codes` gives the planes of a
/// group of columns of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn dots<B: Packed, const N: usize, const H: usize>(
    codes: impl Fn(usize, usize) -> [__m256i; 2],
    scales: [[__m256i; 2]; H],
    x: &TileQuants<N>,
) -> [[__m256i; H]; N] {
    let mut sums = [[_mm256_setzero_si256(); H]; N];
    if B::SHAPE.bits == 8 {
        let mut high_sums = sums;
        each_group!(j => {
            for h in 0..H {
                let [low, high] = codes(j, h);
                for n in 0..N {
                    let x = broadcast(&x[n], j);
                    sums[n][h] = hold(_mm256_add_epi16(sums[n][h], _mm256_maddubs_epi16(low, x)));
                    high_sums[n][h] = hold(_mm256_add_epi16(high_sums[n][h], _mm256_maddubs_epi16(high, x)));
                }
            }
        });
        for n in 0..N {
            for h in 0..H {
                let low = _mm256_madd_epi16(sums[n][h], scales[h][0]);
                sums[n][h] = _mm256_add_epi32(low, _mm256_madd_epi16(high_sums[n][h], scales[h][1]));
            }
        }
    } else {
        let mut run = sums;
        each_group!(j => {
            let mut words = [_mm256_setzero_si256(); H];
            for (h, word) in words.iter_mut().enumerate() {
                [*word, _] = codes(j, h);
            }
            for n in 0..N {
                let x = broadcast(&x[n], j);
                for h in 0..H {
                    run[n][h] = hold(_mm256_add_epi16(run[n][h], _mm256_maddubs_epi16(words[h], x)));
                }
            }
            if (j + 1).is_multiple_of(run_words::<B>()) {
                for n in 0..N {
                    for h in 0..H {
                        sums[n][h] = _mm256_add_epi32(sums[n][h], _mm256_madd_epi16(run[n][h], scales[h][j / 4]));
                        run[n][h] = _mm256_setzero_si256();
                    }
                }
            }
        });
    }
    sums
}

/// Codes of group `j` of a block, rows `8 * half..`; for codes of 8 bits, low and high nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn planes(codes: Codes<'_>, j: usize, half: usize) -> [__m256i; 2] {
    let nibble = |words: &[Word; 4]| bits(load_word(&words[j % 4], half), 4 * (j / 4), 0, 0x0f);
    let pair = |words: &[Word; 2], to: usize| bits(load_word(&words[j / 4], half), 2 * (j % 4), to, 0x03 << to);
    let bit = |word: &Word, to: usize| bits(load_word(word, half), j, to, 0x01 << to);
    let one = match codes {
        Codes::Two(low) => pair(low, 0),
        Codes::Three(low, high) => _mm256_or_si256(pair(low, 0), bit(high, 2)),
        Codes::Four(low) => nibble(low),
        Codes::Five(low, high) => _mm256_or_si256(nibble(low), bit(high, 4)),
        Codes::Six(low, high) => _mm256_or_si256(nibble(low), pair(high, 4)),
        Codes::Eight(words) => {
            let word = load_word(&words[j], half);
            return [bits(word, 0, 0, 0x0f), bits(word, 4, 0, 0x0f)];
        }
        Codes::Table(low) => {
            let index = nibble(low);
            return [IQ4_CODES.map(|code| code & 15), IQ4_CODES.map(|code| code >> 4)]
                .map(|table| _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_table(&table)), index));
        }
    };
    [one, one]
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

/// The same vector, in the order of the source: without it, the compiler sums each row as a tree once the loops are
/// unrolled, loads every operand of a block first, and spills most of them.
#[inline]
#[target_feature(enable = "avx2")]
fn hold(mut vector: __m256i) -> __m256i {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("/* {0} */", inout(ymm_reg) vector, options(nomem, nostack, preserves_flags)) };
    vector
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
