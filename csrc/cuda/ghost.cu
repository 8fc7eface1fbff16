// The ghost way's kernels on the device. In the last sum one thread has an element of a Gram's
// lower triangle and adds up its products in their order.

#include <cuda_runtime.h>

#include "ghost.h"

namespace lightning_mat {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) ghost_kernel(GhostParams p) {
  const int64_t run = blockIdx.x, s = p.first + blockIdx.y;
  for (int64_t other = threadIdx.x; other <= s; other += blockDim.x) {
    add_ghost_element<T>(p, run, s, other);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) patch_kernel(PatchParams p) {
  const int64_t s = p.first + blockIdx.x / p.tokens, t = blockIdx.x % p.tokens;
  for (int64_t other = threadIdx.x; other < p.last; other += blockDim.x) {
    add_patch_products<T>(p, s, t, other);
  }
}

}  // namespace

cudaError_t cuda_patch_products(const PatchParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.last - p.first) * p.tokens;
  if (blocks == 0) return cudaSuccess;
  if (p.type == Scalar::kFloat64) {
    patch_kernel<double><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  } else {
    patch_kernel<float><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

cudaError_t cuda_ghost_sum(const GhostParams& p, cudaStream_t stream) {
  if (p.runs == 0 || p.first == p.last) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(p.runs), static_cast<unsigned>(p.last - p.first));
  if (p.type == Scalar::kFloat64) {
    ghost_kernel<double><<<grid, kThreads, 0, stream>>>(p);
  } else {
    ghost_kernel<float><<<grid, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lightning_mat
