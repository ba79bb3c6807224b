//! One vector of 16 f32 lanes on every CPU: kernels are written once against [`Simd`] and instantiated per instruction set.
//!
//! ```text
//!   struct MyKernel<'a> { .. }                    arguments by name
//!   impl Kernel for MyKernel<'_> { fn run<S: Simd>(self, s: S) }      written once, #[inline(always)]
//!        │
//!   dispatch(isa, kernel) ──┬── Scalar            the oracle: plain loops over [f32; 16]
//!                           ├── Avx2              2 x __m256       (avx2, fma, f16c)
//!                           ├── AvxVnni           the same, and products of bytes (avxvnni)
//!                           ├── Avx512            1 x __m512       (avx512 f, bw, vl, dq, vnni)
//!                           └── Neon              4 x float32x4_t
//! ```
//!
//! The whole kernel is inlined into one `#[target_feature]` function per instruction set, so that vectors stay in
//! registers. Two rules follow for kernels: every helper that touches a vector is `#[inline(always)]`, and no vector
//! crosses a closure.
//!
//! A value of an instruction set's type is the proof that the CPU has it: `detect` is the only way to get one. That is what
//! makes the ops safe to call.
//!
//! Lane order and the order of [`Simd::reduce_add`] are the same everywhere. `fma` rounds once except in [`Scalar`], where
//! it rounds twice: results agree between instruction sets within rounding, and exactly within one.

mod scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(test)]
pub(crate) mod tests;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) use avxvnni::AvxVnni;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use scalar::Scalar;

use super::gemm::IntDot;
use super::isa::Isa;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The operations of one instruction set on vectors of 16 f32 lanes.
pub(crate) trait Simd: IntDot + Send + Sync {
    /// Sixteen f32 lanes.
    type V: Copy;
    /// Sixteen i32 sums.
    type I: Copy;

    /// Accumulator vectors that a register tile may hold beside its operands.
    const TILE: usize;

    /// Runs a kernel in a function of its own. A part of a larger kernel that must keep many vectors in registers is put
    /// there: registers are then allocated for it alone.
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Reads 16 values.
    fn load(self, src: &[f32; LANES]) -> Self::V;
    /// Reads 16 IEEE halves.
    fn load_f16(self, src: &[u16; LANES]) -> Self::V;
    /// Reads 16 bfloat16 values.
    fn load_bf16(self, src: &[u16; LANES]) -> Self::V;
    /// Writes 16 values.
    fn store(self, v: Self::V, dst: &mut [f32; LANES]);
    /// Writes 16 IEEE halves, rounded to nearest even.
    fn store_f16(self, v: Self::V, dst: &mut [u16; LANES]);
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + acc`
    fn fma(self, a: Self::V, b: Self::V, acc: Self::V) -> Self::V;
    /// The larger of each pair of lanes; unspecified where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each pair of lanes; unspecified where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Absolute values.
    fn abs(self, v: Self::V) -> Self::V;
    /// Sum of the lanes: lane `i` with `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    fn reduce_add(self, v: Self::V) -> f32;
    /// Largest lane; unspecified where a lane is NaN.
    fn reduce_max(self, v: Self::V) -> f32;
    /// `v` in the lanes `first..end`, `fill` in the others.
    fn keep_lanes(self, v: Self::V, first: usize, end: usize, fill: f32) -> Self::V;
    /// `p * 2^n` where `t` is `ROUND_MAGIC + n`, and 0 in the lanes where `x < EXP_MIN`.
    fn exp_scale(self, p: Self::V, t: Self::V, x: Self::V) -> Self::V;
    /// Rounds 32 values (to nearest, ties to even) to integers, which must lie in `-128..=127`, and returns the sums of
    /// the first and the last 16.
    fn round_i8(self, v: [Self::V; 2], dst: &mut [i8; 32]) -> [i32; 2];
    /// Rounds 16 values (to nearest, ties to even) to integers, which must lie in `-32768..=32767`.
    fn store_i16(self, v: Self::V, dst: &mut [i16; LANES]);
    /// Sixteen zeroes.
    fn zero_sums(self) -> Self::I;
    /// For every row `r` and lane `i`: `sums[r][i] += bytes[2 i] * pairs[r][0] + bytes[2 i + 1] * pairs[r][1]`.
    fn dot_pairs<const R: usize>(self, bytes: &[i8; 2 * LANES], pairs: &[[i16; 2]; R], sums: &mut [Self::I; R]);
    /// The nearest f32 of each sum.
    fn sums_to_f32(self, sums: Self::I) -> Self::V;

