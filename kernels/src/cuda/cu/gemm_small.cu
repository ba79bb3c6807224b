//! Products with few rows (decoding): a block reads one or two panels of weights once and multiplies them with all rows.
//
//     block   panel(s) of 16 features; its 8 warps share the columns, a run of blocks of 32 each
//     warp    weights: global memory ──16 B a lane, the next ones under way──> registers = left factor
//             rows:    L1/L2 ──16 B a lane──> registers = right factor, 8 rows to an mma
//     end     the 8 warps' sums meet in shared memory, are added in a fixed order, and leave through `finish`
//
// Weights never pass through shared memory: the tile layout is the fragment layout, so the tensor cores cost next to
// nothing and the kernel runs at the speed of memory. Where a warp's columns begin depends on the matrix alone, so a row's
// bits do not depend on the other rows.
#include "tiles.cuh"

constexpr unsigned SMALL_WARPS = 8;

/// NT: groups of 8 rows; P: panels of a block.
template <class F, int NT, int P>
DEVICE void small_product(const Product& p, float* sums) {
  // Tiles of a panel that are under way: 4 KiB a warp, or 2 KiB where the sums need the registers.
  constexpr int DEPTH = (F::BYTES < 1024 && NT <= 2 ? 8 : 4) / P;
  const unsigned g = lane() / 4, t = lane() % 4;
  const unsigned panel0 = blockIdx.x * P, row0 = blockIdx.y * NT * 8;
  const unsigned begin = p.blocks * warp() / SMALL_WARPS, end = p.blocks * (warp() + 1) / SMALL_WARPS;

  // Past the last panel a block repeats it and keeps the result to itself.
  const unsigned char *tiles[P], *scales[P];
#pragma unroll
  for (int i = 0; i < P; i++) {
    size_t panel = panel0 + i < p.panels ? panel0 + i : p.panels - 1;
    tiles[i] = p.tiles + panel * p.blocks * F::BYTES;
    scales[i] = p.scales + panel * p.blocks * F::SCALE_BYTES;
  }
  const bf16* x = p.x + (size_t)(row0 + g) * p.x_stride + 8 * t;

  float acc[P][NT][4] = {};
  typename F::Raw next[DEPTH][P];
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    if (begin + d < end) {
#pragma unroll
      for (int i = 0; i < P; i++) {
        size_t at = begin + d;
        next[d][i] = F::load(tiles[i] + at * F::BYTES, scales[i] + at * F::SCALE_BYTES);
      }
    }
  }
  for (unsigned block = begin; block < end; block += DEPTH) {
    typename F::Raw raw[DEPTH][P];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
#pragma unroll
      for (int i = 0; i < P; i++) raw[d][i] = next[d][i];
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (block + DEPTH + d < end) {
#pragma unroll
        for (int i = 0; i < P; i++) {
          size_t at = block + DEPTH + d;
          next[d][i] = F::load(tiles[i] + at * F::BYTES, scales[i] + at * F::SCALE_BYTES);
        }
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      if (block + d >= end) break;
      TileWords weights[P];
#pragma unroll
      for (int i = 0; i < P; i++) weights[i] = F::words(raw[d][i]);
      float scale[P][2], shift[P][2];
#pragma unroll
      for (int i = 0; i < P; i++) F::factors(raw[d][i], scale[i], shift[i]);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        Words4 row = {};
        if (row0 + 8 * n + g < p.rows) row = load16(x + (size_t)n * 8 * p.x_stride + 32 * (block + d));
        unsigned b[2][2];
        right_fragment(b[0], row, 0);
        right_fragment(b[1], row, 1);
        // The activations' sum over these columns, as a product with ones (1.0 as bf16 is 0x3f80).
        float total[4] = {};
        if constexpr (F::SHIFTED) {
          const unsigned ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
          mma_bf16(total, ones, b[0]);
          mma_bf16(total, ones, b[1]);
        }
#pragma unroll
        for (int i = 0; i < P; i++) {
          unsigned a[4];
          if constexpr (F::SCALED) {
            float product[4] = {};
            left_fragment(a, weights[i], 0);
            mma_bf16(product, a, b[0]);
            left_fragment(a, weights[i], 1);
            mma_bf16(product, a, b[1]);
#pragma unroll
            for (int c = 0; c < 4; c++) {
              acc[i][n][c] += scale[i][c / 2] * product[c];
              if constexpr (F::SHIFTED) acc[i][n][c] += shift[i][c / 2] * total[c];
            }
          } else {
            left_fragment(a, weights[i], 0);
            mma_bf16(acc[i][n], a, b[0]);
            left_fragment(a, weights[i], 1);
            mma_bf16(acc[i][n], a, b[1]);
          }
        }
      }
    }
  }

  // sums: [warp][n][c][lane]
