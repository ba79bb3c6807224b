//! Ops on rows: embedding, RMS norms, moving rows, and the last step of an argmax. All are bound by memory or by latency.
//
//     embed          a block a token           weight tiles -> f32 row
//     rms_norm       a block a row             f32 row -> bf16 activations
//     rms_norm_add   a block a row             f32 row -> added to another
//     keep_rows      a thread 1 or 4 columns   rows move up, several under way
//     argmax         a block a row             best of each panel -> one token
#include "tiles.cuh"

/// out[i] = scale * table[tokens[i]]. The tables of a matrix of several parts are not supported: one part, one format.
template <class F>
DEVICE void embed(const unsigned char* tiles, const unsigned char* scales, const unsigned* tokens, float* out,
                  unsigned blocks, unsigned cols, float scale) {
  const unsigned token = tokens[blockIdx.x], row = token % TILE_ROWS;
  const size_t first = (size_t)(token / TILE_ROWS) * blocks;
  float* to = out + (size_t)blockIdx.x * cols;
  for (unsigned at = threadIdx.x; at < 4 * blocks; at += blockDim.x) {
    const size_t tile = first + at / 4;
    float values[8];
    F::values(tiles + tile * F::BYTES, scales + tile * F::SCALE_BYTES, row, at % 4, values);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= scale;
    if (cols % 8 == 0) {
      if (8 * at < cols) {
        reinterpret_cast<float4*>(to)[2 * at] = float4{values[0], values[1], values[2], values[3]};
        reinterpret_cast<float4*>(to)[2 * at + 1] = float4{values[4], values[5], values[6], values[7]};
      }
    } else {
#pragma unroll
      for (unsigned i = 0; i < 8; i++) {
        if (8 * at + i < cols) to[8 * at + i] = values[i];
      }
    }
  }
}

#define EMBED(name, FORMAT)                                                                                          \
  KERNEL(name, 128)                                                                                                  \
  (const unsigned char* tiles, const unsigned char* scales, const unsigned* tokens, float* out, unsigned blocks,     \
   unsigned cols, float scale) {                                                                                     \
    embed<FORMAT>(tiles, scales, tokens, out, blocks, cols, scale);                                                  \
  }                                                                                                                  \
  EXPORT(name)
EMBED(embed_bf16, FormatBf16)
EMBED(embed_q4, FormatQ4)
EMBED(embed_q8, FormatQ8)
EMBED(embed_q8h, FormatQ8Half)

