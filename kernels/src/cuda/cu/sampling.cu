//! Draws a token from each of some rows of logits, without sorting them.
//
//     sample_prepare   a block a slice    soft-cap and allowed tokens                   where a row has them
//     sample_adjust    a block a row      bias, penalties, excluded tokens              where a row has them
//     sample_largest   a block a slice    the largest logit and its token
//     sample_select    a block a slice    one digit of the cut of top_k or top_p, from a histogram of the row
//     sample_draw      a block a slice    the weight of what is left, then the token at the random point
//
// The order of tokens is that of their logits as whole numbers (`key_of`), the lower token first among equals. A cut is a key
// and a number of tokens with this key; it is found digit by digit, 11 + 11 + 10 bits, from the top: the histogram of a
// digit counts (top_k) or weighs (top_p) the tokens whose higher digits are those of the cut.
//
// Weights are whole numbers too, in units of 2^-39 of the largest. So sums are the same in any order: atomics do no harm, and
// a row's token depends on the row alone.
//
// Work on a row that needs all of its slices is done by the block that comes last; nobody waits. Kernels follow each
// other on a stream, so what one leaves in `Row` the next one finds.
#include "device.cuh"

using u64 = unsigned long long;

constexpr unsigned THREADS = 256, SHARE = 16, SLICE = THREADS * SHARE;  // `SLICE` of sampling.rs
constexpr unsigned DIGITS = 2048;                                       // `DIGITS` of sampling.rs
constexpr unsigned NO_MASK = 0xffffffffu;
/// Results that are no token: `sampling.rs` knows them.
constexpr unsigned NOT_A_NUMBER = 0xffffffffu, INFINITE = 0xfffffffeu, EXCLUDED = 0xfffffffdu;

/// What is asked of a row, and how far it is; the latter comes as zeros. `Row` of sampling.rs.
struct Row {
  u64 uniform;  // 53 random bits and 11 zeros
  u64 top_p;    // in units of 2^-64; 0 keeps all
  // Progress.
  u64 largest;  // key and, below it, the complement of the token
  u64 target;   // count or weight that the cut has to reach within the digits so far
  // What is asked.
  unsigned row, top_k;       // 0 keeps all
  float factor, min_p;       // 1 / temperature; 0 takes the largest
  float repetition, presence, frequency;
  unsigned biases, seen, excluded, end;  // adjustments: from each of these to the next
  unsigned mask;             // first word of its allowed tokens
  // Progress.
  unsigned prefix;           // digits of the cut so far
  unsigned cut, ties;        // the last cut: all keys above it are kept, and as many tokens with this key
  unsigned arrived;          // blocks that are done
};

/// What a block leaves for the last one of its row: the weight above the cut, and tokens at it.
struct Slice {
  u64 weight, ties;
};

