//! The emulated body of `device.cuh`: the names of `gpu.cuh`, by the same meaning, on the fibers of `fibers.hpp`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "fibers.hpp"

#define __restrict__ __restrict
#define DEVICE inline
#define KERNEL(name, max_threads)              \
  constexpr unsigned name##_max = max_threads; \
  extern "C" void name
#define SHARED(T, name, count)    \
  static char name##_key;           \
  T* const name = static_cast<T*>(emu::shared_memory(&name##_key, sizeof(T) * (count)))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emu::dynamic_shared_memory())
#define threadIdx (emu::now.thread)
#define blockIdx (emu::now.block)
#define blockDim (emu::now.block_dim)
#define gridDim (emu::now.grid_dim)

namespace emu {

/// Copies a launch's arguments out of its list of pointers, by the types of the kernel's own parameters.
template <auto F>
struct Bind;
template <class... A, void (*F)(A...)>
struct Bind<F> {
  static std::vector<size_t> sizes() { return {sizeof(A)...}; }
  static std::function<void()> bind(void** arguments) {
    return bind(arguments, std::index_sequence_for<A...>{});
  }
  template <size_t... I>
  static std::function<void()> bind(void** arguments, std::index_sequence<I...>) {
    std::tuple<std::decay_t<A>...> copies{read<std::decay_t<A>>(arguments[I])...};
    return [copies] { std::apply(F, copies); };
  }
  template <class T>
  static T read(const void* from) {
    static_assert(std::is_trivially_copyable_v<T>, "kernel parameters are plain data");
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
};
struct Register {
  Register(const Kernel& kernel) { add_kernel(kernel); }
};

template <size_t N>
inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % N != 0) fault(MISALIGNED_ADDRESS, "a vector access at an address that is not a multiple of its size");
}

}  // namespace emu

#define EXPORT(name) static const emu::Register name##_registered(emu::Kernel{#name, name##_max, &emu::Bind<&name>::bind, emu::Bind<&name>::sizes()});

// ---- numbers ----

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};
struct alignas(16) Words4 {
  unsigned w[4];
};
struct alignas(8) Words2 {
  unsigned w[2];
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;

DEVICE float float_of_bits(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
DEVICE unsigned bits_of_float(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return float_of_bits((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) {
  unsigned sign = (unsigned)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp((float)fraction, -24);
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}
DEVICE bf16 to_bf16(float x) {
  unsigned bits = bits_of_float(x);
  if (x != x) return bf16{0x7fff};
  return bf16{(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
DEVICE f16 to_f16(float x) {
  if (x != x) return f16{0x7fff};
  unsigned short sign = (unsigned short)(bits_of_float(x) >> 16 & 0x8000);
  float size = std::fabs(x);
  if (size >= 65520.f) return f16{(unsigned short)(sign | 0x7c00)};
  int exponent = size < 6.103515625e-5f ? -14 : std::ilogb(size);
  // Units of the last place, rounded to even by the default rounding mode; a carry out of the fraction moves the exponent.
  unsigned units = (unsigned)std::nearbyint(std::ldexp(size, 10 - exponent));
  return f16{(unsigned short)(sign | (units + ((unsigned)(exponent + 14) << 10)))};
}
DEVICE unsigned pack_bf16(float low, float high) { return to_bf16(low).bits | (unsigned)to_bf16(high).bits << 16; }
DEVICE unsigned pack_f16(float low, float high) { return to_f16(low).bits | (unsigned)to_f16(high).bits << 16; }
DEVICE unsigned multiply_bf16(unsigned a, unsigned b) {
  auto of = [](unsigned pair, unsigned i) { return to_float(bf16{(unsigned short)(pair >> 16 * i)}); };
  return pack_bf16(of(a, 0) * of(b, 0), of(a, 1) * of(b, 1));
}

DEVICE float fast_exp(float x) { return std::exp(x); }
DEVICE float fast_exp2(float x) { return std::exp2(x); }
DEVICE float reciprocal_sqrt(float x) { return 1.f / std::sqrt(x); }

// ---- memory ----

template <class T>
DEVICE T load_vector(const void* p) {
  emu::check_aligned<sizeof(T)>(p);
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
DEVICE void store_vector(void* p, const T& x) {
  emu::check_aligned<sizeof(T)>(p);
  std::memcpy(p, &x, sizeof x);
}
DEVICE Words4 load16(const void* p) { return load_vector<Words4>(p); }
DEVICE Words2 load8(const void* p) { return load_vector<Words2>(p); }
DEVICE void store16(void* p, Words4 x) { store_vector(p, x); }
DEVICE void store8(void* p, Words2 x) { store_vector(p, x); }
DEVICE Words4 load16_stream(const void* p) { return load_vector<Words4>(p); }
DEVICE Words2 load8_stream(const void* p) { return load_vector<Words2>(p); }
DEVICE unsigned load4_stream(const void* p) { return load_vector<unsigned>(p); }

DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
  emu::check_aligned<16>(shared);
  emu::check_aligned<16>(global);
  emu::copy_later(shared, valid ? global : nullptr);
}
DEVICE void copy_async_commit() { emu::copy_group_end(); }
template <int PENDING>
DEVICE void copy_async_wait() {
  emu::copy_group_wait(PENDING);
}

// Fibers give way only where they wait, so a plain read and write is atomic.
DEVICE void atomic_add(float* p, float x) { *p += x; }
DEVICE unsigned atomic_add(unsigned* p, unsigned x) { return std::exchange(*p, *p + x); }
DEVICE int atomic_add(int* p, int x) { return std::exchange(*p, *p + x); }
DEVICE unsigned long long atomic_add(unsigned long long* p, unsigned long long x) { return std::exchange(*p, *p + x); }
DEVICE unsigned atomic_max(unsigned* p, unsigned x) { return std::exchange(*p, std::max(*p, x)); }
DEVICE unsigned long long atomic_max(unsigned long long* p, unsigned long long x) { return std::exchange(*p, std::max(*p, x)); }
DEVICE void device_fence() {}
DEVICE unsigned long long load_fresh(const unsigned long long* p) { return *p; }

// ---- threads ----

DEVICE void sync_threads() { emu::meet_block(); }
DEVICE void sync_warp() { emu::meet(emu::Meeting::sync, nullptr, 0); }

/// The value that lane `from` brought; every lane brings `x`.
template <class T>
DEVICE T take(T x, unsigned from) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= sizeof(emu::Slot) && std::is_trivially_copyable_v<T>);
  const emu::Slot* slots = emu::meet(emu::Meeting::shuffle, &x, sizeof(T) / 4);
  std::memcpy(&x, &slots[from % 32], sizeof(T));
  return x;
}
template <class T>
DEVICE T shuffle_xor(T x, unsigned mask) { return take(x, threadIdx.x % 32 ^ mask); }
template <class T>
DEVICE T shuffle(T x, unsigned from) { return take(x, from); }
template <class T>
DEVICE T shuffle_down(T x, unsigned by) {
  unsigned lane = threadIdx.x % 32;
  return take(x, lane + by < 32 ? lane + by : lane);
}
template <class T>
DEVICE T shuffle_up(T x, unsigned by) {
  unsigned lane = threadIdx.x % 32;
  return take(x, lane >= by ? lane - by : lane);
}
DEVICE unsigned warp_ballot(bool x) {
  unsigned mine = x, all = 0;
  const emu::Slot* slots = emu::meet(emu::Meeting::vote, &mine, 1);
  for (unsigned i = 0; i < 32; i++) all |= slots[i].words[0] << i;
  return all;
}
DEVICE bool warp_any(bool x) { return warp_ballot(x) != 0; }
DEVICE bool warp_all(bool x) { return warp_ballot(x) == 0xffffffffu; }
DEVICE int count_ones(unsigned x) { return __builtin_popcount(x); }
DEVICE int first_one(unsigned x) { return __builtin_ffs((int)x) - 1; }

DEVICE unsigned long long multiply_high(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
DEVICE int dot4(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
  return c;
}

// ---- tensor cores ----

namespace emu {

/// c += a * b for the fragments in the slots: words 0..4 are a, 4..6 b, 6..10 c.
template <class Half>
void multiply(Slot* slots) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < 32; lane++) {
    unsigned group = lane / 4, pair = 2 * (lane % 4);
    const unsigned* words = slots[lane].words;
    for (unsigned i = 0; i < 2; i++) {
      auto half = [&](unsigned word) { return to_float(Half{(unsigned short)(words[word] >> 16 * i)}); };
      a[group][pair + i] = half(0);
      a[group + 8][pair + i] = half(1);
      a[group][8 + pair + i] = half(2);
      a[group + 8][8 + pair + i] = half(3);
      b[pair + i][group] = half(4);
      b[8 + pair + i][group] = half(5);
    }
  }
  for (unsigned lane = 0; lane < 32; lane++) {
    for (unsigned i = 0; i < 4; i++) {
      unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = float_of_bits(slots[lane].words[6 + i]);
      for (unsigned k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      slots[lane].words[6 + i] = bits_of_float(sum);
    }
  }
}

template <class Half>
void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  unsigned mine[10] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(mine + 6, c, 16);
  const Slot* slots = meet(Meeting::multiply, mine, 10, &multiply<Half>);
  std::memcpy(c, slots[threadIdx.x % 32].words + 6, 16);
}

template <unsigned N>
void load_matrices(unsigned (&r)[N], const void* shared_row, bool transposed) {
  unsigned lane = threadIdx.x % 32;
  if (lane < 8 * N) check_aligned<16>(shared_row);
  const Slot* slots = meet(Meeting::matrices, &shared_row, 2);
  for (unsigned matrix = 0; matrix < N; matrix++) {
    unsigned short pair[2];
    for (unsigned i = 0; i < 2; i++) {
      unsigned row = transposed ? 2 * (lane % 4) + i : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + i;
      const unsigned short* values;
      std::memcpy(&values, &slots[8 * matrix + row], sizeof values);
      pair[i] = values[column];
    }
    r[matrix] = pair[0] | (unsigned)pair[1] << 16;
  }
}

}  // namespace emu

DEVICE void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emu::multiply<bf16>(c, a, b); }
DEVICE void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { emu::multiply<f16>(c, a, b); }
DEVICE void load_matrices4(unsigned (&r)[4], const void* row) { emu::load_matrices(r, row, false); }
DEVICE void load_matrices4_transposed(unsigned (&r)[4], const void* row) { emu::load_matrices(r, row, true); }
DEVICE void load_matrices2(unsigned (&r)[2], const void* row) { emu::load_matrices(r, row, false); }
DEVICE void load_matrices2_transposed(unsigned (&r)[2], const void* row) { emu::load_matrices(r, row, true); }
