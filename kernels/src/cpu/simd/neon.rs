//! Sixteen lanes as four 128-bit registers (NEON: every 64-bit Arm).

use super::{EXP_MIN, Kernel, LANES, Simd, forward_simd};
use std::arch::aarch64::*;
use std::arch::asm;

/// Proof that the CPU has NEON and the dot-product extension.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// The proof, when there is one.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let has = std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod");
        has.then_some(Neon(()))
    }
}

/// Runs a kernel with the feature enabled.
#[inline]
pub(super) fn run<K: Kernel>(s: Neon, kernel: K) -> K::Output {
    #[inline(never)]
    #[target_feature(enable = "neon")]
    fn enabled<K: Kernel>(s: Neon, kernel: K) -> K::Output {
        kernel.run(s)
    }
    // SAFETY: `s` is the proof that NEON was detected.
    unsafe { enabled(s, kernel) }
}

/// Lanes 0..4, 4..8, 8..12 and 12..16.
#[derive(Clone, Copy)]
pub(crate) struct V(pub(crate) [float32x4_t; 4]);

/// Sums 0..4, 4..8, 8..12 and 12..16.
#[derive(Clone, Copy)]
pub(crate) struct I([int32x4_t; 4]);

// Four accumulators per row: 6 rows take 24 of the 32 registers, four more hold the operand, one the broadcast.
forward_simd!(Neon, V, I, 6, ops);

