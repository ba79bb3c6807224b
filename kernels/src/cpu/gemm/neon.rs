//! Integer dot products with NEON's `sdot`: four products of signed bytes are added into each 32-bit lane.
//!
//! Nibbles are signed bytes as they are. Bytes (stored as `q + 128`) get their sign back by flipping the top bit, and 128
//! times the sum of the activations is added to the dot product, so that the integer is the same as everywhere else.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, vaddq_s32, vandq_u8, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s8,
    vdupq_n_s32, vdupq_n_u8, veorq_u8, vfmaq_f32, vld1q_f32, vld1q_u8, vmulq_f32, vreinterpretq_s8_s32,
    vreinterpretq_s8_u8, vshlq_n_s32, vshrq_n_u8, vst1q_f32,
};
use std::arch::asm;

use super::{IntDot, Lanes, PackedDot, TileQuants, TileScales, prefetch_ahead};
use crate::cpu::simd::{Neon, Simd};
use crate::format::ggml::BLOCK;
use crate::format::pack::{Offset, PANEL, PanelBlock, Quants};

impl PackedDot for Neon {}

impl IntDot for Neon {
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn tile<B: PanelBlock, const N: usize>(
        self,
        panel: &[B],
        quants: &[TileQuants<N>],
        scales: &[TileScales<N>],
        out: &mut [Lanes; N],
    ) {
        // SAFETY: `self` came from `detect`, which saw NEON and the dot product.
        unsafe { tile(self, panel, quants, scales, out) }
    }
}

/// Quarters of a panel: 4 rows each.
const QUARTERS: usize = 4;

#[target_feature(enable = "neon,dotprod")]
fn tile<B: PanelBlock, const N: usize>(
    s: Neon,
    panel: &[B],
    quants: &[TileQuants<N>],
    scales: &[TileScales<N>],
    out: &mut [Lanes; N],
) {
    *out = [[0.0; PANEL]; N];
    for (((block, x), [d_x, s_x]), i) in panel.iter().zip(quants).zip(scales).zip(0..) {
        prefetch_ahead(panel, i);
        let (d, offset) = floats(s, block);
        for (quarter, (d, offset)) in d.into_iter().zip(offset).enumerate() {
            let sums = dots(block, quarter, x);
            for n in 0..N {
                let lanes = &mut out[n].as_chunks_mut::<4>().0[quarter];
                let scale = vmulq_f32(d, vdupq_n_f32(d_x[n]));
                let acc = vfmaq_f32(load_lanes(lanes), vcvtq_f32_s32(sums[n]), scale);
                let acc = vfmaq_f32(acc, offset, vdupq_n_f32(s_x[n]));
                // SAFETY: the array holds 4 floats.
                unsafe { vst1q_f32(lanes.as_mut_ptr(), acc) };
            }
        }
    }
}

/// Dot products of the four rows of a quarter with each activation row.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dots<B: PanelBlock, const N: usize>(block: &B, quarter: usize, x: &[[i8; BLOCK]; N]) -> [int32x4_t; N] {
    let mut sums = [vdupq_n_s32(0); N];
    match block.quants() {
        Quants::Nibbles(words) => {
            for (j, word) in words.iter().enumerate() {
                let bytes = load_word(word, quarter);
                let low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(0x0f)));
                let high = vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes));
                for n in 0..N {
                    sums[n] = sdot(sums[n], low, broadcast(&x[n], j));
                    sums[n] = sdot(sums[n], high, broadcast(&x[n], j + 4));
                }
            }
        }
        Quants::Bytes(words) => {
            let mut sum_x = [vdupq_n_s32(0); N];
            for (j, word) in words.iter().enumerate() {
                let w = vreinterpretq_s8_u8(veorq_u8(load_word(word, quarter), vdupq_n_u8(0x80)));
                for n in 0..N {
                    let x = broadcast(&x[n], j);
                    sums[n] = sdot(sums[n], w, x);
                    sum_x[n] = sdot(sum_x[n], vdupq_n_s8(1), x);
                }
            }
            for n in 0..N {
                sums[n] = vaddq_s32(sums[n], vshlq_n_s32::<7>(sum_x[n]));
            }
        }
    }
    sums
}

/// `acc + a . b` over each group of four bytes. (The intrinsic of this name is not stable.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the instruction reads and writes only the registers named, and `dotprod` is enabled here.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Scales and offsets of a block's rows, by quarters.
#[inline]
#[target_feature(enable = "neon")]
fn floats<B: PanelBlock>(s: Neon, block: &B) -> ([float32x4_t; QUARTERS], [float32x4_t; QUARTERS]) {
    let d = s.load_f16(block.scales());
    let offset = match block.offset() {
        Offset::Each(m) => s.load_f16(m),
        Offset::Scales(times) => s.mul(d, s.splat(times)),
    };
    (d.0, offset.0)
}

/// Columns `4j..4j + 4` of an activation block in every lane.
#[inline]
#[target_feature(enable = "neon")]
fn broadcast(x: &[i8; BLOCK], j: usize) -> int8x16_t {
    let group = x.as_chunks::<4>().0[j];
    vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(group.map(i8::cast_unsigned))))
}

#[inline]
#[target_feature(enable = "neon")]
fn load_word(word: &[u8; 64], quarter: usize) -> uint8x16_t {
    let bytes = &word.as_chunks::<16>().0[quarter];
    // SAFETY: the array holds 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_lanes(lanes: &[f32; 4]) -> float32x4_t {
    // SAFETY: the array holds 4 floats.
    unsafe { vld1q_f32(lanes.as_ptr()) }
}
