//! Weight matrices as the kernels read them: tiles of 16 rows by 32 columns, and how a tile becomes tensor-core fragments.
//
//     matrix   [panel of 16 rows][block of 32 columns] tile        a panel is contiguous: a warp that walks it streams
//
//     lane = 4 g + t, g in 0..8, t in 0..4: rows g and g + 8, columns 8 t .. 8 t + 8
//     bf16   1024 B   row i: 64 bytes                              lane: 16 bytes of row g, 16 bytes of row g + 8
//     q4      256 B   lane: 4 bytes of row g, 4 of row g + 8       + 64 B: [g][row g, row g + 8] (scale, minimum) as halves
//     q8      512 B   lane: 8 bytes of row g, 8 of row g + 8       + 32 B: [g][row g, row g + 8] scale as a half
//     q8h     512 B   as q8                                        + 64 B: [g][columns 0..16, 16..32][row g, row g + 8]
//
// A q4 word holds its eight nibbles in the order 0 2 4 6 1 3 5 7 from the lowest bits, so that `word >> 4 i & 0x000f000f`
// is the pair of columns 2 i and 2 i + 1. Codes of q8 are biased by 128.
//
// The sum over columns may run in any order that both factors share. Within 32 columns it is taken as
//     k = 8 t + 4 step + 2 half + low      step: which m16n8k16, half: which register, low: which end of the word
// so one 16-byte access of eight neighbouring columns is the fragment of two steps, for weights and activations alike:
// no ldmatrix, no swizzle, and shared memory without bank conflicts because 8 lanes read 128 consecutive bytes.
#pragma once
#include "device.cuh"

constexpr unsigned TILE_ROWS = 16;
constexpr unsigned TILE_COLS = 32;
/// Quants become bf16 numbers above this one: in [128, 256) a bf16 counts in ones.
constexpr float Q4_BIAS = 128.0f;

/// Rows g and g + 8 of a tile, eight columns each, as bf16 pairs.
struct TileWords {
  Words4 low, high;
};

/// Both rows as the left factor (16 rows) of one step.
DEVICE void left_fragment(unsigned (&a)[4], const TileWords& tile, int step) {
  a[0] = tile.low.w[2 * step];
  a[1] = tile.high.w[2 * step];
  a[2] = tile.low.w[2 * step + 1];
  a[3] = tile.high.w[2 * step + 1];
}
/// One row per group as the right factor (8 columns) of one step.
DEVICE void right_fragment(unsigned (&b)[2], const Words4& row, int step) {
  b[0] = row.w[2 * step];
  b[1] = row.w[2 * step + 1];
}

/// Four bytes, biased by 128, as floats.
DEVICE void bytes_to_floats(unsigned word, float* out) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // 0x4b000000 is 2^23, where floats count in ones.
    out[i] = float_of_bits(0x4b000000u | ((word >> (8 * i)) & 0xffu)) - (8388608.0f + 128.0f);
  }
}

/// Each format says how large a tile is, how a lane loads its part (`Raw`), what its words are, and which factors are
/// applied after the product: a row's sum over the tile is `scale * product + shift * (sum of the activations)`.
struct FormatBf16 {
  static constexpr unsigned BYTES = 1024, SCALE_BYTES = 0;
  static constexpr bool SCALED = false, SHIFTED = false;
  struct Raw {
    Words4 low, high;
  };
  DEVICE static Raw load(const unsigned char* tile, const unsigned char*) {
    return {load16_stream(tile + 16 * lane()), load16_stream(tile + 512 + 16 * lane())};
  }
  DEVICE static TileWords words(const Raw& raw) { return {raw.low, raw.high}; }
  DEVICE static void factors(const Raw&, float (&)[2], float (&)[2]) {}
  /// Eight values of row `row` from column 8 `t` on.
  DEVICE static void values(const unsigned char* tile, const unsigned char*, unsigned row, unsigned t, float (&out)[8]) {
    unpack_bf16(load16(tile + 64 * row + 16 * t), out);
  }
};

/// `scale * q + minimum` for each 32: Q4_0, Q4_1, Q4_K.
struct FormatQ4 {
  static constexpr unsigned BYTES = 256, SCALE_BYTES = 64;
  static constexpr bool SCALED = true, SHIFTED = true;
  struct Raw {
    Words2 codes, scales;
  };
  DEVICE static Raw load(const unsigned char* tile, const unsigned char* scales) {
    return {load8_stream(tile + 8 * lane()), load8_stream(scales + 8 * (lane() / 4))};
  }
  DEVICE static TileWords words(const Raw& raw) {
    TileWords out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out.low.w[i] = ((raw.codes.w[0] >> (4 * i)) & 0x000f000fu) | 0x43004300u;
      out.high.w[i] = ((raw.codes.w[1] >> (4 * i)) & 0x000f000fu) | 0x43004300u;
    }
    return out;
  }
  DEVICE static void factors(const Raw& raw, float (&scale)[2], float (&shift)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float2 pair = unpack_f16(raw.scales.w[i]);
      scale[i] = pair.x;
      shift[i] = pair.y - Q4_BIAS * pair.x;
    }
  }
  DEVICE static void values(const unsigned char* tile, const unsigned char* scales, unsigned row, unsigned t,
                            float (&out)[8]) {
    unsigned g = row % 8, high = row / 8;
    unsigned codes = load8(tile + 8 * (4 * g + t)).w[high];
    float2 pair = unpack_f16(load8(scales + 8 * g).w[high]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[2 * i] = pair.x * (float)((codes >> (4 * i)) & 15u) + pair.y;
      out[2 * i + 1] = pair.x * (float)((codes >> (16 + 4 * i)) & 15u) + pair.y;
    }
  }
};