#pragma unroll
  for (int i = 0; i < P; i++) {
    if (i > 0) sync_threads();
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int c = 0; c < 4; c++) sums[((warp() * NT + n) * 4 + c) * WARP + lane()] = acc[i][n][c];
    }
    sync_threads();
    const unsigned panel = panel0 + i;
    if (panel >= p.panels) return;
    // A warp takes one group of rows and one of each lane's two: row 2 t + odd, features g and g + 8.
    for (unsigned task = warp(); task < 2 * NT; task += SMALL_WARPS) {
      const unsigned n = task / 2, odd = task % 2, row = row0 + 8 * n + 2 * t + odd;
      float value[2] = {};
#pragma unroll
      for (unsigned w = 0; w < SMALL_WARPS; w++) {
        value[0] += sums[((w * NT + n) * 4 + odd) * WARP + lane()];
        value[1] += sums[((w * NT + n) * 4 + 2 + odd) * WARP + lane()];
      }
      if (p.finish == GATE_SILU || p.finish == GATE_GELU) {
        const unsigned feature = panel * 8 + g;
        if (row < p.rows && feature < p.features) {
          if (p.bias) {
            value[0] += p.bias[feature];
            value[1] += p.bias[p.up_bias + feature];
          }
          bf16* out = reinterpret_cast<bf16*>(p.out) + (size_t)row * p.out_stride + p.out_first + feature;
          *out = to_bf16(gated(p.finish, value[0], value[1]));
        }
        continue;
      }
      float best = -INFINITY;
      unsigned best_feature = 0xffffffffu;
#pragma unroll
      for (unsigned h = 0; h < 2; h++) {
        const unsigned feature = panel * TILE_ROWS + g + 8 * h;
        if (feature >= p.features) continue;
        if (p.bias) value[h] += p.bias[feature];
        if (p.finish == ARGMAX) {
          // What is not a number never wins.
          if (value[h] > best || h == 0) best_feature = p.first_feature + feature;
          if (value[h] > best) best = value[h];
        } else if (row < p.rows) {
          float* out = reinterpret_cast<float*>(p.out) + (size_t)row * p.out_stride + p.out_first + feature;
          *out = p.finish == ADD ? *out + value[h] : value[h];
        }
      }
      if (p.finish == ARGMAX) {
        // Over the eight groups; the lowest feature among equals.
#pragma unroll
        for (unsigned step = 4; step < WARP; step *= 2) {
          float other = shuffle_xor(best, step);
          unsigned feature = shuffle_xor(best_feature, step);
          if (other > best || (other == best && feature < best_feature)) {
            best = other;
            best_feature = feature;
          }
        }
        if (g == 0 && row < p.rows) {
          size_t at = (size_t)row * p.out_stride + p.out_first + panel;
          reinterpret_cast<float*>(p.out)[at] = best;
          p.index[at] = best_feature;
        }
      }
    }
  }
}

#define SMALL(name, FORMAT, NT, P)                              \
  KERNEL(name, 256)(Product p) {                                \
    SHARED(float, sums, SMALL_WARPS * NT * 4 * WARP);           \
    small_product<FORMAT, NT, P>(p, sums);                      \
  }                                                             \
  EXPORT(name)
#define SMALL_ALL(prefix, FORMAT)         \
  SMALL(prefix##_8_1, FORMAT, 1, 1)       \
  SMALL(prefix##_16_1, FORMAT, 2, 1)      \
  SMALL(prefix##_32_1, FORMAT, 4, 1)      \
  SMALL(prefix##_64_1, FORMAT, 8, 1)      \
  SMALL(prefix##_64_2, FORMAT, 8, 2)

SMALL_ALL(small_bf16, FormatBf16)
SMALL_ALL(small_q4, FormatQ4)
SMALL_ALL(small_q8, FormatQ8)
SMALL_ALL(small_q8h, FormatQ8Half)
