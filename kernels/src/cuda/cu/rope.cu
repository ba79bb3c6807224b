//! Norm and rotation of queries and keys, and the write of keys and values into the paged pool; one warp for each head.
//
//     row of qkv   [ q heads          | k heads         | v heads ]    f32
//                    norm, turn,        norm, turn        |
//                    scale, in place    -> K of its block -> V of its block
#include "kv.cuh"

/// The host has the same struct.
struct RopeStore {
  Pool pool;
  float* qkv;
  /// Position of each row and its place block * 32 + slot, or NO_POSITION for a row of no sequence.
  const unsigned* positions;
  const unsigned* places;
  /// [position][cosines | sines], `pairs` of each.
  const float* table;
  /// Norm weights [head_dim], or null.
  const float* q_norm;
  const float* k_norm;
  unsigned heads, head_dim, pairs, interleaved;
  float query_scale, eps;
};

constexpr unsigned ROPE_WARPS = 4;
/// Pairs of dimensions that a lane holds: heads of up to 256 dimensions.
constexpr unsigned LANE_PAIRS = 4;

DEVICE bf16 finite_bf16(float x) {
  // The largest finite bf16; what is not a number becomes its negative.
  const float largest = float_of_bits(0x7f7f0000u);
  return to_bf16(fmaxf(fminf(x, largest), -largest));
}

KERNEL(rope_store, 128)(RopeStore p) {
  const unsigned row = blockIdx.x, position = p.positions[row];
  const unsigned head = blockIdx.y * ROPE_WARPS + warp(), kv_heads = p.pool.kv_heads;
  if (position == NO_POSITION || head >= p.heads + 2 * kv_heads) return;
  const unsigned place = p.places[row], slot = place % KV_BLOCK;
  float* x = p.qkv + ((size_t)row * (p.heads + 2 * kv_heads) + head) * p.head_dim;

  if (head >= p.heads + kv_heads) {
    bf16* values = head_of_block(p.pool, place / KV_BLOCK, head - p.heads - kv_heads) + KV_BLOCK * p.pool.dim;
    for (unsigned d = lane(); d < p.head_dim; d += WARP) values[d * KV_BLOCK + slot] = finite_bf16(x[d]);
    return;
  }
  // Pair i of the head: dimensions that turn together, or two neighbours behind the rotary ones.
  float first[LANE_PAIRS], second[LANE_PAIRS];
  unsigned first_at[LANE_PAIRS], second_at[LANE_PAIRS];
  const unsigned all_pairs = p.head_dim / 2;
  float squares = 0.0f;
#pragma unroll
  for (unsigned i = 0; i < LANE_PAIRS; i++) {
    const unsigned pair = lane() + i * WARP;
    const bool halves = !p.interleaved && pair < p.pairs;
    first_at[i] = halves ? pair : 2 * pair;
    second_at[i] = halves ? pair + p.pairs : 2 * pair + 1;
    if (pair < all_pairs) {
      first[i] = x[first_at[i]];
      second[i] = x[second_at[i]];
      squares += first[i] * first[i] + second[i] * second[i];
    }
  }
  const bool query = head < p.heads;
  const float* norm = query ? p.q_norm : p.k_norm;
  if (norm) {
    const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)p.head_dim + p.eps);
#pragma unroll
    for (unsigned i = 0; i < LANE_PAIRS; i++) {
      if (lane() + i * WARP < all_pairs) {
        first[i] *= scale * norm[first_at[i]];
        second[i] *= scale * norm[second_at[i]];
      }
    }
  }
  const float* cosines = p.table + (size_t)position * 2 * p.pairs;
#pragma unroll
  for (unsigned i = 0; i < LANE_PAIRS; i++) {
    const unsigned pair = lane() + i * WARP;
    if (pair < p.pairs) {
      const float cos = cosines[pair], sin = cosines[p.pairs + pair], a = first[i], b = second[i];
      first[i] = a * cos - b * sin;
      second[i] = b * cos + a * sin;
    }
  }
  bf16* keys = query ? nullptr : head_of_block(p.pool, place / KV_BLOCK, head - p.heads) + slot * p.pool.dim;
#pragma unroll
  for (unsigned i = 0; i < LANE_PAIRS; i++) {
    if (lane() + i * WARP >= all_pairs) continue;
    if (query) {
      x[first_at[i]] = first[i] * p.query_scale;
      x[second_at[i]] = second[i] * p.query_scale;
    } else {
      keys[first_at[i]] = finite_bf16(first[i]);
      keys[second_at[i]] = finite_bf16(second[i]);
    }
  }
}
EXPORT(rope_store)
