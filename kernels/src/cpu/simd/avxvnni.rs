//! AVX2's lanes on a CPU that has AVX-VNNI too (Intel's laptops and desktops since Alder Lake, AMD since Zen 5): only the
//! products of bytes differ.

use super::avx2::{I, V, ops, two_registers};
use super::{Avx2, Kernel, LANES, Simd, forward_simd};

/// Proof that the CPU has AVX-VNNI, and all that AVX2 means here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni(());

impl AvxVnni {
    /// The proof, when there is one.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (Avx2::detect().is_some() && is_x86_feature_detected!("avxvnni")).then_some(AvxVnni(()))
    }
}

/// Runs a kernel with the features enabled.
#[inline]
pub(super) fn run<K: Kernel>(s: AvxVnni, kernel: K) -> K::Output {
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    fn enabled<K: Kernel>(s: AvxVnni, kernel: K) -> K::Output {
        kernel.run(s)
    }
    // SAFETY: `s` is the proof that the features were detected.
    unsafe { enabled(s, kernel) }
}

two_registers!(AvxVnni);
