//! Attention of few rows over long sequences (decoding): bound by reading the pool, so a block takes a piece of one sequence.
//
//     grid     (item, kv head)       item: 16 query rows of a span x up to 256 positions
//     block    4 warps, which take the piece's blocks of 32 positions in turn, straight from global memory to registers
//     end      the warps' softmaxes meet in shared memory in a fixed order; then bf16 rows, or one part for `attention_merge`
//
// Pieces begin at multiples of 256 positions, whoever else is in the batch.
#include "attention.cuh"

constexpr unsigned DECODE_WARPS = 4;

template <class Kv, int DIM>
DEVICE void decode(const Attention& p, unsigned char* queries, float* sums, float* states) {
  const Item item = p.items[blockIdx.x];
  const unsigned kv_head = blockIdx.y, g = lane() / 4, t = lane() % 4;
  if (warp() == 0) load_queries<DIM>(p, item, kv_head, item.query0, queries);
  sync_threads();

  const Visible see = visible(p, item, kv_head, item.query0);
  // At 256 dimensions two warps take the same positions, each with half of the values: registers hold no more sums.
  constexpr unsigned PARTS = DIM <= 128 ? 1 : 2, TEAMS = DECODE_WARPS / PARTS;
  constexpr int WIDTH = DIM / PARTS;
  const unsigned part = warp() % PARTS, team = warp() / PARTS;
  Flash<WIDTH> flash;
  for (unsigned position = item.begin + team * KV_BLOCK; position < item.end; position += TEAMS * KV_BLOCK) {
    const unsigned char* head = head_of_block<Kv>(p.pool, DIM, p.table[item.table0 + position / KV_BLOCK], kv_head);
    const unsigned char* keys = head + Kv::template keys<DIM>();
    const unsigned char* values = head + Kv::values(DIM) + part * (Kv::values(DIM) / PARTS) + 16 * lane();
    // The values are on their way while the scores are computed.
    Words4 ahead[WIDTH / 8 / Kv::TILES];
#pragma unroll
    for (int d = 0; d < WIDTH / 8 / Kv::TILES; d++) ahead[d] = load16_stream(values + 16 * WARP * d);
    const auto scales = Kv::Scales::load([&](unsigned at) { return load8_stream(head + Kv::bytes(DIM) - 2 * KV_BLOCK + at); });
    attend_block<DIM>(
        flash, queries, position, see, p.softcap,
        [&](int c, Words4(&key)[4]) {
#pragma unroll
          for (int n = 0; n < 4; n += Kv::TILES) {
            const Words4 loaded = load16_stream(keys + Kv::template key<DIM>(n, c));
#pragma unroll
            for (int i = 0; i < Kv::TILES; i++) key[n + i] = Kv::tile(loaded, i);
          }
        },
        [&](int d) { return Kv::tile(ahead[d / Kv::TILES], d % Kv::TILES); }, scales);
  }
  finish_weights(flash);

  // states: [warp][16 rows] (largest, weight); sums: [16][DIM]
  float2* state = reinterpret_cast<float2*>(states);
  if (t == 0) {
    state[warp() * 16 + g] = float2{flash.largest[0], flash.weight[0]};
    state[warp() * 16 + g + 8] = float2{flash.largest[1], flash.weight[1]};
  }
  sync_threads();
  float largest[2] = {-INFINITY, -INFINITY}, weight[2] = {}, scale[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (unsigned w = part; w < DECODE_WARPS; w += PARTS) largest[h] = fmaxf(largest[h], state[w * 16 + g + 8 * h].x);
    const float base = largest[h] == -INFINITY ? 0.0f : largest[h];
#pragma unroll
    for (unsigned w = part; w < DECODE_WARPS; w += PARTS) {
      const float2 other = state[w * 16 + g + 8 * h];
      weight[h] += fast_exp2(other.x - base) * other.y;
    }
    scale[h] = fast_exp2(flash.largest[h] - base);
  }
  for (unsigned turn = 0; turn < TEAMS; turn++) {
    if (turn == team) {
#pragma unroll
      for (int d = 0; d < WIDTH / 8; d++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float2* to = reinterpret_cast<float2*>(sums + (g + 8 * h) * DIM + part * WIDTH + 8 * d + 2 * t);
          const float2 old = turn == 0 ? float2{0.0f, 0.0f} : *to;
          *to = float2{old.x + scale[h] * flash.sums[d][2 * h], old.y + scale[h] * flash.sums[d][2 * h + 1]};
        }
      }
    }
    sync_threads();
  }
  // The state of the whole item, where its rows are written from.
  if (warp() == 0 && t == 0) {
    state[g] = float2{largest[0], weight[0]};
    state[g + 8] = float2{largest[1], weight[1]};
  }
  sync_threads();

  for (unsigned at = threadIdx.x; at < 16 * DIM / 4; at += DECODE_WARPS * WARP) {
    const unsigned r = at / (DIM / 4), dim = at % (DIM / 4) * 4;
    const float4 sum = reinterpret_cast<const float4*>(sums)[at];
    const float2 whole = state[r];
    const QueryRow row = query_row(p, item, kv_head, item.query0 + r);
    if (!row.valid) continue;
    if (item.slot == NO_SLOT) {
      if (dim < p.head_dim) {
        const float scale = 1.0f / whole.y;
        Words2 words;
        words.w[0] = pack_bf16(sum.x * scale, sum.y * scale);
        words.w[1] = pack_bf16(sum.z * scale, sum.w * scale);
        store8(p.out + (size_t)(item.row0 + row.token) * p.out_stride + row.head * p.head_dim + dim, words);
      }
    } else {
      const size_t slot = (size_t)item.slot * p.pool.kv_heads + kv_head;
      reinterpret_cast<float4*>(p.partial)[slot * (16 * DIM / 4) + at] = sum;
      if (dim == 0) p.partial_state[slot * 16 + r] = whole;
    }
  }
}

