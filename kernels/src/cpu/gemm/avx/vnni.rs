//! The dot product with AVX-VNNI: four products of unsigned by signed bytes are added into each 32-bit lane.
//!
//! Nothing overflows, and only where a row has a scale for each 16 columns are the sums of both kept apart until they are
//! scaled.

use std::arch::x86_64::{__m256i, _mm256_add_epi32, _mm256_dpbusd_avx_epi32};

use super::{all_scaled, broadcast, scaled};
use crate::cpu::gemm::TileQuants;
use crate::cpu::simd::AvxVnni;
use crate::format::pack::Packed;

tiles!(AvxVnni, "avx2,fma,f16c,avxvnni");

/// Unsigned bytes are what it multiplies.
const SIGNED: bool = false;

/// True where a block's sums are scaled once, at its end: registers hold those of both vectors of a panel's rows.
const fn side_by_side<B: Packed>() -> bool {
    B::SHAPE.scales < 2
}

/// Scaled dot products of a block's rows, in `H` vectors of 8, with `N` rows of activations; `codes` gives a group of
/// columns of a vector.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn dots<B: Packed, const N: usize, const H: usize>(
    codes: impl Fn(usize, usize) -> __m256i,
    scales: [[__m256i; 2]; H],
    x: &TileQuants<N>,
) -> [[__m256i; H]; N] {
    let mut sums = [[_mm256_setzero_si256(); H]; N];
    let mut run = sums;
    each_group!(j => {
        let mut words = [_mm256_setzero_si256(); H];
        for (h, word) in words.iter_mut().enumerate() {
            *word = codes(j, h);
        }
        for n in 0..N {
            let x = broadcast(&x[n], j);
            for h in 0..H {
                run[n][h] = _mm256_dpbusd_avx_epi32(run[n][h], words[h], x);
            }
        }
        if B::SHAPE.scales == 2 && j % 4 == 3 {
            for n in 0..N {
                for h in 0..H {
                    sums[n][h] = _mm256_add_epi32(sums[n][h], scaled(run[n][h], scales[h][j / 4]));
                    run[n][h] = _mm256_setzero_si256();
                }
            }
        }
    });
    match B::SHAPE.scales {
        0 => run,
        1 => all_scaled(run, scales),
        _ => sums,
    }
}