    /// `sums[r] += halves * factors[r]`
    #[inline(always)]
    fn fma_f16<const R: usize>(self, halves: &[u16; LANES], factors: &[f32; R], sums: &mut [Self::V; R]) {
        let v = self.load_f16(halves);
        for r in 0..R {
            sums[r] = self.fma(self.splat(factors[r]), v, sums[r]);
        }
    }

    /// `e^x` within 2 units in the last place; exactly 1 at 0, exactly 0 below [`EXP_MIN`], saturated above [`EXP_MAX`].
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        // x = n ln 2 + r with |r| <= ln 2 / 2, and e^x = 2^n e^r. Adding the magic number leaves the integer n in the
        // low bits of the sum. ln 2 is taken off in two steps: the first constant has few bits, so n times it is exact.
        let x = self.min(x, self.splat(EXP_MAX));
        let magic = self.splat(ROUND_MAGIC);
        let t = self.fma(x, self.splat(std::f32::consts::LOG2_E), magic);
        let n = self.sub(t, magic);
        let r = self.fma(n, self.splat(-LN2_HIGH), x);
        let r = self.fma(n, self.splat(-LN2_LOW), r);
        let mut q = self.splat(EXP_POLY[4]);
        q = self.fma(q, r, self.splat(EXP_POLY[3]));
        q = self.fma(q, r, self.splat(EXP_POLY[2]));
        q = self.fma(q, r, self.splat(EXP_POLY[1]));
        q = self.fma(q, r, self.splat(EXP_POLY[0]));
        let p = self.add(self.fma(q, self.mul(r, r), r), self.splat(1.0));
        self.exp_scale(p, t, x)
    }

    /// `2^x` within 3 units in the last place, for `x <= 0`; exactly 1 at 0, exactly 0 below [`EXP_MIN`]. The weights of
    /// attention: cheaper than [`Simd::exp`] by a third.
    #[inline(always)]
    fn exp2_weight(self, x: Self::V) -> Self::V {
        let magic = self.splat(ROUND_MAGIC);
        let t = self.add(x, magic);
        let r = self.sub(x, self.sub(t, magic));
        let mut q = self.splat(EXP2_POLY[4]);
        q = self.fma(q, r, self.splat(EXP2_POLY[3]));
        q = self.fma(q, r, self.splat(EXP2_POLY[2]));
        q = self.fma(q, r, self.splat(EXP2_POLY[1]));
        q = self.fma(q, r, self.splat(EXP2_POLY[0]));
        self.exp_scale(self.fma(q, r, self.splat(1.0)), t, x)
    }

    /// `1 / (1 + e^-x)`
    #[inline(always)]
    fn sigmoid(self, x: Self::V) -> Self::V {
        let one = self.splat(1.0);
        self.div(one, self.add(one, self.exp(self.sub(self.splat(0.0), x))))
    }

    /// Hyperbolic tangent, within 2e-7 of the true value.
    #[inline(always)]
    fn tanh(self, x: Self::V) -> Self::V {
        let one = self.splat(1.0);
        let e = self.exp(self.add(x, x));
        self.sub(one, self.div(self.splat(2.0), self.add(e, one)))
    }
}

/// Below this, `exp` gives 0: the smallest integer whose exponential is a normal number.
pub(crate) const EXP_MIN: f32 = -87.0;
/// Above this, `exp` gives `e^88`, so that its scale stays a finite power of two.
pub(crate) const EXP_MAX: f32 = 88.0;
/// 1.5 * 2^23: adding it to a small number rounds that number to an integer, held in the low bits of the sum.
pub(crate) const ROUND_MAGIC: f32 = 12_582_912.0;
/// ln 2 rounded to 9 bits.
const LN2_HIGH: f32 = 0.693_359_4;
/// ln 2 - [`LN2_HIGH`].
const LN2_LOW: f32 = -2.121_944_4e-4;
/// `q` in `e^r = 1 + r + r^2 q(r)`, fitted by least squares of the relative error over `|r| <= 0.3471`: error 3.6e-9.
const EXP_POLY: [f32; 5] = [4.999_999e-1, 1.666_652e-1, 4.166_942e-2, 8.368_941e-3, 1.375_753_2e-3];

/// `q` in `2^r = 1 + r q(r)`, fitted likewise over `|r| <= 0.501`: error 1.1e-7.
const EXP2_POLY: [f32; 5] = [6.931_468e-1, 2.402_223_5e-1, 5.550_893_8e-2, 9.671_897e-3, 1.321_901_9e-3];

