//! Attention of 16 query rows over the paged pool, a block of 32 positions at a time, on the tensor cores.
//
//     query rows   (token, head of one kv head's group) pairs: row r of a span is token r / group, head r % group
//     scores       Q [16, DIM] x K^T        column c of score tile n (8 columns) is position 8 (c / 2) + 2 n + c % 2 ...
//     result       P [16, 32]  x V          ... so the scores of two tiles are, as they lie, the left factor of one step
//
// `Flash` is the running softmax of one warp (Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135), in powers of
// two. A lane holds rows g and g + 8 of everything: index 0 and 1 below.
#pragma once
#include "kv.cuh"
#include "tiles.cuh"

/// The host has the same structs.
struct Attention {
  Pool pool;
  const float* qkv;
  /// Block tables of all spans.
  const unsigned* table;
  const struct Item* items;
  bf16* out;
  /// For pieces of a sequence: [slot][kv head][16 rows][DIM] sums, and [slot][kv head][16 rows] maxima and weights.
  float* partial;
  float2* partial_state;
  unsigned heads, head_dim, out_stride;
  /// Zero for none.
  float softcap;
  /// A position sees itself and the window - 1 before it; at most 2^31 - 1.
  unsigned window;
};

/// Work for one block (of threads) and each kv head.
struct Item {
  /// Span: first row of the batch, rows, position of the first row, where its block table begins.
  unsigned row0, rows, pos0, table0;
  /// First query row of this item.
  unsigned query0;
  /// Positions that this item covers, from a multiple of 32 on.
  unsigned begin, end;
  /// Where to leave its part of the result, or NO_SLOT when it is the whole.
  unsigned slot;
};
constexpr unsigned NO_SLOT = 0xffffffffu;

constexpr float LOG2_E = 1.44269504f;

/// Queries of 16 rows as left factors, in shared memory: 16 bytes for each chunk of 32 dimensions, step and lane.
template <int DIM>
DEVICE constexpr unsigned query_bytes() { return DIM / 32 * 2 * WARP * 16; }

/// Where query row `query` of an item's span is read and written; rows behind the last are not valid.
struct QueryRow {
  bool valid;
  unsigned token, head;
};
DEVICE QueryRow query_row(const Attention& p, const Item& item, unsigned kv_head, unsigned query) {
  const unsigned group = p.heads / p.pool.kv_heads, token = query / group;
  return {token < item.rows, token, kv_head * group + query % group};
}

/// One warp lays out the queries of rows query0 .. query0 + 16.
template <int DIM>
DEVICE void load_queries(const Attention& p, const Item& item, unsigned kv_head, unsigned query0, unsigned char* queries) {
  const unsigned g = lane() / 4, t = lane() % 4, cols = (p.heads + 2 * p.pool.kv_heads) * p.head_dim;
#pragma unroll
  for (int c = 0; c < DIM / 32; c++) {
    TileWords words = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const QueryRow row = query_row(p, item, kv_head, query0 + g + 8 * h);
      const unsigned dim = 32 * c + 8 * t;
      // A head is a multiple of 16 dimensions: eight are all there or none.
      if (row.valid && dim < p.head_dim) {
        const float* from = p.qkv + (size_t)(item.row0 + row.token) * cols + row.head * p.head_dim + dim;
        const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
        const float values[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        (h == 0 ? words.low : words.high) = pack_bf16(values);
      }
    }
#pragma unroll
    for (int step = 0; step < 2; step++) {
      unsigned a[4];
      left_fragment(a, words, step);
      store16(queries + ((2 * c + step) * WARP + lane()) * 16, Words4{a[0], a[1], a[2], a[3]});
    }
  }
  sync_warp();
}

/// Of WIDTH dimensions of the values: all, or a part where several warps share them.
template <int WIDTH>
struct Flash {
  float sums[WIDTH / 8][4] = {};
  /// In units of log2; the largest score so far and the sum of all weights relative to it.
  float largest[2] = {-INFINITY, -INFINITY};
  float weight[2] = {};
};

/// Positions that a lane's two rows see: position < end and position + window >= end.
struct Visible {
  unsigned end[2], window;
};
DEVICE Visible visible(const Attention& p, const Item& item, unsigned kv_head, unsigned query0) {
  Visible v;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const QueryRow row = query_row(p, item, kv_head, query0 + lane() / 4 + 8 * h);
    v.end[h] = row.valid ? item.pos0 + row.token + 1 : 0;
  }
  v.window = p.window;
  return v;
}

