//! Integer dot products with NEON's `sdot`: four products of signed bytes are added into each 32-bit lane.
//!
//! Codes of up to 6 bits are signed bytes as they are. Codes of 8 bits get a sign by flipping the top bit, and 128 times the
//! sum of the activations is added to the dot product, so that the integer is the same as everywhere else.
//!
//! The dot product takes four activations from any quarter of a register, so two loads bring a row's whole block.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x8_t, uint8x16_t, vaddq_s32, vandq_u8, vandq_u16, vcvtq_f32_s32,
    vdup_n_s32, vdupq_n_f32, vdupq_n_s32, vdupq_n_u8, vdupq_n_u16, veorq_u8, vfmaq_f32, vget_low_s16, vld1_u8,
    vld1q_f32, vld1q_s8, vld1q_u8, vmovl_s8, vmovl_s16, vmovl_u8, vmulq_f32, vmulq_n_s32, vmulq_s32, vorrq_u8,
    vqtbl1q_u8, vreinterpret_s8_s32, vreinterpret_s8_u8, vreinterpretq_s8_u8, vreinterpretq_s32_s16,
    vreinterpretq_s32_u16, vshlq_n_s32, vshlq_n_u8, vshrq_n_s32, vshrq_n_u8, vshrq_n_u16, vst1q_f32, vsubq_s32,
};
use std::arch::asm;

use super::{Group, IntDot, Lanes, PREFETCH, TileActs, TileQuants, exact, prefetch};
use crate::cpu::simd::{Neon, Simd};
use crate::format::ggml::BLOCK;
use crate::format::pack::{Codes, IQ4_CODES, PANEL, Packed, Scales, Word, Zero, ZeroKind};

impl IntDot for Neon {
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn panel<B: Packed>(self, panel: &[B], rows: Group<'_>, _: &mut [u8], out: &mut [Lanes]) {
        // SAFETY: `self` came from `detect`, which saw NEON and the dot product.
        unsafe { any_rows(self, panel, rows, out) }
    }
}

/// Quarters of a panel: 4 rows each.
const QUARTERS: usize = 4;

#[target_feature(enable = "neon,dotprod")]
fn any_rows<B: Packed>(s: Neon, panel: &[B], rows: Group<'_>, out: &mut [Lanes]) {
    // Few rows use a panel up as fast as it comes; with more, the next panel arrives while this one is multiplied with the
    // first tile.
    let mut ahead = Some(if rows.len() < Neon::TILE_ROWS { PREFETCH } else { size_of_val(panel) });
    for tile in rows.tiles() {
        let out = &mut out[tile.row - rows.first..][..tile.len];
        let panel = (panel, ahead.take());
        match tile.len {
            4 => tile_of::<B, 4>(s, panel, rows.acts(tile), exact(out)),
            2 => tile_of::<B, 2>(s, panel, rows.acts(tile), exact(out)),
            _ => tile_of::<B, 1>(s, panel, rows.acts(tile), exact(out)),
        }
    }
}

/// Multiplies a panel with one tile; asks meanwhile for what lies so many bytes `ahead`.
#[target_feature(enable = "neon,dotprod")]
fn tile_of<B: Packed, const N: usize>(
    s: Neon,
    (panel, ahead): (&[B], Option<usize>),
    acts: TileActs<'_, N>,
    out: &mut [Lanes; N],
) {
    *out = [[0.0; PANEL]; N];
    for (unit, acts) in panel.iter().zip(acts.split(B::BLOCKS)) {
        for b in 0..B::BLOCKS {
            if let Some(ahead) = ahead {
                prefetch(unit, b, ahead);
            }
            let (x, [d_x, s_x], x_sums) = (&acts.quants[b], acts.scales[b], &acts.sums[b]);
            let (d, offset) = floats(s, unit, b);
            for (quarter, (d, offset)) in d.into_iter().zip(offset).enumerate() {
                let ints = ints(unit, b, quarter);
                let sums = dots::<B, N>(unit.codes(b), quarter, x, x_sums);
                for n in 0..N {
                    let lanes = &mut out[n].as_chunks_mut::<4>().0[quarter];
                    let x_sums = x_sums[n].map(i32::from);
                    let sum = scaled::<B>(sums[n], &ints, x_sums);
                    let mut acc = load_f32(lanes);
                    acc = vfmaq_f32(acc, vcvtq_f32_s32(sum), vmulq_f32(d, vdupq_n_f32(d_x[n])));
                    acc = match B::SHAPE.zero {
                        ZeroKind::Float => vfmaq_f32(acc, offset, vdupq_n_f32(s_x[n])),
                        ZeroKind::Codes => acc,
                        ZeroKind::Mins => {
                            let [low, high] = [0, 1].map(|half| vmulq_n_s32(ints.mins[half], x_sums[half]));
                            let mins = vcvtq_f32_s32(vaddq_s32(low, high));
                            vfmaq_f32(acc, mins, vmulq_f32(offset, vdupq_n_f32(d_x[n])))
                        }
                    };
                    // SAFETY: the array holds 4 floats.
                    unsafe { vst1q_f32(lanes.as_mut_ptr(), acc) };
                }
            }
        }
    }
}

