//! What every kernel is written against: thread identity, shared memory, warp and tensor-core operations, number formats.
//
//     kernel.cu ──> device.cuh ──┬── gpu.cuh                     compiled by nvcc: intrinsics and PTX
//                                └── emulated.hpp                compiled by g++: fibers on the CPU (kernels/cuda-emulator)
//
// The two bodies below this file have the same names and the same meaning, so that one source runs on both. Kernels keep
// to those names and to plain C++; anything that only one of the two has does not belong in a kernel.
//
// A kernel is written
//
//     KERNEL(scale_rows, 256)(const float* x, float* out, unsigned cols) {
//       SHARED(float, partial, 32);                 // static shared memory: T* partial, 32 of them, 16-byte aligned
//       DYNAMIC_SHARED(float, rows);                // dynamic shared memory, its size is given at launch
//       ...
//     }
//     EXPORT(scale_rows)
//
// where 256 is the largest block it is launched with. Blocks are a multiple of 32 threads. A warp operation is reached by
// all 32 threads of its warp, `sync_threads` by every thread of the block that has not returned.
#pragma once

#if defined(__CUDACC__)
#include "gpu.cuh"
#else
#include "emulated.hpp"
#endif

constexpr unsigned WARP = 32;

/// Index of this thread in its warp, and of its warp in the block (blocks are one-dimensional).
DEVICE unsigned lane() { return threadIdx.x % WARP; }
DEVICE unsigned warp() { return threadIdx.x / WARP; }
DEVICE unsigned warps() { return blockDim.x / WARP; }

template <class T>
DEVICE constexpr T div_ceil(T a, T b) { return (a + b - 1) / b; }

// ---- reductions: the same tree whatever the data, so results repeat bit by bit ----

/// Sum over the warp, in every lane.
template <class T>
DEVICE T warp_sum(T x) {
#pragma unroll
  for (unsigned step = WARP / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

/// Maximum over the warp, in every lane.
DEVICE float warp_max(float x) {
#pragma unroll
  for (unsigned step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, shuffle_xor(x, step));
  return x;
}

/// Sum over the block, in every thread. `scratch` is shared memory for `warps()` values, free again on return.
template <class T>
DEVICE T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  sync_threads();
  x = warp_sum(lane() < warps() ? scratch[lane()] : T(0));
  sync_threads();
  return x;
}

/// Maximum over the block, in every thread. `scratch` as in `block_sum`.
DEVICE float block_max(float x, float* scratch) {
  x = warp_max(x);
  if (lane() == 0) scratch[warp()] = x;
  sync_threads();
  x = warp_max(lane() < warps() ? scratch[lane()] : -INFINITY);
  sync_threads();
  return x;
}

// ---- pairs of 16-bit numbers in one word, the lower index in the lower half ----

DEVICE bf16 bf16_of_bits(unsigned bits) { return bf16{(unsigned short)bits}; }
DEVICE float2 unpack_bf16(unsigned pair) {
  return {float_of_bits(pair << 16), float_of_bits(pair & 0xffff0000u)};
}
DEVICE float2 unpack_f16(unsigned pair) {
  return {to_float(f16{(unsigned short)(pair & 0xffffu)}), to_float(f16{(unsigned short)(pair >> 16)})};
}

/// The eight numbers of 16 bytes.
DEVICE void unpack_bf16(const Words4& words, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = unpack_bf16(words.w[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}
DEVICE Words4 pack_bf16(const float (&x)[8]) {
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; i++) words.w[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  return words;
}
