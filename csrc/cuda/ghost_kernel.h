// The ghost way's kernels: see ghost_kernels.h. In the last sum one thread has an element of a
// Gram's lower triangle and adds up its products in their order.

#pragma once

#include <cstdint>

#include "../ghost_kernels.h"
#include "device.h"

namespace lightning_mat {

constexpr int kGhostThreads = 128;

// A block per run and sample.
inline int64_t ghost_blocks(const GhostParams& p) { return p.runs * (p.last - p.first); }

template <class T>
__global__ void __launch_bounds__(kGhostThreads) ghost_kernel(GhostParams p) {
  const int64_t run = blockIdx.x % p.runs, s = p.first + blockIdx.x / p.runs;
  for (int64_t other = threadIdx.x; other <= s; other += blockDim.x) {
    add_ghost_element<T>(p, run, s, other);
  }
}

// A block per sample and token.
inline int64_t patch_blocks(const PatchParams& p) { return (p.last - p.first) * p.tokens; }

template <class T>
__global__ void __launch_bounds__(kGhostThreads) patch_kernel(PatchParams p) {
  const int64_t s = p.first + blockIdx.x / p.tokens, t = blockIdx.x % p.tokens;
  for (int64_t other = threadIdx.x; other < p.last; other += blockDim.x) {
    add_patch_products<T>(p, s, t, other);
  }
}

}  // namespace lightning_mat
