//! Numbers of 8 bits with a shared exponent, as keys and values are stored: code x 2^e.
//
//     code   sign, 4 bits of exponent (bias 7), 3 of fraction: 0, then 2^-9 .. 448      E4M3, https://arxiv.org/abs/2209.05433
//     e      one for each key and each value of a head, kept as the byte e + 127: 0 in a pool that was never written
//
// Codes are exact in bf16 and powers of two are exact in everything, so what is read is exactly what was rounded once, when it
// was written. All is done in whole numbers and one product: compute capability 8.0 has no instruction for E4M3, and that of
// 9.0 gives IEEE halves, which bf16 factors would cost more to make of.
#pragma once
#include "device.cuh"

/// The largest number, and the smallest that has all its bits.
constexpr float E4M3_MOST = 448.0f, E4M3_NORMAL = 0.015625f;

/// Rounds to nearest, ties to the even code; what is larger than the largest number becomes that, and so does a NaN. The two
/// codes that stand for NaN are never given.
DEVICE unsigned e4m3_of(float x) {
  const unsigned sign = bits_of_float(x) >> 24 & 0x80u;
  const float size = fminf(fabsf(x), E4M3_MOST);
  // Below the normal numbers codes count in 2^-9, as floats do from 2^14 on.
  if (size < E4M3_NORMAL) return sign | (bits_of_float(size + 16384.0f) - bits_of_float(16384.0f));
  const unsigned bits = bits_of_float(size);
  return sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3));
}

/// Where in eight bytes element `i` of eight lies: the bytes of a word are its elements 0, 2, 1, 3.
DEVICE unsigned e4m3_byte(unsigned i) { return i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }

/// The codes in bytes 1 and 3 as bf16. The codes of NaN become 480, as if they were numbers.
DEVICE unsigned e4m3_pair(unsigned word) {
  // Exponent and fraction in the place of bf16's are 2^120 times too small, codes without a leading one among them.
  const unsigned small = (word & 0x80008000u) | (word >> 4 & 0x07f007f0u), two_to_120 = 0x7b807b80u;
  return multiply_bf16(small, two_to_120);
}

/// Eight elements as bf16.
DEVICE Words4 e4m3_words(unsigned first, unsigned second) {
  Words4 out;
  out.w[0] = e4m3_pair(first << 8);
  out.w[1] = e4m3_pair(first);
  out.w[2] = e4m3_pair(second << 8);
  out.w[3] = e4m3_pair(second);
  return out;
}

/// The byte of the smallest power of two with which codes reach `largest`, which is not negative.
DEVICE unsigned shared_exponent(float largest) {
  // The largest code is 1.75 x 2^8: a fraction above .75 carries into the exponent.
  const int exponent = (int)((bits_of_float(largest) + 0x1fffffu) >> 23) - 8;
  // So that the power and its inverse are normal floats, and no number overflows.
  return (unsigned)(exponent < 1 ? 1 : exponent > 245 ? 245 : exponent);
}
DEVICE float exponent_scale(unsigned byte) { return float_of_bits(byte << 23); }
DEVICE float exponent_inverse(unsigned byte) { return float_of_bits((254u - byte) << 23); }
