//! Attention of many rows (prefill): 64 query rows share each block of the pool through a ring in shared memory.
//
//     grid     (item, kv head)      item: 64 query rows of a span, all the positions that they see
//     block    4 warps of 16 query rows; ring of 2 or 3 stages, each the keys and values of 32 positions
//
// Keys lie in rows of DIM. A quarter of a warp reads 64 bytes each of two neighbouring rows, which fall on the same banks when
// a row is a multiple of 128 bytes: there, odd rows swap the halves of every 128 bytes.
#include "attention.cuh"

constexpr unsigned PREFILL_WARPS = 4;
/// Stages of the ring: 64 KiB at 128 dimensions, 96 KiB with the queries at 256.
template <int DIM>
constexpr unsigned PREFILL_STAGES = DIM <= 128 ? 3 : 2;

template <int DIM>
DEVICE unsigned key_chunk(unsigned row, unsigned chunk) {
  return row * (DIM / 8) + (DIM % 64 == 0 ? chunk ^ (row % 2 * 4) : chunk);
}

template <int DIM>
DEVICE void prefill(const Attention& p, unsigned char* shared) {
  constexpr unsigned THREADS = PREFILL_WARPS * WARP, HALF_BYTES = KV_BLOCK * DIM * 2, CHUNKS = HALF_BYTES / 16;
  unsigned char* queries = shared + warp() * query_bytes<DIM>();
  unsigned char* ring = shared + PREFILL_WARPS * query_bytes<DIM>();
  const Item item = p.items[blockIdx.x];
  const unsigned kv_head = blockIdx.y, g = lane() / 4, t = lane() % 4;
  const unsigned blocks = div_ceil(item.end, KV_BLOCK) - item.begin / KV_BLOCK;
  const unsigned* table = p.table + item.table0 + item.begin / KV_BLOCK;

  auto copy_block = [&](unsigned block) {
    unsigned char* stage = ring + block % PREFILL_STAGES<DIM> * 2 * HALF_BYTES;
    const bf16* from = head_of_block(p.pool, table[block], kv_head);
#pragma unroll
    for (unsigned at = threadIdx.x; at < CHUNKS; at += THREADS) {
      copy_async16(stage + 16 * key_chunk<DIM>(at / (DIM / 8), at % (DIM / 8)), from + 8 * at);
    }
#pragma unroll
    for (unsigned at = threadIdx.x; at < CHUNKS; at += THREADS) {
      copy_async16(stage + HALF_BYTES + 16 * at, from + KV_BLOCK * DIM + 8 * at);
    }
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
    const unsigned position = (item.begin / KV_BLOCK + block) * KV_BLOCK;
    if (position >= warp_end || position + KV_BLOCK <= warp_begin) continue;
    const unsigned char* keys = ring + block % PREFILL_STAGES<DIM> * 2 * HALF_BYTES;
    const unsigned char* values = keys + HALF_BYTES + 16 * lane();
    attend_block<DIM>(
        flash, queries, position, see, p.softcap,
        [&](int n, int c) { return load16(keys + 16 * key_chunk<DIM>(8 * (g / 2) + 2 * n + g % 2, 4 * c + t)); },
        [&](int d) { return load16(values + 16 * WARP * d); });
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

#define PREFILL(name, DIM)                     \
  KERNEL(name, 128)(Attention p) {             \
    DYNAMIC_SHARED(unsigned char, shared);     \
    prefill<DIM>(p, shared);                   \
  }                                            \
  EXPORT(name)
PREFILL(prefill_32, 32)
PREFILL(prefill_64, 64)
PREFILL(prefill_96, 96)
PREFILL(prefill_128, 128)
PREFILL(prefill_256, 256)
