// Launches of the ghost way's kernels.

#include <cuda_runtime.h>

#include "ghost.h"
#include "ghost_kernel.h"

namespace lightning_mat {

cudaError_t cuda_patch_products(const PatchParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(patch_blocks(p));
  if (blocks == 0) return cudaSuccess;
  if (p.type == Scalar::kFloat64) {
    patch_kernel<double><<<blocks, kGhostThreads, 0, stream>>>(p);
  } else {
    patch_kernel<float><<<blocks, kGhostThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t cuda_ghost_sum(const GhostParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ghost_blocks(p));
  if (blocks == 0) return cudaSuccess;
  if (p.type == Scalar::kFloat64) {
    ghost_kernel<double><<<blocks, kGhostThreads, 0, stream>>>(p);
  } else {
    ghost_kernel<float><<<blocks, kGhostThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lightning_mat
