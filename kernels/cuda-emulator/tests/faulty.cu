//! Kernels with one mistake each, that the emulated driver must notice, and one without.
#include "device.cuh"

/// out[i] = the sum of the block's x.
KERNEL(correct, 1024)(const float* x, float* out) {
  SHARED(float, partial, 32);
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = block_sum(x[i], partial);
}
EXPORT(correct)

/// The same without the barrier between writing the partial sums and reading them.
KERNEL(lacks_barrier, 1024)(const float* x, float* out) {
  SHARED(float, partial, 32);
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = warp_sum(x[i]);
  if (lane() == 0) partial[warp()] = sum;
  sync_warp();
  out[i] = warp_sum(lane() < warps() ? partial[lane()] : 0.f);
}
EXPORT(lacks_barrier)

KERNEL(writes_past_end, 1024)(const float*, float* out) { out[blockIdx.x * blockDim.x + threadIdx.x + 1] = 1.f; }
EXPORT(writes_past_end)

KERNEL(writes_past_shared, 1024)(const float*, float* out) {
  SHARED(float, values, 128);
  values[threadIdx.x + 1] = 1.f;
  out[0] = values[threadIdx.x];
}
EXPORT(writes_past_shared)

KERNEL(misaligned, 1024)(const float* x, float* out) { out[threadIdx.x] = float_of_bits(load16(x + 1).w[0]); }
EXPORT(misaligned)

KERNEL(diverges, 1024)(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (lane() < 16) value = warp_sum(value);
  out[threadIdx.x] = value;
}
EXPORT(diverges)

/// Reads what it asked to have copied without waiting for it.
KERNEL(does_not_wait, 1024)(const float* x, float* out) {
  SHARED(float, values, 4 * 1024);
  copy_async16(values + 4 * threadIdx.x, x);
  copy_async_commit();
  sync_threads();
  out[threadIdx.x] = values[4 * threadIdx.x];
}
EXPORT(does_not_wait)

/// out[0..64] = the 8x8 matrices of x through shared memory by load_matrices4 and back; also every warp operation.
KERNEL(warp_operations, 32)(const float* x, float* out) {
  unsigned i = lane();
  unsigned ones = warp_ballot(i % 3 == 0);
  out[i] = shuffle_down(x[i], 1) + shuffle_up(x[i], 2) + shuffle(x[i], 5) + (float)count_ones(ones) +
           (warp_any(i == 7) ? 1.f : 0.f) + (warp_all(i < 32) ? 2.f : 0.f) + (float)first_one(ones >> 1);
}
EXPORT(warp_operations)

/// out = a * b by tensor cores: a [16, 16] and b [16, 8] of whole numbers, a through load_matrices4.
KERNEL(multiplies, 32)(const float* x, float* out) {
  SHARED(bf16, a, 256);
  SHARED(bf16, b, 128);
  for (unsigned i = lane(); i < 256; i += 32) a[i] = to_bf16(x[i]);
  for (unsigned i = lane(); i < 128; i += 32) b[i] = to_bf16(x[256 + i]);
  sync_threads();
  unsigned fa[4], fb[2];
  load_matrices4(fa, a + 16 * (lane() % 16) + 8 * (lane() / 16));
  load_matrices2_transposed(fb, b + 8 * (lane() % 16));
  float c[4] = {0.f, 0.f, 0.f, 0.f};
  mma_bf16(c, fa, fb);
  for (unsigned i = 0; i < 4; i++) out[8 * (lane() / 4 + 8 * (i / 2)) + 2 * (lane() % 4) + i % 2] = c[i];
}
EXPORT(multiplies)

/// out[i] = x[i] rounded to bf16, to f16, and copied by deferred copies.
KERNEL(rounds, 32)(const float* x, float* out) {
  SHARED(float, values, 128);
  copy_async16(values + 4 * lane(), x + 4 * lane());
  copy_async16(values + 4 * lane(), x, false);
  copy_async_commit();
  copy_async16(values + 4 * lane(), x + 4 * lane());
  copy_async_commit();
  copy_async_wait<1>();
  out[64 + lane()] = values[4 * lane()];
  copy_async_wait<0>();
  out[96 + lane()] = values[4 * lane()];
  out[lane()] = to_float(to_bf16(x[lane()]));
  out[32 + lane()] = to_float(to_f16(x[lane()]));
}
EXPORT(rounds)
