//! Products with many rows (prefill): bf16 tiles of the output on the tensor cores, fed by a ring of asynchronous copies.
//
//     block    BM rows x BN features, 4 warps of 2 x 2        stage: BM x 64 B of activations, BN x 64 B of weights
//     ring     copy stage k + 3 ─> wait for stage k ─> fragments by 16-byte loads ─> mma          4 stages, one barrier each
//
// Rows are the left factor, weights the right one; see tiles.cuh for the order of the columns, thanks to which both lie in
// shared memory as they lie in global memory, in rows of 64 bytes, without conflicts.
#include "tiles.cuh"

constexpr unsigned STAGES = 4;
constexpr unsigned ROW_BYTES = 2 * TILE_COLS;

template <int BM, int BN>
DEVICE void tile_product(const Product& p, unsigned char* ring) {
  constexpr unsigned THREADS = 128, X_BYTES = BM * ROW_BYTES, STAGE_BYTES = X_BYTES + BN * ROW_BYTES;
  constexpr int MT = BM / 32, NT = BN / 32;  // 16-row tiles and 16-feature panels of a warp
  static_assert(BN * ROW_BYTES % (16 * THREADS) == 0 && X_BYTES % (16 * THREADS) == 0, "whole copies");
  const unsigned g = lane() / 4, t = lane() % 4;
  const unsigned row0 = blockIdx.x * BM, panel0 = blockIdx.y * (BN / TILE_ROWS);
  const unsigned warp_row = warp() % 2 * (BM / 2), warp_panel = warp() / 2 * NT;

  auto copy_stage = [&](unsigned block) {
    unsigned char* stage = ring + block % STAGES * STAGE_BYTES;
#pragma unroll
    for (unsigned i = 0; i < X_BYTES / 16 / THREADS; i++) {
      const unsigned at = i * THREADS + threadIdx.x, row = row0 + at / 4;
      const bool valid = row < p.rows;
      copy_async16(stage + 16 * at, p.x + (size_t)(valid ? row : 0) * p.x_stride + 32 * block + 8 * (at % 4), valid);
    }
#pragma unroll
    for (unsigned i = 0; i < BN * ROW_BYTES / 16 / THREADS; i++) {
      const unsigned at = i * THREADS + threadIdx.x, panel = panel0 + at / 64;
      const bool valid = panel < p.panels;
      const unsigned char* tile = p.tiles + ((size_t)(valid ? panel : 0) * p.blocks + block) * FormatBf16::BYTES;
      copy_async16(stage + X_BYTES + 16 * at, tile + 16 * (at % 64), valid);
    }
  };

#pragma unroll
  for (unsigned s = 0; s < STAGES - 1; s++) {
    if (s < p.blocks) copy_stage(s);
    copy_async_commit();
  }
  float acc[MT][2 * NT][4] = {};
  for (unsigned block = 0; block < p.blocks; block++) {
    copy_async_wait<STAGES - 2>();
    sync_threads();
    // All warps are done with the stage before this one: its place is free.
    if (block + STAGES - 1 < p.blocks) copy_stage(block + STAGES - 1);
    copy_async_commit();

    const unsigned char* stage = ring + block % STAGES * STAGE_BYTES;
    const unsigned char* x = stage + (warp_row + g) * ROW_BYTES + 16 * t;
    const unsigned char* w = stage + X_BYTES + warp_panel * FormatBf16::BYTES + 16 * lane();
    TileWords rows[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) rows[m] = {load16(x + m * 16 * ROW_BYTES), load16(x + (m * 16 + 8) * ROW_BYTES)};
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const TileWords weights = {load16(w + n * FormatBf16::BYTES), load16(w + n * FormatBf16::BYTES + 512)};
#pragma unroll
      for (int step = 0; step < 2; step++) {
        unsigned low[2], high[2];
        right_fragment(low, weights.low, step);
        right_fragment(high, weights.high, step);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          unsigned a[4];
          left_fragment(a, rows[m], step);
          mma_bf16(acc[m][2 * n], a, low);
          mma_bf16(acc[m][2 * n + 1], a, high);
        }
      }
    }
  }

  const bool gate = p.finish == GATE_SILU || p.finish == GATE_GELU;
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const unsigned panel = panel0 + warp_panel + n;
      if (panel >= p.panels) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const unsigned row = row0 + warp_row + 16 * m + 8 * h + g;
        if (row >= p.rows) continue;
        if (gate) {
          // Features 0 to 8 of a panel are the gates, the others belong to the same features' up.
          const unsigned feature = panel * 8 + 2 * t;
          float out[2];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float up = acc[m][2 * n + 1][2 * h + i], gates = acc[m][2 * n][2 * h + i];
            if (p.bias && feature + i < p.features) {
              gates += p.bias[feature + i];
              up += p.bias[p.up_bias + feature + i];
            }
            out[i] = gated(p.finish, gates, up);
          }
          bf16* to = reinterpret_cast<bf16*>(p.out) + (size_t)row * p.out_stride + p.out_first + feature;
          if (feature + 1 < p.features) {
            *reinterpret_cast<unsigned*>(to) = pack_bf16(out[0], out[1]);
          } else if (feature < p.features) {
            *to = to_bf16(out[0]);
          }
          continue;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const unsigned feature = panel * TILE_ROWS + 8 * half + 2 * t;
          float* to = reinterpret_cast<float*>(p.out) + (size_t)row * p.out_stride + p.out_first + feature;
          float value[2] = {acc[m][2 * n + half][2 * h], acc[m][2 * n + half][2 * h + 1]};
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if (p.bias && feature + i < p.features) value[i] += p.bias[feature + i];
          }
          if (feature + 1 < p.features && p.out_stride % 2 == 0 && p.out_first % 2 == 0) {
            float2* pair = reinterpret_cast<float2*>(to);
            if (p.finish == ADD) {
              const float2 old = *pair;
              value[0] += old.x;
              value[1] += old.y;
            }
            *pair = float2{value[0], value[1]};
          } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              if (feature + i < p.features) to[i] = p.finish == ADD ? to[i] + value[i] : value[i];
            }
          }
        }
      }
    }
  }
}

KERNEL(tile_128, 128)(Product p) {
  DYNAMIC_SHARED(unsigned char, ring);
  tile_product<128, 128>(p, ring);
}
EXPORT(tile_128)

KERNEL(tile_64, 128)(Product p) {
  DYNAMIC_SHARED(unsigned char, ring);
  tile_product<64, 64>(p, ring);
}
EXPORT(tile_64)

/// Turns `panels` panels of quants into bf16 tiles, for `tile_*`. One block for each tile, 64 threads.
template <class F>
DEVICE void expand(const unsigned char* tiles, const unsigned char* scales, unsigned char* out) {
  const size_t tile = blockIdx.x;
  float values[8];
  F::values(tiles + tile * F::BYTES, scales + tile * F::SCALE_BYTES, threadIdx.x / 4, threadIdx.x % 4, values);
  store16(out + tile * FormatBf16::BYTES + 16 * threadIdx.x, pack_bf16(values));
}

#define EXPAND(name, FORMAT)                                                                               \
  KERNEL(name, 64)(const unsigned char* tiles, const unsigned char* scales, unsigned char* out) { \
    expand<FORMAT>(tiles, scales, out);                                                                    \
  }                                                                                                        \
  EXPORT(name)
EXPAND(expand_q4, FormatQ4)
EXPAND(expand_q8, FormatQ8)
EXPAND(expand_q8h, FormatQ8Half)
