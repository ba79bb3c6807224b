//! What surrounds a product that a library does: weights as plain rows for it, and what becomes of its sums.
//
//     plain_*       a block 16 rows x 128 columns     tiles of any format -> bf16 rows without gaps
//     add_bias      a block 256 features of a row     f32 sums += bias
//     finish_gate   a block 512 features of a row     f32 sums of a gated product -> bf16 activations
#include "tiles.cuh"

/// Tiles that a block of `plain_*` turns around, side by side: a row of 256 bytes for each half warp to write.
constexpr unsigned PLAIN_TILES = 4;

/// Panel blockIdx.y, tiles 4 blockIdx.x .. + 4, as rows of `blocks` x 32 columns. 256 threads.
template <class F>
DEVICE void plain(const unsigned char* tiles, const unsigned char* scales, unsigned char* out, unsigned blocks) {
  const unsigned row = threadIdx.x / (4 * PLAIN_TILES), t = threadIdx.x % 4;
  const unsigned block = blockIdx.x * PLAIN_TILES + threadIdx.x / 4 % PLAIN_TILES;
  if (block >= blocks) return;
  const size_t tile = (size_t)blockIdx.y * blocks + block;
  float values[8];
  F::values(tiles + tile * F::BYTES, scales + tile * F::SCALE_BYTES, row, t, values);
  const size_t at = ((size_t)blockIdx.y * TILE_ROWS + row) * blocks + block;
  store16(out + at * (2 * TILE_COLS) + 16 * t, pack_bf16(values));
}

#define PLAIN(name, FORMAT)                                                                                            \
  KERNEL(name, 256)(const unsigned char* tiles, const unsigned char* scales, unsigned char* out, unsigned blocks) { \
    plain<FORMAT>(tiles, scales, out, blocks);                                                                         \
  }                                                                                                                    \
  EXPORT(name)
PLAIN(plain_bf16, FormatBf16)
PLAIN(plain_q4, FormatQ4)
PLAIN(plain_q8, FormatQ8)
PLAIN(plain_q8h, FormatQ8Half)

/// sums[row][i] += bias[i]: row blockIdx.x, a thread a feature.
KERNEL(add_bias, 256)(float* sums, const float* bias, unsigned features, unsigned stride) {
  const unsigned feature = blockIdx.y * blockDim.x + threadIdx.x;
  if (feature < features) sums[(size_t)blockIdx.x * stride + feature] += bias[feature];
}
EXPORT(add_bias)

/// out[row][i] = f(gate) * up: row blockIdx.x, a thread four features. `sums` is [rows, 16 panels]; of a panel, the first 8
/// are gates and the others the same features' up. `out` and `out_stride` are multiples of four elements.
KERNEL(finish_gate, 128)
(const float* sums, const float* bias, bf16* out, unsigned panels, unsigned features, unsigned out_stride, unsigned up_bias,
 unsigned finish) {
  const unsigned first = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (first >= features) return;
  const float* from = sums + (size_t)blockIdx.x * panels * TILE_ROWS + first / 8 * TILE_ROWS + first % 8;
  const float4 gate4 = *reinterpret_cast<const float4*>(from), up4 = *reinterpret_cast<const float4*>(from + 8);
  float gate[4] = {gate4.x, gate4.y, gate4.z, gate4.w}, up[4] = {up4.x, up4.y, up4.z, up4.w}, value[4];
#pragma unroll
  for (unsigned i = 0; i < 4; i++) {
    if (bias && first + i < features) {
      gate[i] += bias[first + i];
      up[i] += bias[up_bias + first + i];
    }
    value[i] = gated(finish, gate[i], up[i]);
  }
  bf16* to = out + (size_t)blockIdx.x * out_stride + first;
  if (first + 3 < features) {
    Words2 words;
    words.w[0] = pack_bf16(value[0], value[1]);
    words.w[1] = pack_bf16(value[2], value[3]);
    store8(to, words);
    return;
  }
#pragma unroll
  for (unsigned i = 0; i < 4; i++) {
    if (first + i < features) to[i] = to_bf16(value[i]);
  }
}
EXPORT(finish_gate)
