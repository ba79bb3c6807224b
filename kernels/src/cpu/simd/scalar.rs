//! Sixteen lanes as plain loops: the reference for the other instruction sets, and the path of any other CPU.

use super::{EXP_MIN, Kernel, LANES, ROUND_MAGIC, Simd};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Portable code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

#[inline(always)]
fn fold(mut v: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            v[i] = f(v[i], v[i + half]);
        }
    }
    v[0]
}

impl Simd for Scalar {
    type V = [f32; LANES];
    type I = [i32; LANES];
    const TILE: usize = 4;

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, src: &[f32; LANES]) -> Self::V {
        *src
    }

    #[inline(always)]
    fn load_f16(self, src: &[u16; LANES]) -> Self::V {
        let mut out = [0.0; LANES];
        src.reinterpret_cast::<f16>().convert_to_f32_slice(&mut out);
        out
    }

    #[inline(always)]
    fn load_bf16(self, src: &[u16; LANES]) -> Self::V {
        src.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn store(self, v: Self::V, dst: &mut [f32; LANES]) {
        *dst = v;
    }

    #[inline(always)]
    fn store_f16(self, v: Self::V, dst: &mut [u16; LANES]) {
        dst.reinterpret_cast_mut::<f16>().convert_from_f32_slice(&v);
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |x, y| x + y)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |x, y| x - y)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |x, y| x * y)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |x, y| x / y)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        // Not `mul_add`: without the instruction that is a library call per lane.
        zip(zip(a, b, |x, y| x * y), acc, |x, y| x + y)
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |x, y| if x < y { x } else { y })
    }

    #[inline(always)]
    fn abs(self, v: Self::V) -> Self::V {
        v.map(f32::abs)
    }

    #[inline(always)]
    fn reduce_add(self, v: Self::V) -> f32 {
        fold(v, |x, y| x + y)
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::V) -> f32 {
        fold(v, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn keep_lanes(self, v: Self::V, first: usize, end: usize, fill: f32) -> Self::V {
        let mut out = [fill; LANES];
        for (i, (out, v)) in out.iter_mut().zip(v).enumerate() {
            if (first..end).contains(&i) {
                *out = v;
            }
        }
        out
    }

    #[inline(always)]
    fn exp_scale(self, p: Self::V, t: Self::V, x: Self::V) -> Self::V {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            let n = t[i].to_bits().wrapping_sub(ROUND_MAGIC.to_bits());
            let scaled = f32::from_bits(p[i].to_bits().wrapping_add(n << 23));
            out[i] = if x[i] < EXP_MIN { 0.0 } else { scaled };
        }
        out
    }

    #[inline(always)]
    fn round_i8(self, v: [Self::V; 2], dst: &mut [i8; 32]) -> [i32; 2] {
        let mut sums = [0; 2];
        for (half, part) in v.iter().enumerate() {
            for (lane, x) in part.iter().enumerate() {
                let q = x.round_ties_even() as i32;
                dst[half * LANES + lane] = q as i8;
                sums[half] += q;
            }
        }
        sums
    }

    #[inline(always)]
    fn store_i16(self, v: Self::V, dst: &mut [i16; LANES]) {
        *dst = v.map(|x| x.round_ties_even() as i16);
    }

    #[inline(always)]
    fn zero_sums(self) -> Self::I {
        [0; LANES]
    }

    #[inline(always)]
    fn dot_pairs<const R: usize>(self, bytes: &[i8; 2 * LANES], pairs: &[[i16; 2]; R], sums: &mut [Self::I; R]) {
        for (sums, pair) in sums.iter_mut().zip(pairs) {
            for (sum, bytes) in sums.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *sum += i32::from(bytes[0]) * i32::from(pair[0]) + i32::from(bytes[1]) * i32::from(pair[1]);
            }
        }
    }

    #[inline(always)]
    fn sums_to_f32(self, sums: Self::I) -> Self::V {
        sums.map(|sum| sum as f32)
    }
}
