//! The paged pool on the device, in its two formats, and the batch's tables that every layer reads.
//
//     pool    [block][layer][kv head]     32 positions to a block
//     bf16    K: position x DIM | V: DIM x position
//     fp8     K: [32 dimensions][2][lane][2][8] | V: [16 dimensions][lane][2][8] | e of 32 keys | e of 32 values     (fp8.cuh)
//
// DIM is the head's dimension rounded up to a width that has a kernel; the dimensions behind the head's own are zero. The
// values are stored transposed, so that both products of attention read fragments of neighbouring bytes (tiles.cuh). As bytes
// the fragments of two tiles lie together, in the order of lanes, so that a load is 16 bytes and a warp's 512 again.
// Everything in the pool is finite: it starts as zeros and writes are clamped, so a position behind the end of a sequence
// takes part with a weight of zero and needs no mask on its values.
#pragma once
#include "fp8.cuh"

constexpr unsigned KV_BLOCK = 32;
constexpr unsigned NO_POSITION = 0xffffffffu;

/// The host has the same struct.
struct Pool {
  unsigned char* values;
  unsigned layers, layer, kv_heads;
  /// DIM above.
  unsigned dim;
};

/// Each format says how large a head's part of a block is, where a lane finds what it multiplies, by what the products are
/// scaled, and how the key or value of one position is written.
struct KvBf16 {
  /// Score tiles, or groups of 8 dimensions of the values, in the 16 bytes that a lane loads.
  static constexpr int TILES = 1;
  DEVICE static constexpr unsigned bytes(unsigned dim) { return 2 * KV_BLOCK * dim * 2; }
  /// Where the values begin.
  DEVICE static constexpr unsigned values(unsigned dim) { return KV_BLOCK * dim * 2; }

  /// This lane's 16 bytes of keys: where they begin, and from there score tile n, chunk c of 32 dimensions.
  template <int DIM>
  DEVICE static unsigned keys() {
    const unsigned g = lane() / 4, t = lane() % 4;
    return ((8 * (g / 2) + g % 2) * DIM + 8 * t) * 2;
  }
  template <int DIM>
  DEVICE static constexpr unsigned key(int n, int c) { return (2 * n * DIM + 32 * c) * 2; }
  /// The bf16 fragment of a load's tile.
  DEVICE static Words4 tile(const Words4& loaded, int) { return loaded; }

  /// Factors of this lane's eight positions 8 t .. 8 t + 8.
  struct Scales {
    template <class Load>
    DEVICE static Scales load(const Load&) { return {}; }
    DEVICE float key(int) const { return 1.0f; }
    DEVICE float value(int) const { return 1.0f; }
  };

  /// Writes the key (part 0) or value (part 1) of a head at a position; every lane of the warp comes with its largest size.
  struct Writer {
    bf16* head;
    unsigned dim, slot;
    DEVICE Writer(unsigned char* head, unsigned dim, unsigned slot, unsigned, float)
        : head(reinterpret_cast<bf16*>(head)), dim(dim), slot(slot) {}
    DEVICE static bf16 finite(float x) {
      // The largest finite bf16, which is also what something that is not a number becomes.
      const float largest = float_of_bits(0x7f7f0000u);
      return to_bf16(fmaxf(fminf(x, largest), -largest));
    }
    DEVICE void key(unsigned d, float x) const { head[slot * dim + d] = finite(x); }
    DEVICE void value(unsigned d, float x) const { head[KV_BLOCK * dim + d * KV_BLOCK + slot] = finite(x); }
  };
};

struct KvFp8 {
  static constexpr int TILES = 2;
  DEVICE static constexpr unsigned bytes(unsigned dim) { return 2 * KV_BLOCK * dim + 2 * KV_BLOCK; }
  DEVICE static constexpr unsigned values(unsigned dim) { return KV_BLOCK * dim; }
  DEVICE static constexpr unsigned exponents(unsigned dim) { return 2 * KV_BLOCK * dim; }

  template <int DIM>
  DEVICE static unsigned keys() { return 16 * lane(); }
  template <int DIM>
  DEVICE static constexpr unsigned key(int n, int c) { return (2 * c + n / TILES) * WARP * 16; }
  DEVICE static Words4 tile(const Words4& loaded, int i) { return e4m3_words(loaded.w[2 * i], loaded.w[2 * i + 1]); }

  struct Scales {
    Words2 keys, values;
    /// `load(at)` gives the 8 bytes at this offset of the exponents.
    template <class Load>
    DEVICE static Scales load(const Load& load) {
      const unsigned t = lane() % 4;
      return {load(8 * t), load(KV_BLOCK + 8 * t)};
    }
    DEVICE float key(int i) const { return exponent_scale(keys.w[i / 4] >> (8 * (i % 4)) & 0xffu); }
    DEVICE float value(int i) const { return exponent_scale(values.w[i / 4] >> (8 * (i % 4)) & 0xffu); }
  };

  struct Writer {
    unsigned char* head;
    unsigned dim, slot;
    float inverse;
    DEVICE Writer(unsigned char* head, unsigned dim, unsigned slot, unsigned part, float largest)
        : head(head), dim(dim), slot(slot) {
      const unsigned exponent = shared_exponent(warp_max(largest));
      inverse = exponent_inverse(exponent);
      if (lane() == 0) head[exponents(dim) + part * KV_BLOCK + slot] = (unsigned char)exponent;
    }
    DEVICE void key(unsigned d, float x) const {
      const unsigned g = slot / 8 * 2 + slot % 2, t = d % 32 / 8, n = slot % 8 / 2;
      put(((d / 32 * 2 + n / 2) * WARP + 4 * g + t) * 16 + n % 2 * 8 + e4m3_byte(d % 8), x);
    }
    DEVICE void value(unsigned d, float x) const {
      const unsigned g = d % 8, t = slot / 8;
      put(values(dim) + (d / 16 * WARP + 4 * g + t) * 16 + d % 16 / 8 * 8 + e4m3_byte(slot % 8), x);
    }
    DEVICE void put(unsigned at, float x) const { head[at] = (unsigned char)e4m3_of(x * inverse); }
  };
};

/// One head's part of a block; `dim` is the pool's.
template <class Kv>
DEVICE unsigned char* head_of_block(const Pool& pool, unsigned dim, unsigned block, unsigned kv_head) {
  const size_t heads = ((size_t)block * pool.layers + pool.layer) * pool.kv_heads + kv_head;
  return pool.values + heads * Kv::bytes(dim);
}
