//! Attention of many rows (prefill): 64 query rows share each block of the pool through a ring in shared memory.
//
//     grid     (item, kv head)      item: 64 query rows of a span, all the positions that they see
//     block    4 warps of 16 query rows; ring of 2 or 3 stages, each the keys and values of 32 positions
//     fp8      the warps make a stage bf16 together, behind the ring, so that each byte is converted once for all rows
//
// Keys in bf16 lie in rows of DIM. A quarter of a warp reads 64 bytes each of two neighbouring rows, which fall on the same
// banks when a row is a multiple of 128 bytes: there, odd rows swap the halves of every 128 bytes. What was made of bytes lies
// in the order of lanes.
#include "attention.cuh"

constexpr unsigned PREFILL_WARPS = 4;
/// Stages of the ring: with the queries, 64 KiB at 128 dimensions and 96 KiB at 256, in both formats at most.
template <int DIM>
constexpr unsigned PREFILL_STAGES = DIM <= 128 ? 3 : 2;

template <int DIM>
DEVICE unsigned key_chunk(unsigned row, unsigned chunk) {
  return row * (DIM / 8) + (DIM % 64 == 0 ? chunk ^ (row % 2 * 4) : chunk);
}

/// Where this lane's eight bf16 numbers of keys lie: score tile n, chunk c of 32 dimensions.
template <bool EXPANDED, int DIM>
DEVICE unsigned key_tile(int n, int c) {
  const unsigned g = lane() / 4, t = lane() % 4;
  return 16 * (EXPANDED ? WARP * (4 * c + n) + lane() : key_chunk<DIM>(8 * (g / 2) + 2 * n + g % 2, 4 * c + t));
}

template <class Kv, int DIM>
DEVICE void prefill(const Attention& p, unsigned char* shared) {
  constexpr bool EXPAND = Kv::TILES > 1;
  constexpr unsigned THREADS = PREFILL_WARPS * WARP, STAGE_BYTES = Kv::bytes(DIM), HALF_BYTES = KV_BLOCK * DIM * 2;
  unsigned char* queries = shared + warp() * query_bytes<DIM>();
  unsigned char* ring = shared + PREFILL_WARPS * query_bytes<DIM>();
  unsigned char* expanded = ring + PREFILL_STAGES<DIM> * STAGE_BYTES;
  const Item item = p.items[blockIdx.x];
  const unsigned kv_head = blockIdx.y, g = lane() / 4, t = lane() % 4;
  const unsigned blocks = div_ceil(item.end, KV_BLOCK) - item.begin / KV_BLOCK;
  const unsigned* table = p.table + item.table0 + item.begin / KV_BLOCK;

  auto copy_block = [&](unsigned block) {
    unsigned char* stage = ring + block % PREFILL_STAGES<DIM> * STAGE_BYTES;
    const unsigned char* from = head_of_block<Kv>(p.pool, DIM, table[block], kv_head);
    constexpr unsigned KEYS = EXPAND ? 0 : HALF_BYTES / 16;
#pragma unroll
    for (unsigned at = threadIdx.x; at < KEYS; at += THREADS) {
      copy_async16(stage + 16 * key_chunk<DIM>(at / (DIM / 8), at % (DIM / 8)), from + 16 * at);
    }
#pragma unroll
    for (unsigned at = KEYS + threadIdx.x; at < STAGE_BYTES / 16; at += THREADS) copy_async16(stage + 16 * at, from + 16 * at);
  };
#pragma unroll
  for (unsigned s = 0; s < PREFILL_STAGES<DIM> - 1; s++) {
    if (s < blocks) copy_block(s);
    copy_async_commit();
  }
  const unsigned query0 = item.query0 + 16 * warp();
  load_queries<DIM>(p, item, kv_head, query0, queries);
  const Visible see = visible(p, item, kv_head, query0);
  // The warp skips blocks that none of its rows sees.
  const unsigned group = p.heads / p.pool.kv_heads, token = query0 / group;
  const unsigned last_token = (query0 + 15) / group < item.rows ? (query0 + 15) / group : item.rows - 1;
  const unsigned warp_end = token < item.rows ? item.pos0 + last_token + 1 : 0;
  const unsigned warp_begin = item.pos0 + token + 1 > p.window ? item.pos0 + token + 1 - p.window : 0;

  Flash<DIM> flash;
  for (unsigned block = 0; block < blocks; block++) {
    copy_async_wait<PREFILL_STAGES<DIM> - 2>();
    sync_threads();
    if (block + PREFILL_STAGES<DIM> - 1 < blocks) copy_block(block + PREFILL_STAGES<DIM> - 1);
    copy_async_commit();
    const unsigned char* stage = ring + block % PREFILL_STAGES<DIM> * STAGE_BYTES;
    if constexpr (EXPAND) {
      // What was expanded before has been read by all: they have met since.
#pragma unroll
      for (unsigned at = threadIdx.x; at < Kv::exponents(DIM) / 16; at += THREADS) {
        const Words4 loaded = load16(stage + 16 * at);
#pragma unroll
        for (unsigned i = 0; i < 2; i++) store16(expanded + 16 * (WARP * (at / WARP * 2 + i) + at % WARP), Kv::tile(loaded, i));
      }
      sync_threads();
    }
    const unsigned position = (item.begin / KV_BLOCK + block) * KV_BLOCK;
    if (position >= warp_end || position + KV_BLOCK <= warp_begin) continue;
    const unsigned char* keys = EXPAND ? expanded : stage;
    const unsigned char* values = keys + HALF_BYTES + 16 * lane();
    const auto scales = Kv::Scales::load([&](unsigned at) { return load8(stage + STAGE_BYTES - 2 * KV_BLOCK + at); });
    attend_block<DIM>(
        flash, queries, position, see, p.softcap,
        [&](int c, Words4(&key)[4]) {
#pragma unroll
          for (int n = 0; n < 4; n++) key[n] = load16(keys + key_tile<EXPAND, DIM>(n, c));
        },
        [&](int d) { return load16(values + 16 * WARP * d); }, scales);
  }
  finish_weights(flash);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const QueryRow row = query_row(p, item, kv_head, query0 + g + 8 * h);
    if (!row.valid) continue;
    const float scale = 1.0f / flash.weight[h];
    bf16* out = p.out + (size_t)(item.row0 + row.token) * p.out_stride + row.head * p.head_dim + 2 * t;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
      if (8 * d < (int)p.head_dim) {
        *reinterpret_cast<unsigned*>(out + 8 * d) = pack_bf16(flash.sums[d][2 * h] * scale, flash.sums[d][2 * h + 1] * scale);
      }
    }
  }
}

#define PREFILL(name, Kv, DIM)             \
  KERNEL(name, 128)(Attention p) {         \
    DYNAMIC_SHARED(unsigned char, shared); \
    prefill<Kv, DIM>(p, shared);           \
  }                                        \
  EXPORT(name)
PREFILL(prefill_32, KvBf16, 32)
PREFILL(prefill_64, KvBf16, 64)
PREFILL(prefill_96, KvBf16, 96)
PREFILL(prefill_128, KvBf16, 128)
PREFILL(prefill_256, KvBf16, 256)
PREFILL(prefill_fp8_32, KvFp8, 32)
PREFILL(prefill_fp8_64, KvFp8, 64)
PREFILL(prefill_fp8_96, KvFp8, 96)
PREFILL(prefill_fp8_128, KvFp8, 128)
PREFILL(prefill_fp8_256, KvFp8, 256)