/// Sum of squares of a row, by one block.
DEVICE float sum_of_squares(const float* x, unsigned cols, float* scratch) {
  float sum = 0.0f;
  if (cols % 4 == 0) {
    for (unsigned i = threadIdx.x; i < cols / 4; i += blockDim.x) {
      const float4 v = reinterpret_cast<const float4*>(x)[i];
      sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
  } else {
    for (unsigned i = threadIdx.x; i < cols; i += blockDim.x) sum += x[i] * x[i];
  }
  return block_sum(sum, scratch);
}

/// 1 / sqrt(mean + eps), correctly rounded operations only.
DEVICE float norm_scale(float sum, unsigned cols, float eps) { return 1.0f / sqrtf(sum / (float)cols + eps); }

/// out[i] = x[rows[i]] / sqrt(mean(x^2) + eps) * weight, or of x[i] when `rows` is null.
KERNEL(rms_norm, 256)
(const float* x, const unsigned* rows, const float* weight, bf16* out, unsigned cols, unsigned out_stride, float eps) {
  SHARED(float, scratch, 32);
  const unsigned row = rows ? rows[blockIdx.x] : blockIdx.x;
  const float* from = x + (size_t)row * cols;
  bf16* to = out + (size_t)blockIdx.x * out_stride;
  const float scale = norm_scale(sum_of_squares(from, cols, scratch), cols, eps);
  if (cols % 4 == 0) {
    for (unsigned i = threadIdx.x; i < cols / 4; i += blockDim.x) {
      const float4 v = reinterpret_cast<const float4*>(from)[i], w = reinterpret_cast<const float4*>(weight)[i];
      Words2 words;
      words.w[0] = pack_bf16(v.x * scale * w.x, v.y * scale * w.y);
      words.w[1] = pack_bf16(v.z * scale * w.z, v.w * scale * w.w);
      store8(to + 4 * i, words);
    }
  } else {
    for (unsigned i = threadIdx.x; i < cols; i += blockDim.x) to[i] = to_bf16(from[i] * scale * weight[i]);
  }
}
EXPORT(rms_norm)

/// x[i] += y[i] / sqrt(mean(y^2) + eps) * weight
KERNEL(rms_norm_add, 256)(const float* y, const float* weight, float* x, unsigned cols, float eps) {
  SHARED(float, scratch, 32);
  const float* from = y + (size_t)blockIdx.x * cols;
  float* to = x + (size_t)blockIdx.x * cols;
  const float scale = norm_scale(sum_of_squares(from, cols, scratch), cols, eps);
  if (cols % 4 == 0) {
    for (unsigned i = threadIdx.x; i < cols / 4; i += blockDim.x) {
      const float4 v = reinterpret_cast<const float4*>(from)[i], w = reinterpret_cast<const float4*>(weight)[i];
      float4 sum = reinterpret_cast<float4*>(to)[i];
      sum.x += v.x * scale * w.x;
      sum.y += v.y * scale * w.y;
      sum.z += v.z * scale * w.z;
      sum.w += v.w * scale * w.w;
      reinterpret_cast<float4*>(to)[i] = sum;
    }
  } else {
    for (unsigned i = threadIdx.x; i < cols; i += blockDim.x) to[i] += from[i] * scale * weight[i];
  }
}
EXPORT(rms_norm_add)

/// Moves row rows[i] to row i, for ascending rows. A thread has columns of its own; since rows[i] >= i, what it loads after
/// a store lies behind it.
template <class T>
DEVICE void keep_rows(T* values, const unsigned* rows, unsigned count, unsigned cols) {
  constexpr unsigned BATCH = 8;
  const unsigned col = blockIdx.x * blockDim.x + threadIdx.x;
  if (col >= cols) return;
  for (unsigned first = 0; first < count; first += BATCH) {
    T held[BATCH];
#pragma unroll
    for (unsigned i = 0; i < BATCH; i++) {
      if (first + i < count) held[i] = values[(size_t)rows[first + i] * cols + col];
    }
#pragma unroll
    for (unsigned i = 0; i < BATCH; i++) {
      if (first + i < count) values[(size_t)(first + i) * cols + col] = held[i];
    }
  }
}
KERNEL(keep_rows_1, 64)(float* values, const unsigned* rows, unsigned count, unsigned cols) {
  keep_rows(values, rows, count, cols);
}
EXPORT(keep_rows_1)
/// The same for columns in fours; `cols` counts those.
KERNEL(keep_rows_4, 64)(float4* values, const unsigned* rows, unsigned count, unsigned cols) {
  keep_rows(values, rows, count, cols);
}
EXPORT(keep_rows_4)

/// The feature of the largest value of each row [count], the lowest among equals.
KERNEL(argmax, 256)(const float* values, const unsigned* features, unsigned* out, unsigned count) {
  SHARED(float, best_of, 32);
  SHARED(unsigned, feature_of, 32);
  const float* row = values + (size_t)blockIdx.x * count;
  const unsigned* names = features + (size_t)blockIdx.x * count;
  float best = -INFINITY;
  unsigned feature = 0xffffffffu;
  auto take = [&](float value, unsigned name) {
    if (value > best || (value == best && name < feature)) {
      best = value;
      feature = name;
    }
  };
  for (unsigned i = threadIdx.x; i < count; i += blockDim.x) take(row[i], names[i]);
#pragma unroll
  for (unsigned step = WARP / 2; step > 0; step /= 2) {
    const float value = shuffle_xor(best, step);
    const unsigned name = shuffle_xor(feature, step);
    take(value, name);
  }
  if (lane() == 0) {
    best_of[warp()] = best;
    feature_of[warp()] = feature;
  }
  sync_threads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < warps(); w++) take(best_of[w], feature_of[w]);
    out[blockIdx.x] = feature;
  }
}
EXPORT(argmax)
