//! The paged pool on the device, and the batch's tables that every layer reads.
//
//     pool    [block][layer][kv head][ K: position x DIM | V: DIM x position ]     bf16, 32 positions to a block
//
// DIM is the head's dimension rounded up to a width that has a kernel; the dimensions behind the head's own are zero. The
// values are stored transposed, so that both products of attention read fragments of 16 neighbouring bytes (tiles.cuh).
// Everything in the pool is finite: it starts as zeros and writes are clamped, so a position behind the end of a sequence
// takes part with a weight of zero and needs no mask on its values.
#pragma once
#include "device.cuh"

constexpr unsigned KV_BLOCK = 32;
constexpr unsigned NO_POSITION = 0xffffffffu;

/// The host has the same struct.
struct Pool {
  bf16* values;
  unsigned layers, layer, kv_heads;
  /// DIM above.
  unsigned dim;
};

/// Keys of one head in one block; its values follow after `KV_BLOCK * dim`.
DEVICE bf16* head_of_block(const Pool& pool, unsigned block, unsigned kv_head) {
  const size_t heads = ((size_t)block * pool.layers + pool.layer) * pool.kv_heads + kv_head;
  return pool.values + heads * 2 * KV_BLOCK * pool.dim;
}