/// Scales of a block's rows, and what is multiplied with the scaled sum of the activations (with `d_x` for
/// [`ZeroKind::Mins`]), by quarters.
#[inline]
#[target_feature(enable = "neon")]
fn floats<B: Packed>(s: Neon, unit: &B, b: usize) -> ([float32x4_t; QUARTERS], [float32x4_t; QUARTERS]) {
    let d = s.load_f16(unit.d());
    let offset = match unit.zero(b) {
        Zero::Code(z) => s.mul(d, s.splat(-f32::from(z))),
        Zero::Add(m) => s.load_f16(m),
        Zero::Mins(dmin, mins) => s.mul(s.sub(s.splat(0.0), s.load_f16(dmin)), s.load(&mins.map(f32::from))),
        Zero::HighNibbles(dmin, _) => s.sub(s.splat(0.0), s.load_f16(dmin)),
    };
    (d.0, offset.0)
}

/// Whole numbers of a block's 4 rows, each for the first and the last 16 columns.
struct Ints {
    scales: [int32x4_t; 2],
    /// For [`ZeroKind::Mins`].
    mins: [int32x4_t; 2],
    /// The code of zero, for [`ZeroKind::Codes`].
    code: i32,
}

#[inline]
#[target_feature(enable = "neon")]
fn ints<B: Packed>(unit: &B, b: usize, quarter: usize) -> Ints {
    let none = [vdupq_n_s32(0); 2];
    // In each half of 32 bits a number of 16: the first columns' is the low one.
    let halves = |pairs: int32x4_t| [vshrq_n_s32::<16>(vshlq_n_s32::<16>(pairs)), vshrq_n_s32::<16>(pairs)];
    let (scales, mut mins) = match unit.scales(b) {
        Scales::One => (none, none),
        Scales::Each(scales) => {
            let four = scales.as_chunks::<4>().0[quarter].map(i8::cast_unsigned);
            let bytes = vreinterpret_s8_s32(vdup_n_s32(i32::from_ne_bytes(four)));
            ([vmovl_s16(vget_low_s16(vmovl_s8(bytes))); 2], none)
        }
        Scales::Halves(scales) => {
            let pairs = load_8(&scales.as_chunks::<4>().0[quarter].map(|pair| pair.map(i8::cast_unsigned)));
            (halves(vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(pairs)))), none)
        }
        Scales::LowNibbles(packed) => {
            let bytes = vmovl_u8(load_8(&packed.as_chunks::<4>().0[quarter]));
            let low = vandq_u16(bytes, vdupq_n_u16(15));
            let [low, high] = [low, vshrq_n_u16::<4>(bytes)].map(|pairs| halves(vreinterpretq_s32_u16(pairs)));
            (low, high)
        }
    };
    if B::SHAPE.zero != ZeroKind::Mins {
        mins = none;
    }
    let code = if let Zero::Code(z) = unit.zero(b) { i32::from(z) } else { 0 };
    Ints { scales, mins, code }
}

/// The integer sum of a block from those of its 16 columns: scaled, and with zero where the type has it.
#[inline]
#[target_feature(enable = "neon")]
fn scaled<B: Packed>([low, high]: [int32x4_t; 2], w: &Ints, x_sums: [i32; 2]) -> int32x4_t {
    if B::SHAPE.scales == 0 {
        return vaddq_s32(low, high);
    }
    let low = vsubq_s32(low, vdupq_n_s32(w.code * x_sums[0]));
    let high = vsubq_s32(high, vdupq_n_s32(w.code * x_sums[1]));
    vaddq_s32(vmulq_s32(low, w.scales[0]), vmulq_s32(high, w.scales[1]))
}

