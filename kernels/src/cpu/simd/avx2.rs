//! Sixteen lanes as two 256-bit registers (AVX2, FMA and F16C: Intel since Haswell, AMD since Zen).

use super::{EXP_MIN, Kernel, LANES, Simd, forward_simd};
use std::arch::asm;
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, when there is one.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let has =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }
}

/// Runs a kernel with the features enabled.
#[inline]
pub(super) fn run<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn enabled<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
        kernel.run(s)
    }
    // SAFETY: `s` is the proof that the three features were detected.
    unsafe { enabled(s, kernel) }
}

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct V(pub(crate) __m256, pub(crate) __m256);

/// Sums 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct I(__m256i, __m256i);

/// Implements [`Simd`] for a token that proves what [`Avx2`] does, with `run` of the module that calls this.
macro_rules! two_registers {
    ($token:ty) => {
        // Two accumulators per row: 6 rows take 12 of the 16 registers, two more hold the operand, one the broadcast.
        forward_simd!(
            $token,
            V,
            I,
            6,
            ops,
            #[inline(always)]
            fn fma_f16<const R: usize>(self, halves: &[u16; LANES], factors: &[f32; R], sums: &mut [V; R]) {
                if R == 3 {
                    // SAFETY: as for the other ops.
                    return unsafe { ops::fma_f16_3(halves, factors, sums) };
                }
                let v = self.load_f16(halves);
                for r in 0..R {
                    sums[r] = self.fma(self.splat(factors[r]), v, sums[r]);
                }
            }
        );
    };
}
pub(super) use two_registers;

two_registers!(Avx2);

