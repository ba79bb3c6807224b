//! Integer dot products with AVX2, which multiplies unsigned by signed bytes but adds the pairs into 16 bits.
//!
//! Eight such products of nibbles stay below 2^15 (8 * 2 * 15 * 127 = 30,480), so a whole block of 32 columns is summed in
//! 16-bit lanes and widened once. Bytes would overflow; they are taken as two nibbles, `16 * high + low`, which is exact.
//!
//! ```text
//!   few rows    packed block ──nibbles in registers──> dot
//!   many rows   packed panel ──once──> Planes in L1/L2 ──> dot with every tile of the group
//! ```
//!
//! A register tile is 16 weight rows (two vectors of 8) by up to 4 activation rows: 8 accumulators of 16-bit sums, 2 to 4
//! weights and 1 broadcast activation fit the 16 registers; the f32 accumulators are touched once per block and may spill.

use std::arch::asm;
use std::arch::x86_64::{
    __m256, __m256i, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_cvtepi32_ps,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::{Group, IntDot, Lanes, TileQuants, TileScales, exact, prefetch_ahead, prefetch_block};
use crate::cpu::simd::Avx2;
use crate::format::ggml::BLOCK;
use crate::format::pack::{Offset, PANEL, PanelBlock, Quants};
use crate::memory::{Plain, cast, cast_mut};

/// From this many rows on, a panel is unpacked before it is used: unpacking costs about as much as it saves on 5 tiles.
const UNPACK_ROWS: usize = 24;

/// A block as the dot product wants it: nibbles as bytes, `P` planes of them (lowest first), and floats.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Planes<const P: usize> {
    d: [f32; PANEL],
    offset: [f32; PANEL],
    q: [[[u8; 64]; 8]; P],
}

impl<const P: usize> Plain for Planes<P> {}

/// Repeats the body for each of the 8 words of a block, unrolled.
macro_rules! each_word {
    ($j:ident => $body:block) => {
        each_word!(@each $j $body 0 1 2 3 4 5 6 7)
    };
    (@each $j:ident $body:block $($word:literal)*) => {
        $({
            let $j: usize = $word;
            $body
        })*
    };
}

impl IntDot for Avx2 {
    const TILE_ROWS: usize = 4;

    fn scratch_bytes(cols: usize) -> usize {
        cols / BLOCK * size_of::<Planes<2>>()
    }

    #[inline(always)]
    fn tile<B: PanelBlock, const N: usize>(
        self,
        panel: &[B],
        quants: &[TileQuants<N>],
        scales: &[TileScales<N>],
        out: &mut [Lanes; N],
    ) {
        // SAFETY: `self` came from `detect`, which saw AVX2, FMA and F16C.
        unsafe { packed_tile(panel, quants, scales, out) }
    }

    #[inline(always)]
    fn panel<B: PanelBlock>(self, panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
        if rows.len() < UNPACK_ROWS {
            for tile in rows.tiles() {
                let out = &mut out[tile.row - rows.first..][..tile.len];
                match tile.len {
                    4 => self.tile::<B, 4>(panel, rows.quants(tile), rows.scales(tile), exact(out)),
                    2 => self.tile::<B, 2>(panel, rows.quants(tile), rows.scales(tile), exact(out)),
                    _ => self.tile::<B, 1>(panel, rows.quants(tile), rows.scales(tile), exact(out)),
                }
            }
        } else if B::BITS == 4 {
            // SAFETY: `self` came from `detect`, which saw AVX2, FMA and F16C.
            unsafe { unpacked_panel::<B, 1>(panel, rows, scratch, out) }
        } else {
            // SAFETY: as above.
            unsafe { unpacked_panel::<B, 2>(panel, rows, scratch, out) }
        }
    }
}

