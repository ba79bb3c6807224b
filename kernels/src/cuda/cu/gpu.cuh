//! The device body of `device.cuh`: CUDA intrinsics and PTX, for compute capability 8.0 and later.
#pragma once

#define DEVICE __device__ __forceinline__
#define KERNEL(name, max_threads) extern "C" __global__ void __launch_bounds__(max_threads) name
#define EXPORT(name)
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(T, name)                                      \
  extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_)

// ---- numbers ----

/// Storage of a bfloat16 or an IEEE half. Arithmetic is done in float.
struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};
/// 16 and 8 bytes that one instruction loads or stores.
struct alignas(16) Words4 {
  unsigned w[4];
};
struct alignas(8) Words2 {
  unsigned w[2];
};

DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned bits_of_float(float x) { return __float_as_uint(x); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
/// Round to nearest, ties to even; a NaN becomes 0x7fff.
DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
DEVICE f16 to_f16(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
/// Two rounded numbers in one word, `low` in the lower half.
DEVICE unsigned pack_bf16(float low, float high) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE unsigned pack_f16(float low, float high) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
/// Products of two pairs of bf16, each rounded once; subnormal numbers count.
DEVICE unsigned multiply_bf16(unsigned a, unsigned b) {
  unsigned y;
  // With minus zero, the sum of which with a zero has the zero's sign.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
  return y;
}

/// e^x and 2^x to about two units in the last place; the emulated body computes them exactly rounded.
DEVICE float fast_exp(float x) { return __expf(x); }
DEVICE float fast_exp2(float x) { return exp2f(x); }
DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }

// ---- memory ----

/// Vector accesses: the address is a multiple of the size. `load16_stream` is for data that is read once (weights):
/// it goes past the L1 cache and must not be written by the same kernel.
DEVICE Words4 load16(const void* p) { return *reinterpret_cast<const Words4*>(p); }
DEVICE Words2 load8(const void* p) { return *reinterpret_cast<const Words2*>(p); }
DEVICE void store16(void* p, Words4 x) { *reinterpret_cast<Words4*>(p) = x; }
DEVICE void store8(void* p, Words2 x) { *reinterpret_cast<Words2*>(p) = x; }
DEVICE Words4 load16_stream(const void* p) {
  Words4 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
      : "l"(p));
  return x;
}
DEVICE Words2 load8_stream(const void* p) {
  Words2 x;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "l"(p));
  return x;
}
DEVICE unsigned load4_stream(const void* p) {
  unsigned x;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}

/// Copies 16 bytes from global to shared memory without waiting; both addresses are multiples of 16. With `valid` false
/// it writes zeros and reads nothing.
DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
  unsigned to = (unsigned)__cvta_generic_to_shared(shared);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
/// Closes a group of the copies that this thread started since the last group.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `PENDING` groups of this thread are under way. Other threads see the data after `sync_threads`.
template <int PENDING>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void atomic_add(float* p, float x) { atomicAdd(p, x); }
DEVICE unsigned atomic_add(unsigned* p, unsigned x) { return atomicAdd(p, x); }
DEVICE int atomic_add(int* p, int x) { return atomicAdd(p, x); }
DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long x) { return atomicAdd(p, x); }
DEVICE unsigned atomic_max(unsigned* p, unsigned x) { return atomicMax(p, x); }
DEVICE unsigned long long atomic_max(unsigned long long* p, unsigned long long x) { return atomicMax(p, x); }
/// Orders this thread's writes before its later ones, as every thread of the device sees them.
DEVICE void device_fence() { __threadfence(); }
/// Loads what other blocks of this kernel have written before a fence: not from this processor's L1 cache.
DEVICE unsigned long long load_fresh(const unsigned long long* p) { return __ldcg(p); }

// ---- threads ----

DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

template <class T>
DEVICE T shuffle_xor(T x, unsigned mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
template <class T>
DEVICE T shuffle(T x, unsigned from) { return __shfl_sync(0xffffffffu, x, from); }
template <class T>
DEVICE T shuffle_down(T x, unsigned by) { return __shfl_down_sync(0xffffffffu, x, by); }
template <class T>
DEVICE T shuffle_up(T x, unsigned by) { return __shfl_up_sync(0xffffffffu, x, by); }
/// One bit per lane; any; all.
DEVICE unsigned warp_ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE bool warp_all(bool x) { return __all_sync(0xffffffffu, x); }
DEVICE int count_ones(unsigned x) { return __popc(x); }
DEVICE int first_one(unsigned x) { return __ffs((int)x) - 1; }

/// The upper 64 bits of a product.
DEVICE unsigned long long multiply_high(unsigned long long a, unsigned long long b) { return __umul64hi(a, b); }

/// Four signed bytes times four, summed onto `c`.
DEVICE int dot4(int a, int b, int c) { return __dp4a(a, b, c); }

// ---- tensor cores ----
//
// Fragments of m16n8k16, with group = lane / 4 and pair = 2 * (lane % 4); a word holds two neighbours along k:
//   a[0] row group,     k pair..   a[1] row group + 8, k pair..   a[2] row group, k 8 + pair..   a[3] row group + 8, k 8 + pair..
//   b[0] column group,  k pair..   b[1] column group,  k 8 + pair..
//   c[0], c[1] row group, columns pair, pair + 1                  c[2], c[3] row group + 8, the same columns

/// c += a * b: [16, 16] times [16, 8] bf16, f32 sums.
DEVICE void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The same for IEEE halves.
DEVICE void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Loads 8x8 matrices of 16-bit numbers from shared memory: lane i names row i % 8 of matrix i / 8 (a multiple of 16);
/// lane l receives of each matrix the two neighbours at row l / 4, column 2 * (l % 4). `_transposed` receives of each
/// matrix row 2 * (l % 4) and the next, at column l / 4.
DEVICE void load_matrices4(unsigned (&r)[4], const void* shared_row) {
  unsigned p = (unsigned)__cvta_generic_to_shared(shared_row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p)
               : "memory");
}
DEVICE void load_matrices4_transposed(unsigned (&r)[4], const void* shared_row) {
  unsigned p = (unsigned)__cvta_generic_to_shared(shared_row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p)
               : "memory");
}
/// Two matrices: the addresses of lanes 0 to 15 count.
DEVICE void load_matrices2(unsigned (&r)[2], const void* shared_row) {
  unsigned p = (unsigned)__cvta_generic_to_shared(shared_row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(p) : "memory");
}
DEVICE void load_matrices2_transposed(unsigned (&r)[2], const void* shared_row) {
  unsigned p = (unsigned)__cvta_generic_to_shared(shared_row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(p)
               : "memory");
}