/// `scale * q` for each 32, q of 8 bits: Q8_0, and smaller types without a minimum.
struct FormatQ8 {
  static constexpr unsigned BYTES = 512, SCALE_BYTES = 32;
  static constexpr bool SCALED = true, SHIFTED = false;
  struct Raw {
    Words4 codes;
    unsigned scales;
  };
  DEVICE static Raw load(const unsigned char* tile, const unsigned char* scales) {
    return {load16_stream(tile + 16 * lane()), load4_stream(scales + 4 * (lane() / 4))};
  }
  DEVICE static void row_words(unsigned first, unsigned second, Words4& out) {
    float x[8];
    bytes_to_floats(first, x);
    bytes_to_floats(second, x + 4);
    out = pack_bf16(x);
  }
  DEVICE static TileWords words(const Raw& raw) {
    TileWords out;
    row_words(raw.codes.w[0], raw.codes.w[1], out.low);
    row_words(raw.codes.w[2], raw.codes.w[3], out.high);
    return out;
  }
  DEVICE static void factors(const Raw& raw, float (&scale)[2], float (&)[2]) {
    float2 pair = unpack_f16(raw.scales);
    scale[0] = pair.x;
    scale[1] = pair.y;
  }
  DEVICE static void values(const unsigned char* tile, const unsigned char* scales, unsigned row, unsigned t,
                            float (&out)[8]) {
    unsigned g = row % 8, high = row / 8;
    Words2 codes = load8(tile + 16 * (4 * g + t) + 8 * high);
    float scale = to_float(reinterpret_cast<const f16*>(scales)[2 * g + high]);
    bytes_to_floats(codes.w[0], out);
    bytes_to_floats(codes.w[1], out + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] *= scale;
  }
};

/// `scale * q` for each 16, q of 8 bits: Q6_K, Q3_K. The scale of a lane's eight columns is applied before the product and
/// the result rounded to bf16, since one step of it spans both halves.
struct FormatQ8Half {
  static constexpr unsigned BYTES = 512, SCALE_BYTES = 64;
  static constexpr bool SCALED = false, SHIFTED = false;
  struct Raw {
    Words4 codes;
    unsigned scales;
  };
  DEVICE static Raw load(const unsigned char* tile, const unsigned char* scales) {
    unsigned g = lane() / 4, half = lane() % 4 / 2;
    return {load16_stream(tile + 16 * lane()), load4_stream(scales + 8 * g + 4 * half)};
  }
  DEVICE static void row_words(unsigned first, unsigned second, float scale, Words4& out) {
    float x[8];
    bytes_to_floats(first, x);
    bytes_to_floats(second, x + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= scale;
    out = pack_bf16(x);
  }
  DEVICE static TileWords words(const Raw& raw) {
    TileWords out;
    float2 pair = unpack_f16(raw.scales);
    row_words(raw.codes.w[0], raw.codes.w[1], pair.x, out.low);
    row_words(raw.codes.w[2], raw.codes.w[3], pair.y, out.high);
    return out;
  }
  DEVICE static void factors(const Raw&, float (&)[2], float (&)[2]) {}
  DEVICE static void values(const unsigned char* tile, const unsigned char* scales, unsigned row, unsigned t,
                            float (&out)[8]) {
    unsigned g = row % 8, high = row / 8;
    Words2 codes = load8(tile + 16 * (4 * g + t) + 8 * high);
    float scale = to_float(reinterpret_cast<const f16*>(scales)[4 * g + 2 * (t / 2) + high]);
    bytes_to_floats(codes.w[0], out);
    bytes_to_floats(codes.w[1], out + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] *= scale;
  }
};

/// What is done with a product. The numbers are those of `Finish` on the host.
enum Finish : unsigned { STORE = 0, ADD = 1, GATE_SILU = 2, GATE_GELU = 3, ARGMAX = 4 };

/// Rows of one format of a weight matrix, times activations. The host has the same struct.
struct Product {
  const unsigned char* tiles;
  const unsigned char* scales;
  /// For these features; of a gated product up's follow `up_bias` behind the gate's. Null without one.
  const float* bias;
  /// [rows, x_stride] bf16; x_stride is a multiple of 32 and columns past the matrix's are zero.
  const bf16* x;
  /// STORE, ADD: f32 [rows, out_stride] at column out_first. GATE_*: bf16 likewise. ARGMAX: float values
  /// [rows, out_stride] at column out_first, one for each panel, and behind `index` their features.
  void* out;
  unsigned* index;
  unsigned x_stride, rows, panels, blocks, features, out_stride, out_first, finish;
  /// Feature of the first row, for ARGMAX.
  unsigned first_feature;
  unsigned up_bias;
};

/// f(gate) * up
DEVICE float gated(unsigned finish, float gate, float up) {
  if (finish == GATE_SILU) return gate / (1.0f + fast_exp(-gate)) * up;
  // x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
  float inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
  return 0.5f * gate * (1.0f + tanhf(inner)) * up;
}