#define DECODE(name, Kv, DIM)                                   \
  KERNEL(name, 128)(Attention p) {                              \
    SHARED(unsigned char, queries, (DIM / 32 * 2 * WARP * 16)); \
    SHARED(float, sums, 16 * DIM);                              \
    SHARED(float, states, DECODE_WARPS * 16 * 2);               \
    decode<Kv, DIM>(p, queries, sums, states);                  \
  }                                                             \
  EXPORT(name)
DECODE(decode_32, KvBf16, 32)
DECODE(decode_64, KvBf16, 64)
DECODE(decode_96, KvBf16, 96)
DECODE(decode_128, KvBf16, 128)
DECODE(decode_256, KvBf16, 256)
DECODE(decode_fp8_32, KvFp8, 32)
DECODE(decode_fp8_64, KvFp8, 64)
DECODE(decode_fp8_96, KvFp8, 96)
DECODE(decode_fp8_128, KvFp8, 128)
DECODE(decode_fp8_256, KvFp8, 256)

/// Puts the pieces of sequences together: grid (merge, kv head), a block for 16 query rows. `items` are the merges: `slot`
/// the first of the pieces' slots, `end` their number.
KERNEL(attention_merge, 128)(Attention p) {
  const Item item = p.items[blockIdx.x];
  const unsigned kv_head = blockIdx.y, dims = p.pool.dim;
  for (unsigned at = threadIdx.x; at < 16 * dims / 4; at += blockDim.x) {
    const unsigned r = at / (dims / 4), dim = at % (dims / 4) * 4;
    const QueryRow row = query_row(p, item, kv_head, item.query0 + r);
    if (!row.valid || dim >= p.head_dim) continue;
    float largest = -INFINITY;
    for (unsigned piece = 0; piece < item.end; piece++) {
      const size_t slot = (size_t)(item.slot + piece) * p.pool.kv_heads + kv_head;
      largest = fmaxf(largest, p.partial_state[slot * 16 + r].x);
    }
    float weight = 0.0f;
    float4 sum = {};
    for (unsigned piece = 0; piece < item.end; piece++) {
      const size_t slot = (size_t)(item.slot + piece) * p.pool.kv_heads + kv_head;
      const float2 state = p.partial_state[slot * 16 + r];
      const float scale = fast_exp2(state.x - largest);
      const float4 part = reinterpret_cast<const float4*>(p.partial)[slot * (16 * dims / 4) + at];
      weight += scale * state.y;
      sum.x += scale * part.x;
      sum.y += scale * part.y;
      sum.z += scale * part.z;
      sum.w += scale * part.w;
    }
    const float scale = 1.0f / weight;
    Words2 words;
    words.w[0] = pack_bf16(sum.x * scale, sum.y * scale);
    words.w[1] = pack_bf16(sum.z * scale, sum.w * scale);
    store8(p.out + (size_t)(item.row0 + row.token) * p.out_stride + row.head * p.head_dim + dim, words);
  }
}
EXPORT(attention_merge)