/// Chunks of keys that are read at a time: beside the sums, registers allow no more at 256 dimensions.
template <int DIM>
constexpr int KEYS_AHEAD = DIM <= 128 ? DIM / 32 : 1;

/// Takes the 32 positions from `position0` on into the softmax. `keys(c, key)` gives this lane's eight bf16 numbers of each of
/// the four score tiles, chunk c of 32 dimensions; `values(d)` those of 8 dimensions from 8 d on. `scales` are the factors of
/// both by position: those of keys go to the scores, those of values to the softmax weights.
template <int DIM, int WIDTH, class Keys, class Values, class Scales>
DEVICE void attend_block(Flash<WIDTH>& flash, const unsigned char* queries, unsigned position0, const Visible& see,
                         float softcap, const Keys& keys, const Values& values, const Scales& scales) {
  const unsigned t = lane() % 4;
  float scores[4][4] = {};
#pragma unroll(KEYS_AHEAD<DIM>)
  for (int c = 0; c < DIM / 32; c++) {
    Words4 key[4];
    keys(c, key);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const Words4 query = load16(queries + ((2 * c + step) * WARP + lane()) * 16);
      const unsigned a[4] = {query.w[0], query.w[1], query.w[2], query.w[3]};
#pragma unroll
      for (int n = 0; n < 4; n++) {
        unsigned b[2];
        right_fragment(b, key[n], step);
        mma_bf16(scores[n], a, b);
      }
    }
  }

  float largest[2] = {flash.largest[0], flash.largest[1]};
#pragma unroll
  for (int n = 0; n < 4; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const unsigned h = i / 2, position = position0 + 8 * t + 2 * n + i % 2;
      float score = scores[n][i] * scales.key(2 * n + i % 2);
      if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
      score *= LOG2_E;
      // As a difference, which is large when the position is behind the end.
      scores[n][i] = see.end[h] - 1 - position < see.window ? score : -INFINITY;
      largest[h] = fmaxf(largest[h], scores[n][i]);
    }
  }
  float base[2], shrink[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    largest[h] = fmaxf(largest[h], shuffle_xor(largest[h], 1));
    largest[h] = fmaxf(largest[h], shuffle_xor(largest[h], 2));
    // A row that has seen nothing yet keeps weights of zero and not of NaN.
    base[h] = largest[h] == -INFINITY ? 0.0f : largest[h];
    shrink[h] = fast_exp2(flash.largest[h] - base[h]);
    flash.largest[h] = largest[h];
    flash.weight[h] *= shrink[h];
  }
#pragma unroll
  for (int n = 0; n < 4; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      scores[n][i] = fast_exp2(scores[n][i] - base[i / 2]);
      // Of this lane's columns only; the four lanes of a row are added at the end.
      flash.weight[i / 2] += scores[n][i];
    }
  }
#pragma unroll
  for (int d = 0; d < WIDTH / 8; d++) {
#pragma unroll
    for (int i = 0; i < 4; i++) flash.sums[d][i] *= shrink[i / 2];
  }
  unsigned weights[2][4];
#pragma unroll
  for (int step = 0; step < 2; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = 2 * step + i / 2, first = i % 2 * 2;
      weights[step][i] = pack_bf16(scores[n][first] * scales.value(2 * n), scores[n][first + 1] * scales.value(2 * n + 1));
    }
  }
#pragma unroll
  for (int d = 0; d < WIDTH / 8; d++) {
    // At these widths registers run out when the compiler loads all values before it uses the first.
    if ((WIDTH > 128 || WIDTH == 96) && d % 4 == 0) sync_warp();
    const Words4 value = values(d);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      unsigned b[2];
      right_fragment(b, value, step);
      mma_bf16(flash.sums[d], weights[step], b);
    }
  }
}

/// The row's whole weight, in each of its lanes.
template <int WIDTH>
DEVICE void finish_weights(Flash<WIDTH>& flash) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    flash.weight[h] += shuffle_xor(flash.weight[h], 1);
    flash.weight[h] += shuffle_xor(flash.weight[h], 2);
  }
}
