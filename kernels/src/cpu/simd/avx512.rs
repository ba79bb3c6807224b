//! Sixteen lanes as one 512-bit register (AVX-512 F, BW, VL, DQ and VNNI: Intel since Ice Lake, AMD since Zen 4).

use super::{EXP_MIN, Kernel, LANES, Simd, forward_simd};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX-512 F, BW, VL, DQ and VNNI, and all that AVX2 means here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The proof, when there is one.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let has = super::Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni");
        has.then_some(Avx512(()))
    }
}

/// Runs a kernel with the features enabled.
#[inline]
pub(super) fn run<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    fn enabled<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
        kernel.run(s)
    }
    // SAFETY: `s` is the proof that the features were detected.
    unsafe { enabled(s, kernel) }
}

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(crate) struct V(pub(crate) __m512);

/// Sixteen sums.
#[derive(Clone, Copy)]
pub(crate) struct I(__m512i);

// Two FMA units with a latency of 4 cycles need 8 accumulators; 12 leave room in the 32 registers for operands.
forward_simd!(Avx512, V, I, 12, ops);

mod ops {
    use super::*;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn splat(x: f32) -> V {
        V(_mm512_set1_ps(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn load(src: &[f32; LANES]) -> V {
        // SAFETY: `src` is 16 floats long; the load needs no alignment.
        V(unsafe { _mm512_loadu_ps(src.as_ptr()) })
    }

    /// 16 u16 values.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    fn load_u16(src: &[u16; LANES]) -> __m256i {
        // SAFETY: `src` is 32 bytes long; the load needs no alignment.
        unsafe { _mm256_loadu_si256(src.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn load_f16(src: &[u16; LANES]) -> V {
        V(_mm512_cvtph_ps(load_u16(src)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn load_bf16(src: &[u16; LANES]) -> V {
        V(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_u16(src)))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn store(v: V, dst: &mut [f32; LANES]) {
        // SAFETY: `dst` is 16 floats long; the store needs no alignment.
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), v.0) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn store_f16(v: V, dst: &mut [u16; LANES]) {
        let bits = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0);
        // SAFETY: `dst` is 32 bytes long; the store needs no alignment.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), bits) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn add(a: V, b: V) -> V {
        V(_mm512_add_ps(a.0, b.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn sub(a: V, b: V) -> V {
        V(_mm512_sub_ps(a.0, b.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn mul(a: V, b: V) -> V {
        V(_mm512_mul_ps(a.0, b.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn div(a: V, b: V) -> V {
        V(_mm512_div_ps(a.0, b.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn fma(a: V, b: V, acc: V) -> V {
        V(_mm512_fmadd_ps(a.0, b.0, acc.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn max(a: V, b: V) -> V {
        V(_mm512_max_ps(a.0, b.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn min(a: V, b: V) -> V {
        V(_mm512_min_ps(a.0, b.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn abs(v: V) -> V {
        V(_mm512_abs_ps(v.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn reduce_add(v: V) -> f32 {
        let by8 = _mm256_add_ps(_mm512_castps512_ps256(v.0), _mm512_extractf32x8_ps::<1>(v.0));
        let by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps::<1>(by8));
        let by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
        _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn reduce_max(v: V) -> f32 {
        let by8 = _mm256_max_ps(_mm512_castps512_ps256(v.0), _mm512_extractf32x8_ps::<1>(v.0));
        let by4 = _mm_max_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps::<1>(by8));
        let by2 = _mm_max_ps(by4, _mm_movehl_ps(by4, by4));
        _mm_cvtss_f32(_mm_max_ss(by2, _mm_movehdup_ps(by2)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn keep_lanes(v: V, first: usize, end: usize, fill: f32) -> V {
        let before = (1_u32 << end.min(LANES)) - 1;
        let from = !((1_u32 << first.min(LANES)) - 1);
        V(_mm512_mask_mov_ps(_mm512_set1_ps(fill), (before & from) as __mmask16, v.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn exp_scale(p: V, t: V, x: V) -> V {
        // The shift drops all of `t` but the low bits of n, which then add to the exponent.
        let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t.0));
        let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, _mm512_set1_ps(EXP_MIN));
        V(_mm512_castsi512_ps(_mm512_maskz_add_epi32(normal, _mm512_castps_si512(p.0), n)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn round_i8(v: [V; 2], dst: &mut [i8; 32]) -> [i32; 2] {
        let (low, high) = dst.split_at_mut(LANES);
        let a = _mm512_cvtps_epi32(v[0].0);
        let b = _mm512_cvtps_epi32(v[1].0);
        let (a_bytes, b_bytes) = (_mm512_cvtsepi32_epi8(a), _mm512_cvtsepi32_epi8(b));
        // SAFETY: `low` is 16 bytes long; the store needs no alignment.
        unsafe { _mm_storeu_si128(low.as_mut_ptr().cast(), a_bytes) };
        // SAFETY: so is `high`.
        unsafe { _mm_storeu_si128(high.as_mut_ptr().cast(), b_bytes) };
        [_mm512_reduce_add_epi32(a), _mm512_reduce_add_epi32(b)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn store_i16(v: V, dst: &mut [i16; LANES]) {
        let words = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v.0));
        // SAFETY: `dst` is 32 bytes long; the store needs no alignment.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), words) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn zero_sums() -> I {
        I(_mm512_setzero_si512())
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn dot_pairs<const R: usize>(bytes: &[i8; 2 * LANES], pairs: &[[i16; 2]; R], sums: &mut [I; R]) {
        // SAFETY: `bytes` is 32 bytes long; the load needs no alignment.
        let bytes = _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) });
        for r in 0..R {
            let [even, odd] = pairs[r];
            let pair = _mm512_set1_epi32(i32::from(even as u16) | i32::from(odd) << 16);
            // In two steps: only the addition, of one cycle, waits for the one before it. There are few rows.
            sums[r].0 = _mm512_add_epi32(sums[r].0, _mm512_madd_epi16(bytes, pair));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn sums_to_f32(sums: I) -> V {
        V(_mm512_cvtepi32_ps(sums.0))
    }
}