/// A function over vectors, with its arguments as fields.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// The body; implementations mark it `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs a kernel with the instructions of `isa`.
///
/// # Panics
/// When this CPU does not have `isa`; [`Isa::is_available`] tells beforehand.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        Isa::Scalar => kernel.run(Scalar),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            avx2::run(Avx2::detect().expect("the instruction set was checked when the backend was made"), kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => {
            avxvnni::run(AvxVnni::detect().expect("the instruction set was checked when the backend was made"), kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            avx512::run(Avx512::detect().expect("the instruction set was checked when the backend was made"), kernel)
        }
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => {
            neon::run(Neon::detect().expect("the instruction set was checked when the backend was made"), kernel)
        }
        other => panic!("{other:?} belongs to another CPU architecture"),
    }
}

/// Loads up to 16 values; the lanes after them are 0.
#[inline(always)]
pub(crate) fn load_part<S: Simd>(s: S, src: &[f32]) -> S::V {
    let mut padded = [0.0; LANES];
    padded[..src.len()].copy_from_slice(src);
    s.load(&padded)
}

/// Stores the first `dst.len()` lanes, at most 16.
#[inline(always)]
pub(crate) fn store_part<S: Simd>(s: S, v: S::V, dst: &mut [f32]) {
    let mut all = [0.0; LANES];
    s.store(v, &mut all);
    dst.copy_from_slice(&all[..dst.len()]);
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Asks the caches for the lines of `data`, which will be read soon. Has no effect on results.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T]) {
    let start = data.as_ptr().cast::<u8>();
    for offset in (0..size_of_val(data)).step_by(LINE) {
        prefetch_line(start.wrapping_add(offset));
    }
}

/// Asks the caches for the line at `address`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults; SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast())
    };
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch never faults and writes nothing.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{line}]", line = in(reg) address, options(nostack, readonly, preserves_flags))
    };
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// As [`prefetch_line`], no nearer than the L2 cache.
#[inline(always)]
pub(crate) fn prefetch_l2(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults; SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    prefetch_line(address);
}

/// Implements [`Simd`] for the token type `$token` by calling the function of the same name in `$ops`. What comes after
/// that replaces a provided method.
///
/// Those are safe functions with `#[target_feature]`; calling one from code without the feature is the unsafe step, and it
/// is the same for every op: the token exists only where the features were detected.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! forward_simd {
    ($token:ty, $vector:ty, $sums:ty, $tile:expr, $ops:ident $(, $($own:tt)*)?) => {
        forward_simd!(@impl $token, $vector, $sums, $tile, $ops, [$($($own)*)?]
            splat(x: f32) -> $vector;
            load(src: &[f32; LANES]) -> $vector;
            load_f16(src: &[u16; LANES]) -> $vector;
            load_bf16(src: &[u16; LANES]) -> $vector;
            store(v: $vector, dst: &mut [f32; LANES]) -> ();
            store_f16(v: $vector, dst: &mut [u16; LANES]) -> ();
            add(a: $vector, b: $vector) -> $vector;
            sub(a: $vector, b: $vector) -> $vector;
            mul(a: $vector, b: $vector) -> $vector;
            div(a: $vector, b: $vector) -> $vector;
            fma(a: $vector, b: $vector, acc: $vector) -> $vector;
            max(a: $vector, b: $vector) -> $vector;
            min(a: $vector, b: $vector) -> $vector;
            abs(v: $vector) -> $vector;
            reduce_add(v: $vector) -> f32;
            reduce_max(v: $vector) -> f32;
            keep_lanes(v: $vector, first: usize, end: usize, fill: f32) -> $vector;
            exp_scale(p: $vector, t: $vector, x: $vector) -> $vector;
            round_i8(v: [$vector; 2], dst: &mut [i8; 32]) -> [i32; 2];
            store_i16(v: $vector, dst: &mut [i16; LANES]) -> ();
            zero_sums() -> $sums;
            sums_to_f32(sums: $sums) -> $vector;
        );
    };
    (@impl $token:ty, $vector:ty, $sums:ty, $tile:expr, $ops:ident, [$($own:tt)*]
        $($name:ident($($arg:ident: $ty:ty),*) -> $out:ty;)*) => {
        impl Simd for $token {
            type V = $vector;
            type I = $sums;
            const TILE: usize = $tile;
            $($own)*

            #[inline(always)]
            fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
                run(self, kernel)
            }

            #[inline(always)]
            fn dot_pairs<const R: usize>(self, bytes: &[i8; 2 * LANES], pairs: &[[i16; 2]; R], sums: &mut [$sums; R]) {
                // SAFETY: as for the other ops.
                unsafe { $ops::dot_pairs(bytes, pairs, sums) }
            }

            $(
                #[inline(always)]
                fn $name(self, $($arg: $ty),*) -> $out {
                    // SAFETY: `self` came from `detect`, which saw every feature that the op enables.
                    unsafe { $ops::$name($($arg),*) }
                }
            )*
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use forward_simd;
