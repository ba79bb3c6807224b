//! Token ids of a pass that the pass before has chosen, and that the host has not seen.
//
//     carry_tokens   a thread a row            number of a result -> token
#include "device.cuh"

/// tokens[i] = results[tokens[i]]. A result that is no token below `vocab` says why there is none; the row is then thrown
/// away, and until then it may be of any token.
KERNEL(carry_tokens, 128)(unsigned* tokens, const unsigned* results, unsigned count, unsigned vocab) {
  const unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= count) return;
  const unsigned token = results[tokens[row]];
  tokens[row] = token < vocab ? token : 0;
}
EXPORT(carry_tokens)
