//! Loads and stores of the AVX2 products, each of an array of the size that it needs.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_loadl_epi64, _mm_loadu_si128, _mm256_cvtph_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_storeu_ps, _mm256_storeu_si256,
};

use super::EIGHT;
use crate::cpu::gemm::Lanes;
use crate::format::pack::{PANEL, Word};

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_8(bytes: &[u8; 8]) -> __m128i {
    // SAFETY: the array holds 8 bytes.
    unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_16(bytes: &[[u8; 2]; 8]) -> __m128i {
    // SAFETY: the array holds 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_table(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array holds 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_word(word: &Word, half: usize) -> __m256i {
    load_bytes(&word.as_chunks::<32>().0[half])
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array holds 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_bytes(value: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: the array holds 32 bytes.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), value) };
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_ints(ints: &[i16; 16]) -> __m256i {
    // SAFETY: the array holds 32 bytes.
    unsafe { _mm256_loadu_si256(ints.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_ints(value: __m256i, ints: &mut [i16; 16]) {
    // SAFETY: the array holds 32 bytes.
    unsafe { _mm256_storeu_si256(ints.as_mut_ptr().cast(), value) };
}

/// Halves of rows `8 * half..`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn load_halves(halves: &[u16; PANEL], half: usize) -> __m256 {
    let eight = &halves.as_chunks::<EIGHT>().0[half];
    // SAFETY: the array holds 8 halves, 16 bytes.
    let bits = unsafe { _mm_loadu_si128(eight.as_ptr().cast()) };
    _mm256_cvtph_ps(bits)
}

#[inline(always)]
pub(super) fn half_mut(lanes: &mut Lanes, half: usize) -> &mut [f32; EIGHT] {
    &mut lanes.as_chunks_mut::<EIGHT>().0[half]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_f32(lanes: &[f32; EIGHT]) -> __m256 {
    // SAFETY: the array holds 8 floats.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_f32(value: __m256, lanes: &mut [f32; EIGHT]) {
    // SAFETY: the array holds 8 floats.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), value) };
}
