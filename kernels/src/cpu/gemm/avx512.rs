//! Integer dot products with AVX-512 VNNI: four products of unsigned by signed bytes are added into each 32-bit lane.
//!
//! One 64-byte word of a packed panel is one register, so 16 weight rows by up to 8 activation rows take 8 words, 8 sums
//! and 8 f32 accumulators of the 32 registers; activations come as 4-byte broadcasts from memory, which the dot product
//! takes as an operand.

use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_cvtph_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::{IntDot, Lanes, PackedDot, TileQuants, TileScales, prefetch_ahead};
use crate::cpu::simd::Avx512;
use crate::format::ggml::BLOCK;
use crate::format::pack::{Offset, PANEL, PanelBlock, Quants};

impl PackedDot for Avx512 {}

impl IntDot for Avx512 {
    const TILE_ROWS: usize = 8;

    #[inline(always)]
    fn tile<B: PanelBlock, const N: usize>(
        self,
        panel: &[B],
        quants: &[TileQuants<N>],
        scales: &[TileScales<N>],
        out: &mut [Lanes; N],
    ) {
        // SAFETY: `self` came from `detect`, which saw every one of these features.
        unsafe { tile(panel, quants, scales, out) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn tile<B: PanelBlock, const N: usize>(
    panel: &[B],
    quants: &[TileQuants<N>],
    scales: &[TileScales<N>],
    out: &mut [Lanes; N],
) {
    let mut acc = [_mm512_setzero_ps(); N];
    for (((block, x), [d_x, s_x]), i) in panel.iter().zip(quants).zip(scales).zip(0..) {
        if N <= 4 {
            prefetch_ahead(panel, i);
        }
        let w = words(block);
        let (d, offset) = floats(block);
        let mut sums = [_mm512_setzero_si512(); N];
        if N <= 2 {
            // Two chains for each row: with so few rows, one would wait for its own result.
            let mut high = [_mm512_setzero_si512(); N];
            for j in 0..4 {
                for n in 0..N {
                    sums[n] = _mm512_dpbusd_epi32(sums[n], w[j], broadcast(&x[n], j));
                    high[n] = _mm512_dpbusd_epi32(high[n], w[j + 4], broadcast(&x[n], j + 4));
                }
            }
            for n in 0..N {
                sums[n] = _mm512_add_epi32(sums[n], high[n]);
            }
        } else {
            for (j, w) in w.into_iter().enumerate() {
                for n in 0..N {
                    sums[n] = _mm512_dpbusd_epi32(sums[n], w, broadcast(&x[n], j));
                }
            }
        }
        for n in 0..N {
            let scale = _mm512_mul_ps(d, _mm512_set1_ps(d_x[n]));
            acc[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[n]), scale, acc[n]);
            acc[n] = _mm512_fmadd_ps(offset, _mm512_set1_ps(s_x[n]), acc[n]);
        }
    }
    for (acc, out) in acc.into_iter().zip(out) {
        // SAFETY: `Lanes` holds 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), acc) };
    }
}

/// The block's quants as bytes: word `j` holds columns `4j..4j + 4`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn words<B: PanelBlock>(block: &B) -> [__m512i; 8] {
    let mut out = [_mm512_setzero_si512(); 8];
    match block.quants() {
        Quants::Nibbles(packed) => {
            let mask = _mm512_set1_epi8(0x0f);
            for (j, word) in packed.iter().enumerate() {
                let word = load_word(word);
                out[j] = _mm512_and_si512(word, mask);
                out[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(word), mask);
            }
        }
        Quants::Bytes(packed) => {
            for (out, word) in out.iter_mut().zip(packed) {
                *out = load_word(word);
            }
        }
    }
    out
}

/// Scales and offsets of a block's 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn floats<B: PanelBlock>(block: &B) -> (__m512, __m512) {
    let d = load_halves(block.scales());
    let offset = match block.offset() {
        Offset::Each(m) => load_halves(m),
        Offset::Scales(times) => _mm512_mul_ps(d, _mm512_set1_ps(times)),
    };
    (d, offset)
}

/// Columns `4j..4j + 4` of an activation block in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(x: &[i8; BLOCK], j: usize) -> __m512i {
    let group = x.as_chunks::<4>().0[j];
    _mm512_set1_epi32(i32::from_ne_bytes(group.map(i8::cast_unsigned)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_word(word: &[u8; 64]) -> __m512i {
    // SAFETY: the array holds 64 bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(word.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx2")]
fn load_halves(halves: &[u16; PANEL]) -> __m512 {
    // SAFETY: the array holds 32 bytes; the load needs no alignment.
    let halves = unsafe { _mm256_loadu_si256(halves.as_ptr().cast()) };
    _mm512_cvtph_ps(halves)
}