mod ops {
    use super::*;

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn splat(x: f32) -> V {
        V([vdupq_n_f32(x); 4])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load(src: &[f32; LANES]) -> V {
        let mut out = splat(0.0);
        for (part, values) in out.0.iter_mut().zip(src.as_chunks::<4>().0) {
            // SAFETY: `values` is 4 floats long.
            *part = unsafe { vld1q_f32(values.as_ptr()) };
        }
        out
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load_f16(src: &[u16; LANES]) -> V {
        let mut out = splat(0.0);
        for (part, values) in out.0.iter_mut().zip(src.as_chunks::<4>().0) {
            // SAFETY: `values` is 4 u16 long.
            let bits = unsafe { vld1_u16(values.as_ptr()) };
            // The intrinsic for this instruction needs Rust's f16 type; the instruction itself is part of NEON.
            // SAFETY: the instruction reads one register and writes another.
            unsafe {
                asm!("fcvtl {wide:v}.4s, {bits:v}.4h", wide = lateout(vreg) *part, bits = in(vreg) bits,
                     options(pure, nomem, nostack, preserves_flags))
            };
        }
        out
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn load_bf16(src: &[u16; LANES]) -> V {
        let mut out = splat(0.0);
        for (part, values) in out.0.iter_mut().zip(src.as_chunks::<4>().0) {
            // SAFETY: `values` is 4 u16 long.
            let bits = unsafe { vld1_u16(values.as_ptr()) };
            *part = vreinterpretq_f32_u32(vshll_n_u16::<16>(bits));
        }
        out
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn store(v: V, dst: &mut [f32; LANES]) {
        for (part, values) in v.0.iter().zip(dst.as_chunks_mut::<4>().0) {
            // SAFETY: `values` is 4 floats long.
            unsafe { vst1q_f32(values.as_mut_ptr(), *part) };
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn store_f16(v: V, dst: &mut [u16; LANES]) {
        for (part, values) in v.0.iter().zip(dst.as_chunks_mut::<4>().0) {
            let bits: uint16x4_t;
            // SAFETY: the instruction reads one register and writes another.
            unsafe {
                asm!("fcvtn {bits:v}.4h, {wide:v}.4s", bits = lateout(vreg) bits, wide = in(vreg) *part,
                     options(pure, nomem, nostack, preserves_flags))
            };
            // SAFETY: `values` is 4 u16 long.
            unsafe { vst1_u16(values.as_mut_ptr(), bits) };
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn add(a: V, b: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.0, b.0);
        V([vaddq_f32(a0, b0), vaddq_f32(a1, b1), vaddq_f32(a2, b2), vaddq_f32(a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn sub(a: V, b: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.0, b.0);
        V([vsubq_f32(a0, b0), vsubq_f32(a1, b1), vsubq_f32(a2, b2), vsubq_f32(a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn mul(a: V, b: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.0, b.0);
        V([vmulq_f32(a0, b0), vmulq_f32(a1, b1), vmulq_f32(a2, b2), vmulq_f32(a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn div(a: V, b: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.0, b.0);
        V([vdivq_f32(a0, b0), vdivq_f32(a1, b1), vdivq_f32(a2, b2), vdivq_f32(a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn fma(a: V, b: V, acc: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3]) = (a.0, b.0, acc.0);
        V([vfmaq_f32(c0, a0, b0), vfmaq_f32(c1, a1, b1), vfmaq_f32(c2, a2, b2), vfmaq_f32(c3, a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn max(a: V, b: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.0, b.0);
        V([vmaxq_f32(a0, b0), vmaxq_f32(a1, b1), vmaxq_f32(a2, b2), vmaxq_f32(a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn min(a: V, b: V) -> V {
        let ([a0, a1, a2, a3], [b0, b1, b2, b3]) = (a.0, b.0);
        V([vminq_f32(a0, b0), vminq_f32(a1, b1), vminq_f32(a2, b2), vminq_f32(a3, b3)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn abs(v: V) -> V {
        let [a, b, c, d] = v.0;
        V([vabsq_f32(a), vabsq_f32(b), vabsq_f32(c), vabsq_f32(d)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn reduce_add(v: V) -> f32 {
        let [a, b, c, d] = v.0;
        let by4 = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
        let by2 = vadd_f32(vget_low_f32(by4), vget_high_f32(by4));
        vget_lane_f32::<0>(by2) + vget_lane_f32::<1>(by2)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn reduce_max(v: V) -> f32 {
        let [a, b, c, d] = v.0;
        vmaxvq_f32(vmaxq_f32(vmaxq_f32(a, c), vmaxq_f32(b, d)))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn keep_lanes(v: V, first: usize, end: usize, fill: f32) -> V {
        const INDEX: [u32; 4] = [0, 1, 2, 3];
        // SAFETY: `INDEX` is 4 u32 long.
        let mut lanes = unsafe { vld1q_u32(INDEX.as_ptr()) };
        let first = vdupq_n_u32(first.min(LANES) as u32);
        let end = vdupq_n_u32(end.min(LANES) as u32);
        let fill = vdupq_n_f32(fill);
        let mut out = v;
        for part in &mut out.0 {
            let keep = vandq_u32(vcgeq_u32(lanes, first), vcltq_u32(lanes, end));
            *part = vbslq_f32(keep, *part, fill);
            lanes = vaddq_u32(lanes, vdupq_n_u32(4));
        }
        out
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn exp_scale(p: V, t: V, x: V) -> V {
        let mut out = p;
        for ((part, t), x) in out.0.iter_mut().zip(t.0).zip(x.0) {
            // The shift drops all of `t` but the low bits of n, which then add to the exponent.
            let n = vshlq_n_u32::<23>(vreinterpretq_u32_f32(t));
            let scaled = vaddq_u32(vreinterpretq_u32_f32(*part), n);
            let small = vcltq_f32(x, vdupq_n_f32(EXP_MIN));
            *part = vreinterpretq_f32_u32(vbicq_u32(scaled, small));
        }
        out
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn round_i8(v: [V; 2], dst: &mut [i8; 32]) -> [i32; 2] {
        let mut sums = [0; 2];
        for (sum, (part, bytes)) in sums.iter_mut().zip(v.iter().zip(dst.as_chunks_mut::<LANES>().0)) {
            let [a, b, c, d] = part.0;
            let low = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(a)), vcvtnq_s32_f32(b));
            let high = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(c)), vcvtnq_s32_f32(d));
            let packed = vqmovn_high_s16(vqmovn_s16(low), high);
            // SAFETY: `bytes` is 16 bytes long.
            unsafe { vst1q_s8(bytes.as_mut_ptr(), packed) };
            *sum = i32::from(vaddlvq_s8(packed));
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn store_i16(v: V, dst: &mut [i16; LANES]) {
        for (parts, words) in v.0.as_chunks::<2>().0.iter().zip(dst.as_chunks_mut::<8>().0) {
            let low = vqmovn_s32(vcvtnq_s32_f32(parts[0]));
            // SAFETY: `words` is 8 i16 long.
            unsafe { vst1q_s16(words.as_mut_ptr(), vqmovn_high_s32(low, vcvtnq_s32_f32(parts[1]))) };
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn zero_sums() -> I {
        I([vdupq_n_s32(0); 4])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn dot_pairs<const R: usize>(bytes: &[i8; 2 * LANES], pairs: &[[i16; 2]; R], sums: &mut [I; R]) {
        for (part, bytes) in bytes.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: `bytes` is 8 bytes long.
            let wide = vmovl_s8(unsafe { vld1_s8(bytes.as_ptr()) });
            for r in 0..R {
                let [even, odd] = pairs[r];
                let pair = vreinterpretq_s16_s32(vdupq_n_s32(i32::from(even as u16) | i32::from(odd) << 16));
                let low = vmull_s16(vget_low_s16(wide), vget_low_s16(pair));
                let products = vpaddq_s32(low, vmull_high_s16(wide, pair));
                sums[r].0[part] = vaddq_s32(sums[r].0[part], products);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn sums_to_f32(sums: I) -> V {
        let [a, b, c, d] = sums.0;
        V([vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d)])
    }
}
