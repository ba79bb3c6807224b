//! The dot product with AVX2, which multiplies unsigned by signed bytes but adds the pairs into 16 bits.
//!
//! How many products of a code with 127 fit 16 bits decides how many words are summed before the sums are widened, and the
//! multiplication that widens them applies the whole-number scale on the way:
//!
//! ```text
//!   up to 4 bits   8 words, a whole block       16 * 15 * 127 = 30,480
//!   5 bits         4 words, 16 columns           8 * 31 * 127 = 31,496
//!   6 bits         2 words                       4 * 63 * 127 = 32,004
//!   8 bits         1 word, as `|w| * (x with the sign of w)`     2 * 128 * 127 = 32,512
//! ```

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, _mm256_abs_epi8, _mm256_add_epi16, _mm256_add_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_set1_epi16, _mm256_sign_epi8,
};

use super::{all_scaled, broadcast};
use crate::cpu::gemm::TileQuants;
use crate::cpu::simd::Avx2;
use crate::format::pack::Packed;

tiles!(Avx2, "avx2,fma,f16c");

/// The sign of a weight goes to its activation.
const SIGNED: bool = true;

/// Words whose products are summed in 16 bits.
const fn run_words<B: Packed>() -> usize {
    match (B::SHAPE.bits, B::SHAPE.scales) {
        (6, _) => 2,
        (5, _) | (_, 2) => 4,
        _ => 8,
    }
}

/// True where both vectors of a panel's rows are multiplied side by side. With two runs a block, the sums of the first wait in
/// memory; with more, or with scales of their own, they would go back and forth.
const fn side_by_side<B: Packed>() -> bool {
    B::SHAPE.bits == 8 || B::SHAPE.scales < 2 && run_words::<B>() >= 4
}

/// Scaled dot products of a block's rows, in `H` vectors of 8, with `N` rows of activations; `codes` gives a group of
/// columns of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn dots<B: Packed, const N: usize, const H: usize>(
    codes: impl Fn(usize, usize) -> __m256i,
    scales: [[__m256i; 2]; H],
    x: &TileQuants<N>,
) -> [[__m256i; H]; N] {
    let mut sums = [[_mm256_setzero_si256(); H]; N];
    if B::SHAPE.bits == 8 {
        let ones = _mm256_set1_epi16(1);
        each_group!(j => {
            let mut words = [_mm256_setzero_si256(); H];
            let mut sizes = words;
            for h in 0..H {
                words[h] = codes(j, h);
                sizes[h] = _mm256_abs_epi8(words[h]);
            }
            for n in 0..N {
                let x = broadcast(&x[n], j);
                for h in 0..H {
                    let pairs = _mm256_maddubs_epi16(sizes[h], _mm256_sign_epi8(x, words[h]));
                    sums[n][h] = hold(_mm256_add_epi32(sums[n][h], _mm256_madd_epi16(pairs, ones)));
                }
            }
        });
        if B::SHAPE.scales == 1 {
            sums = all_scaled(sums, scales);
        }
    } else {
        let mut run = sums;
        each_group!(j => {
            let mut words = [_mm256_setzero_si256(); H];
            for (h, word) in words.iter_mut().enumerate() {
                *word = codes(j, h);
            }
            for n in 0..N {
                let x = broadcast(&x[n], j);
                for h in 0..H {
                    run[n][h] = hold(_mm256_add_epi16(run[n][h], _mm256_maddubs_epi16(words[h], x)));
                }
            }
            if (j + 1).is_multiple_of(run_words::<B>()) {
                for n in 0..N {
                    for h in 0..H {
                        sums[n][h] = _mm256_add_epi32(sums[n][h], _mm256_madd_epi16(run[n][h], scales[h][j / 4]));
                        run[n][h] = _mm256_setzero_si256();
                    }
                }
            }
        });
    }
    sums
}

/// The same vector, in the order of the source: without it, the compiler sums each row as a tree once the loops are
/// unrolled, loads every operand of a block first, and spills most of them.
#[inline]
#[target_feature(enable = "avx2")]
fn hold(mut vector: __m256i) -> __m256i {
    // SAFETY: there is no instruction in it.
    unsafe { asm!("/* {0} */", inout(ymm_reg) vector, options(nomem, nostack, preserves_flags)) };
    vector
}