pub(super) mod ops {
    use super::*;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn splat(x: f32) -> V {
        let v = _mm256_set1_ps(x);
        V(v, v)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn load(src: &[f32; LANES]) -> V {
        let (low, high) = src.split_at(8);
        // SAFETY: `low` is 8 floats long; the load needs no alignment.
        let low = unsafe { _mm256_loadu_ps(low.as_ptr()) };
        // SAFETY: so is `high`.
        let high = unsafe { _mm256_loadu_ps(high.as_ptr()) };
        V(low, high)
    }

    /// Both halves of 16 u16 values.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_u16(src: &[u16; LANES]) -> (__m128i, __m128i) {
        let (low, high) = src.split_at(8);
        // SAFETY: `low` is 16 bytes long; the load needs no alignment.
        let low = unsafe { _mm_loadu_si128(low.as_ptr().cast()) };
        // SAFETY: so is `high`.
        let high = unsafe { _mm_loadu_si128(high.as_ptr().cast()) };
        (low, high)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn load_f16(src: &[u16; LANES]) -> V {
        let (low, high) = load_u16(src);
        V(_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
    }

    /// [`Simd::fma_f16`] of three rows. Two columns of them fill the registers to the last: 12 sums, 3 factors and half a
    /// vector. The compiler would fetch the other half early and keep sums in memory instead.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn fma_f16_3(halves: &[u16; LANES], factors: &[f32], sums: &mut [V]) {
        let (&[x, y, z], [a, b, c]) = (factors, sums) else { unreachable!("three rows") };
        let (x, y, z) = (_mm256_set1_ps(x), _mm256_set1_ps(y), _mm256_set1_ps(z));
        // SAFETY: the block reads the 32 bytes of `halves` and writes registers only.
        unsafe {
            asm!(
                "vcvtph2ps {half}, [{halves}]",
                "vfmadd231ps {a_low}, {x}, {half}",
                "vfmadd231ps {b_low}, {y}, {half}",
                "vfmadd231ps {c_low}, {z}, {half}",
                "vcvtph2ps {half}, [{halves} + 16]",
                "vfmadd231ps {a_high}, {x}, {half}",
                "vfmadd231ps {b_high}, {y}, {half}",
                "vfmadd231ps {c_high}, {z}, {half}",
                halves = in(reg) halves.as_ptr(),
                half = out(ymm_reg) _,
                x = in(ymm_reg) x,
                y = in(ymm_reg) y,
                z = in(ymm_reg) z,
                a_low = inout(ymm_reg) a.0,
                b_low = inout(ymm_reg) b.0,
                c_low = inout(ymm_reg) c.0,
                a_high = inout(ymm_reg) a.1,
                b_high = inout(ymm_reg) b.1,
                c_high = inout(ymm_reg) c.1,
                options(pure, readonly, nostack, preserves_flags),
            )
        };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn load_bf16(src: &[u16; LANES]) -> V {
        let (low, high) = load_u16(src);
        let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low));
        let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high));
        V(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn store(v: V, dst: &mut [f32; LANES]) {
        let (low, high) = dst.split_at_mut(8);
        // SAFETY: `low` is 8 floats long; the store needs no alignment.
        unsafe { _mm256_storeu_ps(low.as_mut_ptr(), v.0) };
        // SAFETY: so is `high`.
        unsafe { _mm256_storeu_ps(high.as_mut_ptr(), v.1) };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn store_f16(v: V, dst: &mut [u16; LANES]) {
        let (low, high) = dst.split_at_mut(8);
        let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0);
        // SAFETY: `low` is 16 bytes long; the store needs no alignment.
        unsafe { _mm_storeu_si128(low.as_mut_ptr().cast(), bits) };
        let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.1);
        // SAFETY: so is `high`.
        unsafe { _mm_storeu_si128(high.as_mut_ptr().cast(), bits) };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn add(a: V, b: V) -> V {
        V(_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn sub(a: V, b: V) -> V {
        V(_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn mul(a: V, b: V) -> V {
        V(_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn div(a: V, b: V) -> V {
        V(_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn fma(a: V, b: V, acc: V) -> V {
        V(_mm256_fmadd_ps(a.0, b.0, acc.0), _mm256_fmadd_ps(a.1, b.1, acc.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn max(a: V, b: V) -> V {
        V(_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn min(a: V, b: V) -> V {
        V(_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn abs(v: V) -> V {
        let sign = _mm256_set1_ps(-0.0);
        V(_mm256_andnot_ps(sign, v.0), _mm256_andnot_ps(sign, v.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn reduce_add(v: V) -> f32 {
        let by8 = _mm256_add_ps(v.0, v.1);
        let by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps::<1>(by8));
        let by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
        _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn reduce_max(v: V) -> f32 {
        let by8 = _mm256_max_ps(v.0, v.1);
        let by4 = _mm_max_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps::<1>(by8));
        let by2 = _mm_max_ps(by4, _mm_movehl_ps(by4, by4));
        _mm_cvtss_f32(_mm_max_ss(by2, _mm_movehdup_ps(by2)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn keep_lanes(v: V, first: usize, end: usize, fill: f32) -> V {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let after = _mm256_set1_epi32(first.min(LANES) as i32 - 1);
        let before = _mm256_set1_epi32(end.min(LANES) as i32);
        let eight = _mm256_set1_epi32(8);
        let fill = _mm256_set1_ps(fill);
        let keep = _mm256_and_si256(_mm256_cmpgt_epi32(lanes, after), _mm256_cmpgt_epi32(before, lanes));
        let low = _mm256_blendv_ps(fill, v.0, _mm256_castsi256_ps(keep));
        let lanes = _mm256_add_epi32(lanes, eight);
        let keep = _mm256_and_si256(_mm256_cmpgt_epi32(lanes, after), _mm256_cmpgt_epi32(before, lanes));
        V(low, _mm256_blendv_ps(fill, v.1, _mm256_castsi256_ps(keep)))
    }

    /// One half of [`exp_scale`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn exp_scale_half(p: __m256, t: __m256, x: __m256) -> __m256 {
        // The shift drops all of `t` but the low bits of n, which then add to the exponent.
        let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        let scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
        _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(EXP_MIN)), scaled)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn exp_scale(p: V, t: V, x: V) -> V {
        V(exp_scale_half(p.0, t.0, x.0), exp_scale_half(p.1, t.1, x.1))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn round_i8(v: [V; 2], dst: &mut [i8; 32]) -> [i32; 2] {
        let [a, b] = v;
        let a16 = _mm256_packs_epi32(_mm256_cvtps_epi32(a.0), _mm256_cvtps_epi32(a.1));
        let b16 = _mm256_packs_epi32(_mm256_cvtps_epi32(b.0), _mm256_cvtps_epi32(b.1));
        // Packing works within 128-bit halves: the eight groups of four come out as 0 2 4 6 | 1 3 5 7.
        let mixed = _mm256_packs_epi16(a16, b16);
        let bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        // SAFETY: `dst` is 32 bytes long; the store needs no alignment.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), bytes) };
        let ones = _mm256_set1_epi16(1);
        // Two quarters of each in every 128 bits, then one half of each, then the sums.
        let quarters = _mm256_hadd_epi32(_mm256_madd_epi16(a16, ones), _mm256_madd_epi16(b16, ones));
        let halves = _mm_add_epi32(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256::<1>(quarters));
        let sums = _mm_hadd_epi32(halves, halves);
        [_mm_cvtsi128_si32(sums), _mm_extract_epi32::<1>(sums)]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn store_i16(v: V, dst: &mut [i16; LANES]) {
        // Packing works within 128-bit halves: the four groups of four come out as 0 2 1 3.
        let mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1));
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
        // SAFETY: `dst` is 32 bytes long; the store needs no alignment.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), words) };
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn zero_sums() -> I {
        I(_mm256_setzero_si256(), _mm256_setzero_si256())
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn dot_pairs<const R: usize>(bytes: &[i8; 2 * LANES], pairs: &[[i16; 2]; R], sums: &mut [I; R]) {
        let (low, high) = bytes.split_at(LANES);
        // SAFETY: `low` is 16 bytes long; the load needs no alignment.
        let low = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(low.as_ptr().cast()) });
        // SAFETY: so is `high`.
        let high = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(high.as_ptr().cast()) });
        for r in 0..R {
            let [even, odd] = pairs[r];
            let pair = _mm256_set1_epi32(i32::from(even as u16) | i32::from(odd) << 16);
            sums[r].0 = _mm256_add_epi32(sums[r].0, _mm256_madd_epi16(low, pair));
            sums[r].1 = _mm256_add_epi32(sums[r].1, _mm256_madd_epi16(high, pair));
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn sums_to_f32(sums: I) -> V {
        V(_mm256_cvtepi32_ps(sums.0), _mm256_cvtepi32_ps(sums.1))
    }
}
