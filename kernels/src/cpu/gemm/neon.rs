//! Integer dot products with NEON's `sdot`: four products of signed bytes are added into each 32-bit lane.
//!
//! Codes of up to 6 bits are signed bytes as they are. Codes of 8 bits get a sign by flipping the top bit, and 128 times the
//! sum of the activations is added to the dot product, so that the integer is the same as everywhere else.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int32x4_t, uint8x16_t, vaddq_s32, vandq_u8, vcvtq_f32_s32, vdupq_n_f32, vdupq_n_s32,
    vdupq_n_u8, veorq_u8, vfmaq_f32, vld1q_f32, vld1q_s32, vld1q_u8, vmulq_f32, vmulq_n_s32, vmulq_s32, vorrq_u8,
    vqtbl1q_u8, vreinterpretq_s8_s32, vreinterpretq_s8_u8, vshlq_n_u8, vshrq_n_u8, vst1q_f32, vsubq_s32,
};
use std::arch::asm;

use super::{Group, IntDot, Lanes, PREFETCH, TileActs, TileQuants, exact, prefetch};
use crate::cpu::simd::{Neon, Simd};
use crate::format::ggml::BLOCK;
use crate::format::pack::{Codes, IQ4_CODES, PANEL, Packed, Word, Zero, ZeroKind};

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
    for tile in rows.tiles() {
        let out = &mut out[tile.row - rows.first..][..tile.len];
        match tile.len {
            4 => tile_of::<B, 4>(s, panel, rows.acts(tile), exact(out)),
            2 => tile_of::<B, 2>(s, panel, rows.acts(tile), exact(out)),
            _ => tile_of::<B, 1>(s, panel, rows.acts(tile), exact(out)),
        }
    }
}

/// Multiplies a panel with one tile.
#[target_feature(enable = "neon,dotprod")]
fn tile_of<B: Packed, const N: usize>(s: Neon, panel: &[B], acts: TileActs<'_, N>, out: &mut [Lanes; N]) {
    *out = [[0.0; PANEL]; N];
    for (unit, acts) in panel.iter().zip(acts.split(B::BLOCKS)) {
        for b in 0..B::BLOCKS {
            prefetch(unit, b, PREFETCH);
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
    let lanes = [0, 1, 2, 3].map(|row| quarter * 4 + row);
    let scales = lanes.map(|lane| unit.scales(b).lane(lane).map(i32::from));
    let scales = [0, 1].map(|half| load_i32(&scales.map(|scales| scales[half])));
    let none = Ints { scales, mins: [vdupq_n_s32(0); 2], code: 0 };
    match unit.zero(b) {
        Zero::Code(z) => Ints { code: i32::from(z), ..none },
        Zero::HighNibbles(_, packed) => {
            let mins = [0, 1].map(|half| load_i32(&lanes.map(|lane| i32::from(packed[lane][half] >> 4))));
            Ints { mins, ..none }
        }
        Zero::Add(_) | Zero::Mins(..) => none,
    }
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
    for j in 0..8 {
        let group = group(codes, j, quarter);
        let signed = if B::SHAPE.bits == 8 { veorq_u8(group, vdupq_n_u8(0x80)) } else { group };
        for n in 0..N {
            sums[n][j / 4] = sdot(sums[n][j / 4], vreinterpretq_s8_u8(signed), broadcast(&x[n], j));
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

/// Columns `4j..4j + 4` of an activation block in every lane.
#[inline]
#[target_feature(enable = "neon")]
fn broadcast(x: &[i8; BLOCK], j: usize) -> int8x16_t {
    let group = x.as_chunks::<4>().0[j];
    vreinterpretq_s8_s32(vdupq_n_s32(i32::from_ne_bytes(group.map(i8::cast_unsigned))))
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
fn load_i32(lanes: &[i32; 4]) -> int32x4_t {
    // SAFETY: the array holds 4 numbers.
    unsafe { vld1q_s32(lanes.as_ptr()) }
}