/// Dot products of the four rows of a quarter with each activation row, of the first and the last 16 columns.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dots<B: Packed, const N: usize>(
    codes: Codes<'_>,
    quarter: usize,
    x: &TileQuants<N>,
    x_sums: &[[i16; 2]; N],
) -> [[int32x4_t; 2]; N] {
    let mut sums = [[vdupq_n_s32(0); 2]; N];
    for half in 0..2 {
        let words = [0, 1, 2, 3].map(|j| {
            let group = group(codes, 4 * half + j, quarter);
            vreinterpretq_s8_u8(if B::SHAPE.bits == 8 { veorq_u8(group, vdupq_n_u8(0x80)) } else { group })
        });
        for n in 0..N {
            let x = load_columns(&x[n], half);
            let sum = sdot::<0>(vdupq_n_s32(0), words[0], x);
            let sum = sdot::<1>(sum, words[1], x);
            let sum = sdot::<2>(sum, words[2], x);
            sums[n][half] = sdot::<3>(sum, words[3], x);
        }
    }
    if B::SHAPE.bits == 8 {
        for n in 0..N {
            for half in 0..2 {
                sums[n][half] = vaddq_s32(sums[n][half], vdupq_n_s32(128 * i32::from(x_sums[n][half])));
            }
        }
    }
    sums
}

/// Codes of group `j` of a block, rows `4 * quarter..`.
#[inline]
#[target_feature(enable = "neon")]
fn group(codes: Codes<'_>, j: usize, quarter: usize) -> uint8x16_t {
    let nibble = |words: &[Word; 4]| bits(load_word(&words[j % 4], quarter), 4 * (j / 4), 0, 0x0f);
    let pair = |words: &[Word; 2], to: usize| bits(load_word(&words[j / 4], quarter), 2 * (j % 4), to, 0x03 << to);
    let bit = |word: &Word, to: usize| bits(load_word(word, quarter), j, to, 0x01 << to);
    match codes {
        Codes::Two(low) => pair(low, 0),
        Codes::Three(low, high) => vorrq_u8(pair(low, 0), bit(high, 2)),
        Codes::Four(low) => nibble(low),
        Codes::Five(low, high) => vorrq_u8(nibble(low), bit(high, 4)),
        Codes::Six(low, high) => vorrq_u8(nibble(low), pair(high, 4)),
        Codes::Eight(words) => load_word(&words[j], quarter),
        Codes::Table(low) => vqtbl1q_u8(load_16(&IQ4_CODES), nibble(low)),
    }
}

/// Bits `from..` of each byte, moved to `to..`, as far as the mask reaches.
#[inline]
#[target_feature(enable = "neon")]
fn bits(bytes: uint8x16_t, from: usize, to: usize, mask: u8) -> uint8x16_t {
    let moved = match from as isize - to as isize {
        -4 => vshlq_n_u8::<4>(bytes),
        -3 => vshlq_n_u8::<3>(bytes),
        -2 => vshlq_n_u8::<2>(bytes),
        -1 => vshlq_n_u8::<1>(bytes),
        1 => vshrq_n_u8::<1>(bytes),
        2 => vshrq_n_u8::<2>(bytes),
        3 => vshrq_n_u8::<3>(bytes),
        4 => vshrq_n_u8::<4>(bytes),
        5 => vshrq_n_u8::<5>(bytes),
        6 => vshrq_n_u8::<6>(bytes),
        _ => bytes,
    };
    vandq_u8(moved, vdupq_n_u8(mask))
}

/// `acc + a . b` over each group of four bytes of `a`, with group `G` of `b`. (The intrinsic is not stable.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const G: usize>(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the instruction reads and writes only the registers named, and `dotprod` is enabled here.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{group}]",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            group = const G,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Columns `16 * half..` of an activation block.
#[inline]
#[target_feature(enable = "neon")]
fn load_columns(x: &[i8; BLOCK], half: usize) -> int8x16_t {
    let columns = &x.as_chunks::<16>().0[half];
    // SAFETY: the array holds 16 bytes.
    unsafe { vld1q_s8(columns.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_word(word: &Word, quarter: usize) -> uint8x16_t {
    load_16(&word.as_chunks::<16>().0[quarter])
}

#[inline]
#[target_feature(enable = "neon")]
fn load_16(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the array holds 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32(lanes: &[f32; 4]) -> float32x4_t {
    // SAFETY: the array holds 4 floats.
    unsafe { vld1q_f32(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_8(bytes: &[[u8; 2]; 4]) -> uint8x8_t {
    // SAFETY: the array holds 8 bytes.
    unsafe { vld1_u8(bytes.as_ptr().cast()) }
}
