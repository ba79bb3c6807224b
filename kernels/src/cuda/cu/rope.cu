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

template <class Kv>
DEVICE void turn_and_store(const RopeStore& p) {
  const unsigned row = blockIdx.x, position = p.positions[row];
  const unsigned head = blockIdx.y * ROPE_WARPS + warp(), kv_heads = p.pool.kv_heads;
  if (position == NO_POSITION || head >= p.heads + 2 * kv_heads) return;
  const unsigned place = p.places[row], slot = place % KV_BLOCK;
  float* x = p.qkv + ((size_t)row * (p.heads + 2 * kv_heads) + head) * p.head_dim;

  if (head >= p.heads + kv_heads) {
    float largest = 0.0f;
    for (unsigned d = lane(); d < p.head_dim; d += WARP) largest = fmaxf(largest, fabsf(x[d]));
    unsigned char* to = head_of_block<Kv>(p.pool, p.pool.dim, place / KV_BLOCK, head - p.heads - kv_heads);
    const typename Kv::Writer writer(to, p.pool.dim, slot, 1, largest);
    for (unsigned d = lane(); d < p.head_dim; d += WARP) writer.value(d, x[d]);
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
  if (query) {
#pragma unroll
    for (unsigned i = 0; i < LANE_PAIRS; i++) {
      if (lane() + i * WARP >= all_pairs) continue;
      x[first_at[i]] = first[i] * p.query_scale;
      x[second_at[i]] = second[i] * p.query_scale;
    }
    return;
  }
  float largest = 0.0f;
#pragma unroll
  for (unsigned i = 0; i < LANE_PAIRS; i++) {
    if (lane() + i * WARP < all_pairs) largest = fmaxf(largest, fmaxf(fabsf(first[i]), fabsf(second[i])));
  }
  unsigned char* to = head_of_block<Kv>(p.pool, p.pool.dim, place / KV_BLOCK, head - p.heads);
  const typename Kv::Writer writer(to, p.pool.dim, slot, 0, largest);
#pragma unroll
  for (unsigned i = 0; i < LANE_PAIRS; i++) {
    if (lane() + i * WARP >= all_pairs) continue;
    writer.key(first_at[i], first[i]);
    writer.key(second_at[i], second[i]);
  }
}

KERNEL(rope_store, 128)(RopeStore p) { turn_and_store<KvBf16>(p); }
EXPORT(rope_store)
KERNEL(rope_store_fp8, 128)(RopeStore p) { turn_and_store<KvFp8>(p); }
EXPORT(rope_store_fp8)