/// A whole number that is larger for a larger float; both zeros are one, and every NaN is above all.
DEVICE unsigned key_of(float x) {
  if (x != x) return 0xffffffffu;
  const unsigned bits = bits_of_float(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of_key(unsigned key) { return float_of_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

constexpr unsigned KEY_OF_INFINITY = 0xff800000u, KEY_OF_NOTHING = 0x007fffffu;

/// Whether there is something to draw from.
DEVICE bool drawable(u64 largest) {
  const unsigned key = (unsigned)(largest >> 32);
  return key > KEY_OF_NOTHING && key < KEY_OF_INFINITY;
}

/// The weight of a logit relative to the largest, and the same as a whole number.
DEVICE float weight_of(float x, float largest, float factor) { return expf((x - largest) * factor); }
DEVICE u64 whole(float weight) { return (u64)(weight * 549755813888.0f); }

/// The sum over the threads before this one; `total` is that over all. `scratch` is shared memory for `warps()` values.
DEVICE u64 sum_before(u64 x, u64* scratch, u64& total) {
  u64 sum = x;
#pragma unroll
  for (unsigned step = 1; step < WARP; step *= 2) {
    const u64 other = shuffle_up(sum, step);
    if (lane() >= step) sum += other;
  }
  if (lane() == WARP - 1) scratch[warp()] = sum;
  sync_threads();
  u64 before = 0;
  total = 0;
  for (unsigned w = 0; w < warps(); w++) {
    if (w == warp()) before = total;
    total += scratch[w];
  }
  sync_threads();
  return before + sum - x;
}

/// True in every thread of the block that comes last of its row; all that the others have written is then there to read,
/// past the L1 cache.
DEVICE bool comes_last(unsigned* arrived, unsigned* shared) {
  device_fence();
  sync_threads();
  if (threadIdx.x == 0) shared[0] = atomic_add(arrived, 1u);
  sync_threads();
  if (shared[0] != gridDim.x - 1) return false;
  device_fence();
  return true;
}

/// logit = cap * tanh(logit / cap), and minus infinity where it is not allowed.
KERNEL(sample_prepare, THREADS)(float* logits, const Row* rows, const unsigned* masks, unsigned vocab, float cap) {
  const Row& row = rows[blockIdx.y];
  if (cap == 0.0f && row.mask == NO_MASK) return;
  float* x = logits + (size_t)row.row * vocab;
#pragma unroll 4
  for (unsigned i = 0; i < SHARE; i++) {
    const unsigned at = blockIdx.x * SLICE + i * THREADS + threadIdx.x;
    if (at >= vocab) break;
    float value = x[at];
    if (cap != 0.0f) value = cap * tanhf(value / cap);
    if (row.mask != NO_MASK && !(masks[row.mask + at / 32] >> at % 32 & 1)) value = -INFINITY;
    x[at] = value;
  }
}
EXPORT(sample_prepare)

/// Pairs of a token and a bias, a token and how often it is in the answer, a token that is excluded. The tokens of each of
/// the first two lists differ.
KERNEL(sample_adjust, THREADS)(float* logits, const Row* rows, const uint2* adjustments, unsigned vocab) {
  const Row& row = rows[blockIdx.x];
  float* x = logits + (size_t)row.row * vocab;
  for (unsigned i = row.biases + threadIdx.x; i < row.seen; i += THREADS) {
    x[adjustments[i].x] += float_of_bits(adjustments[i].y);
  }
  sync_threads();
  for (unsigned i = row.seen + threadIdx.x; i < row.excluded; i += THREADS) {
    const unsigned count = adjustments[i].y;
    float& logit = x[adjustments[i].x];
    float value = logit > 0.0f ? logit / row.repetition : logit * row.repetition;
    if (count > 0) value -= row.presence + (float)count * row.frequency;
    logit = value;
  }
  sync_threads();
  for (unsigned i = row.excluded + threadIdx.x; i < row.end; i += THREADS) x[adjustments[i].x] = -INFINITY;
}
EXPORT(sample_adjust)

KERNEL(sample_largest, THREADS)(const float* logits, Row* rows, unsigned vocab) {
  SHARED(u64, largest_of, 32);
  Row& row = rows[blockIdx.y];
  const float* x = logits + (size_t)row.row * vocab;
  u64 largest = 0;
#pragma unroll
  for (unsigned i = 0; i < SHARE; i++) {
    const unsigned at = blockIdx.x * SLICE + i * THREADS + threadIdx.x;
    if (at < vocab) largest = max(largest, (u64)key_of(x[at]) << 32 | (~at & 0xffffffffu));
  }
#pragma unroll
  for (unsigned step = WARP / 2; step > 0; step /= 2) largest = max(largest, shuffle_xor(largest, step));
  if (lane() == 0) largest_of[warp()] = largest;
  sync_threads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < warps(); w++) largest = max(largest, largest_of[w]);
    atomic_max(&row.largest, largest);
  }
}
EXPORT(sample_largest)

/// One digit of a cut: 0 to 2 are those of top_k, 3 to 5 those of top_p among what top_k has left. `histograms` [rows, DIGITS]
/// are zeros, before and after.
KERNEL(sample_select, THREADS)(const float* logits, Row* rows, u64* histograms, unsigned vocab, unsigned digit) {
  SHARED(unsigned, low, DIGITS);
  SHARED(unsigned, high, DIGITS);
  SHARED(u64, scratch, 32);
  SHARED(unsigned, arrived, 1);
  Row& row = rows[blockIdx.y];
  const bool weigh = digit >= 3;
  if (row.factor == 0.0f || (weigh ? row.top_p == 0 : row.top_k == 0) || !drawable(row.largest)) return;
  const unsigned place = digit % 3, shift = place == 0 ? 21 : place == 1 ? 10 : 0;
  const unsigned known = place == 0 ? 0 : place == 1 ? 0xffe00000u : 0xfffffc00u;
  const float* x = logits + (size_t)row.row * vocab;
  const float largest = float_of_key((unsigned)(row.largest >> 32)), factor = row.factor;
  const unsigned prefix = row.prefix, cut = row.cut, ties = row.ties, kept = row.top_k;
  u64 target = row.target;

  for (unsigned i = threadIdx.x; i < DIGITS; i += THREADS) low[i] = high[i] = 0;
  sync_threads();
#pragma unroll 8
  for (unsigned i = 0; i < SHARE; i++) {
    const unsigned at = blockIdx.x * SLICE + i * THREADS + threadIdx.x;
    if (at >= vocab) break;
    const float logit = x[at];
    const unsigned key = key_of(logit), bin = key >> shift & (DIGITS - 1);
    if ((key & known) != prefix) continue;
    if (!weigh) {
      atomic_add(&low[bin], 1u);
    } else if (key > cut) {
      // In two halves, since shared memory adds 32 bits at a time; neither overflows over a slice.
      const u64 value = whole(weight_of(logit, largest, factor));
      const unsigned below = (unsigned)value & 0xfffffu, above = (unsigned)(value >> 20);
      if (below) atomic_add(&low[bin], below);
      if (above) atomic_add(&high[bin], above);
    }
  }
  sync_threads();
  u64* histogram = histograms + (size_t)blockIdx.y * DIGITS;
  for (unsigned i = threadIdx.x; i < DIGITS; i += THREADS) {
    const u64 value = low[i] + ((u64)high[i] << 20);
    if (value) atomic_add(&histogram[i], value);
  }
  if (!comes_last(&row.arrived, arrived)) return;

  // The tokens at the cut of top_k, of which only the first are kept.
  const unsigned bin_of_cut = cut >> shift & (DIGITS - 1);
  const u64 at_cut = ties > 0 && (cut & known) == prefix ? ties * whole(weight_of(float_of_key(cut), largest, factor)) : 0;
  constexpr unsigned OWN = DIGITS / THREADS;
  u64 values[OWN], sum = 0, total;
#pragma unroll
  for (unsigned i = 0; i < OWN; i++) {
    const unsigned bin = DIGITS - 1 - (threadIdx.x * OWN + i);
    values[i] = load_fresh(&histogram[bin]) + (bin == bin_of_cut ? at_cut : 0);
    histogram[bin] = 0;
    sum += values[i];
  }
  u64 above = sum_before(sum, scratch, total);
  if (place == 0) target = weigh ? multiply_high(total, row.top_p) + (total * row.top_p != 0) : kept;
  // The bins above do not reach the target, this thread's do.
  if (above < target && target <= above + sum) {
    unsigned bin = DIGITS - 1 - threadIdx.x * OWN;
    bool found = false;
#pragma unroll
    for (unsigned i = 0; i < OWN; i++) {
      if (!found && above + values[i] < target) {
        above += values[i];
        bin--;
      } else {
        found = true;
      }
    }
    const unsigned now = prefix | bin << shift;
    target -= above;
    if (place == 2) {
      const u64 each = weigh ? whole(weight_of(float_of_key(now), largest, factor)) : 1;
      row.cut = now;
      row.ties = (unsigned)((target + each - 1) / each);
      row.prefix = 0;
    } else {
      row.prefix = now;
      row.target = target;
    }
    row.arrived = 0;
  }
}
EXPORT(sample_select)

/// `slices` [rows, blocks of a row], of which there are at most THREADS.
KERNEL(sample_draw, THREADS)(const float* logits, Row* rows, Slice* slices, unsigned* out, unsigned vocab) {
  SHARED(u64, scratch, 32);
  SHARED(unsigned, arrived, 1);
  SHARED(u64, chosen, 3);  // slice, the rest of the point, the rest of the ties
  Row& row = rows[blockIdx.y];
  const unsigned key_of_largest = (unsigned)(row.largest >> 32);
  if (row.factor == 0.0f || !drawable(row.largest)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      out[blockIdx.y] = key_of_largest > KEY_OF_INFINITY    ? NOT_A_NUMBER
                        : key_of_largest == KEY_OF_INFINITY ? INFINITE
                        : key_of_largest <= KEY_OF_NOTHING  ? EXCLUDED
                                                            : ~(unsigned)row.largest;
    }
    return;
  }
  const float* x = logits + (size_t)row.row * vocab;
  const float largest = float_of_key(key_of_largest), factor = row.factor, min_p = row.min_p;
  const unsigned cut = row.cut;
  const auto weight_above = [&](float logit) {
    const float weight = weight_of(logit, largest, factor);
    return weight >= min_p ? whole(weight) : 0;
  };
  u64 weight = 0, ties = 0;
#pragma unroll
  for (unsigned i = 0; i < SHARE; i++) {
    const unsigned at = blockIdx.x * SLICE + i * THREADS + threadIdx.x;
    if (at >= vocab) continue;
    const unsigned key = key_of(x[at]);
    if (key > cut) weight += weight_above(x[at]);
    ties += key == cut;
  }
  weight = block_sum(weight, scratch);
  ties = block_sum(ties, scratch);
  slices += (size_t)blockIdx.y * gridDim.x;
  if (threadIdx.x == 0) slices[blockIdx.x] = Slice{weight, ties};
  if (!comes_last(&row.arrived, arrived)) return;

  // Which slice the point falls on, a thread a slice.
  const u64 each = row.ties > 0 ? weight_above(float_of_key(cut)) : 0;
  weight = ties = 0;
  if (threadIdx.x < gridDim.x) {
    weight = load_fresh(&slices[threadIdx.x].weight);
    ties = load_fresh(&slices[threadIdx.x].ties);
  }
  const auto kept = [](u64 count, u64 before, u64 most) { return before < most ? min(count, most - before) : 0; };
  u64 total;
  u64 ties_before = sum_before(ties, scratch, total);
  u64 sum = weight + kept(ties, ties_before, row.ties) * each;
  u64 before = sum_before(sum, scratch, total);
  u64 point = multiply_high(row.uniform, total);
  if (before <= point && point < before + sum) {
    chosen[0] = threadIdx.x;
    chosen[1] = point - before;
    chosen[2] = kept(row.ties, ties_before, row.ties);
  }
  sync_threads();

  // And which token of the slice, in the order of tokens, some neighbours a thread.
  const unsigned first = (unsigned)chosen[0] * SLICE + threadIdx.x * SHARE;
  const u64 ties_left = chosen[2];
  point = chosen[1];
  weight = ties = 0;
#pragma unroll 4
  for (unsigned i = 0; i < SHARE; i++) {
    if (first + i >= vocab) break;
    const unsigned key = key_of(x[first + i]);
    if (key > cut) weight += weight_above(x[first + i]);
    ties += key == cut;
  }
  ties_before = sum_before(ties, scratch, total);
  sum = weight + kept(ties, ties_before, ties_left) * each;
  before = sum_before(sum, scratch, total);
  if (before <= point && point < before + sum) {
    point -= before;
    for (unsigned i = 0; i < SHARE && first + i < vocab; i++) {
      const unsigned key = key_of(x[first + i]);
      const u64 value = key > cut ? weight_above(x[first + i]) : key == cut && ties_before++ < ties_left ? each : 0;
      if (point < value) {
        out[blockIdx.y] = first + i;
        return;
      }
      point -= value;
    }
  }
}
EXPORT(sample_draw)