/// Unpacks a panel, then multiplies it with every tile.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpacked_panel<B: PanelBlock, const P: usize>(panel: &[B], rows: Group<'_>, scratch: &mut [u8], out: &mut [Lanes]) {
    let scratch = &mut scratch[..size_of_val(panel) / size_of::<B>() * size_of::<Planes<P>>()];
    for (block, planes) in panel.iter().zip(cast_mut::<Planes<P>>(scratch)) {
        // The next panel arrives while this one is multiplied.
        prefetch_block(std::ptr::from_ref(block).wrapping_add(panel.len()));
        unpack(block, planes);
    }
    let planes = cast::<Planes<P>>(scratch);
    for tile in rows.tiles() {
        let out = &mut out[tile.row - rows.first..][..tile.len];
        match tile.len {
            4 => unpacked_tile::<P, 4>(planes, rows.quants(tile), rows.scales(tile), exact(out)),
            2 => unpacked_tile::<P, 2>(planes, rows.quants(tile), rows.scales(tile), exact(out)),
            _ => unpacked_tile::<P, 1>(planes, rows.quants(tile), rows.scales(tile), exact(out)),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack<B: PanelBlock, const P: usize>(block: &B, out: &mut Planes<P>) {
    let (d, offset) = floats(block);
    for half in 0..2 {
        store_f32(d[half], half_mut(&mut out.d, half));
        store_f32(offset[half], half_mut(&mut out.offset, half));
    }
    match block.quants() {
        Quants::Nibbles(words) => {
            for (j, word) in words.iter().enumerate() {
                for half in 0..2 {
                    let (low, high) = nibbles(load_word(word, half));
                    store_word(low, &mut out.q[0][j], half);
                    store_word(high, &mut out.q[0][j + 4], half);
                }
            }
        }
        Quants::Bytes(words) => {
            for (j, word) in words.iter().enumerate() {
                for half in 0..2 {
                    let (low, high) = nibbles(load_word(word, half));
                    store_word(low, &mut out.q[0][j], half);
                    store_word(high, &mut out.q[P - 1][j], half);
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn unpacked_tile<const P: usize, const N: usize>(
    panel: &[Planes<P>],
    quants: &[TileQuants<N>],
    scales: &[TileScales<N>],
    out: &mut [Lanes; N],
) {
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    for ((block, x), [d_x, s_x]) in panel.iter().zip(quants).zip(scales) {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        if P == 1 {
            each_word!(j => {
                let w = [load_word(&block.q[0][j], 0), load_word(&block.q[0][j], 1)];
                for n in 0..N {
                    let x = broadcast(&x[n], j);
                    for half in 0..2 {
                        sums[n][half] = hold(_mm256_add_epi16(sums[n][half], _mm256_maddubs_epi16(w[half], x)));
                    }
                }
            });
            for sums in &mut sums {
                *sums = [widen(sums[0], 1), widen(sums[1], 1)];
            }
        } else {
            // Half by half: two planes of both halves would need 16 accumulators.
            let mut halves = [[_mm256_setzero_si256(); N]; 2];
            for (half, sums) in halves.iter_mut().enumerate() {
                let mut low = [_mm256_setzero_si256(); N];
                let mut high = [_mm256_setzero_si256(); N];
                each_word!(j => {
                    let (w_low, w_high) = (load_word(&block.q[0][j], half), load_word(&block.q[P - 1][j], half));
                    for n in 0..N {
                        let x = broadcast(&x[n], j);
                        low[n] = hold(_mm256_add_epi16(low[n], _mm256_maddubs_epi16(w_low, x)));
                        high[n] = hold(_mm256_add_epi16(high[n], _mm256_maddubs_epi16(w_high, x)));
                    }
                });
                for n in 0..N {
                    sums[n] = _mm256_add_epi32(widen(low[n], 1), widen(high[n], 16));
                }
            }
            sums = interleave(halves);
        }
        for half in 0..2 {
            let (d, offset) = (load_f32(half_of(&block.d, half)), load_f32(half_of(&block.offset, half)));
            for n in 0..N {
                acc[n][half] = accumulate(acc[n][half], sums[n][half], [d, offset], [d_x[n], s_x[n]]);
            }
        }
    }
    store_tile(acc, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn packed_tile<B: PanelBlock, const N: usize>(
    panel: &[B],
    quants: &[TileQuants<N>],
    scales: &[TileScales<N>],
    out: &mut [Lanes; N],
) {
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    for (((block, x), [d_x, s_x]), i) in panel.iter().zip(quants).zip(scales).zip(0..) {
        prefetch_ahead(panel, i);
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        match block.quants() {
            Quants::Nibbles(words) => {
                // Low nibbles of a word, then high ones: all four vectors at once would leave no register for the sums.
                for (j, word) in words.iter().enumerate() {
                    let low = [low_nibbles(load_word(word, 0)), low_nibbles(load_word(word, 1))];
                    for n in 0..N {
                        let x = broadcast(&x[n], j);
                        for half in 0..2 {
                            sums[n][half] = hold(_mm256_add_epi16(sums[n][half], _mm256_maddubs_epi16(low[half], x)));
                        }
                    }
                    let high = [high_nibbles(load_word(word, 0)), high_nibbles(load_word(word, 1))];
                    for n in 0..N {
                        let x = broadcast(&x[n], j + 4);
                        for half in 0..2 {
                            sums[n][half] = hold(_mm256_add_epi16(sums[n][half], _mm256_maddubs_epi16(high[half], x)));
                        }
                    }
                }
                for sums in &mut sums {
                    *sums = [widen(sums[0], 1), widen(sums[1], 1)];
                }
            }
            Quants::Bytes(words) => {
                let mut halves = [[_mm256_setzero_si256(); N]; 2];
                for (half, sums) in halves.iter_mut().enumerate() {
                    let mut low = [_mm256_setzero_si256(); N];
                    let mut high = [_mm256_setzero_si256(); N];
                    for (j, word) in words.iter().enumerate() {
                        let (w_low, w_high) = nibbles(load_word(word, half));
                        for n in 0..N {
                            let x = broadcast(&x[n], j);
                            low[n] = hold(_mm256_add_epi16(low[n], _mm256_maddubs_epi16(w_low, x)));
                            high[n] = hold(_mm256_add_epi16(high[n], _mm256_maddubs_epi16(w_high, x)));
                        }
                    }
                    for n in 0..N {
                        sums[n] = _mm256_add_epi32(widen(low[n], 1), widen(high[n], 16));
                    }
                }
                sums = interleave(halves);
            }
        }
        let (d, offset) = floats(block);
        for half in 0..2 {
            for n in 0..N {
                acc[n][half] = accumulate(acc[n][half], sums[n][half], [d[half], offset[half]], [d_x[n], s_x[n]]);
            }
        }
    }
    store_tile(acc, out);
}

/// From rows of each half to halves of each row.
#[inline]
#[target_feature(enable = "avx2")]
fn interleave<const N: usize>([low, high]: [[__m256i; N]; 2]) -> [[__m256i; 2]; N] {
    let mut out = [[_mm256_setzero_si256(); 2]; N];
    for (out, (low, high)) in out.iter_mut().zip(low.into_iter().zip(high)) {
        *out = [low, high];
    }
    out
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

/// Adds the two terms of one block: `sum * (d_w * d_x)`, then `offset * s_x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate(acc: __m256, sum: __m256i, [d, offset]: [__m256; 2], [d_x, s_x]: [f32; 2]) -> __m256 {
    let acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d, _mm256_set1_ps(d_x)), acc);
    _mm256_fmadd_ps(offset, _mm256_set1_ps(s_x), acc)
}

/// Scales and offsets of a block's 16 rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats<B: PanelBlock>(block: &B) -> ([__m256; 2], [__m256; 2]) {
    let d = load_halves(block.scales());
    let offset = match block.offset() {
        Offset::Each(m) => load_halves(m),
        Offset::Scales(times) => {
            let times = _mm256_set1_ps(times);
            [_mm256_mul_ps(d[0], times), _mm256_mul_ps(d[1], times)]
        }
    };
    (d, offset)
}

/// Low and high nibbles of each byte.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(bytes: __m256i) -> (__m256i, __m256i) {
    (low_nibbles(bytes), high_nibbles(bytes))
}

#[inline]
#[target_feature(enable = "avx2")]
fn low_nibbles(bytes: __m256i) -> __m256i {
    _mm256_and_si256(bytes, _mm256_set1_epi8(0x0f))
}

#[inline]
#[target_feature(enable = "avx2")]
fn high_nibbles(bytes: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(0x0f))
}

/// Adds neighbours of 16-bit sums into 32 bits, times a factor.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(sums: __m256i, factor: i16) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(factor))
}

/// Columns `4j..4j + 4` of an activation block in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(x: &[i8; BLOCK], j: usize) -> __m256i {
    let group = x.as_chunks::<4>().0[j];
    _mm256_set1_epi32(i32::from_ne_bytes(group.map(i8::cast_unsigned)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_word(word: &[u8; 64], half: usize) -> __m256i {
    let bytes = &word.as_chunks::<32>().0[half];
    // SAFETY: the array holds 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_word(value: __m256i, word: &mut [u8; 64], half: usize) {
    let bytes = &mut word.as_chunks_mut::<32>().0[half];
    // SAFETY: the array holds 32 bytes.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), value) };
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_halves(halves: &[u16; PANEL]) -> [__m256; 2] {
    let eights = halves.as_chunks::<8>().0;
    // SAFETY: the array holds 8 halves, 16 bytes.
    let low = unsafe { _mm_loadu_si128(eights[0].as_ptr().cast()) };
    // SAFETY: as above.
    let high = unsafe { _mm_loadu_si128(eights[1].as_ptr().cast()) };
    [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
}

#[inline(always)]
fn half_of(lanes: &Lanes, half: usize) -> &[f32; 8] {
    &lanes.as_chunks::<8>().0[half]
}

#[inline(always)]
fn half_mut(lanes: &mut Lanes, half: usize) -> &mut [f32; 8] {
    &mut lanes.as_chunks_mut::<8>().0[half]
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(lanes: &[f32; 8]) -> __m256 {
    // SAFETY: the array holds 8 floats.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_f32(value: __m256, lanes: &mut [f32; 8]) {
    // SAFETY: the array holds 8 floats.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), value) };
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_tile<const N: usize>(acc: [[__m256; 2]; N], out: &mut [Lanes; N]) {
    for ([low, high], out) in acc.into_iter().zip(out) {
        store_f32(low, half_mut(out, 0));
        store_f32(high, half_mut(out, 1));
    }
}
