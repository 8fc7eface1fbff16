// Eigenvalues of Grams on the device: each block takes one Gram after another.

#include <cuda_runtime.h>

#include <algorithm>

#include "../lanczos.h"
#include "../mntk.h"

namespace lightning_mat {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

class Block {
 public:
  static constexpr int64_t kWidth = 1;  // neighbouring threads read neighbouring elements

  __device__ explicit Block(double* per_warp) : per_warp_(per_warp) {}
  __device__ int64_t rank() const { return threadIdx.x; }
  __device__ int64_t size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ double sum(double x) const {
    return reduce(x, [](double a, double b) { return a + b; });
  }
  __device__ double max(double x) const {
    return reduce(x, [](double a, double b) { return fmax(a, b); });
  }

 private:
  // Within warps, then over the warps' results in their order: the same order every time.
  template <class Combine>
  __device__ double reduce(double x, Combine combine) const {
    for (int step = kWarp / 2; step > 0; step /= 2) {
      x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
    }
    if (threadIdx.x % kWarp == 0) per_warp_[threadIdx.x / kWarp] = x;
    __syncthreads();
    double result = per_warp_[0];
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
      result = combine(result, per_warp_[w]);
    }
    __syncthreads();
    return result;
  }

  double* per_warp_;
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) spectrum_kernel(SpectrumParams p) {
  __shared__ double per_warp[kMaxThreads / kWarp];
  Block team(per_warp);
  double* memory = p.workspace + blockIdx.x * lanczos_workspace(p.samples);
  for (int64_t index = blockIdx.x; index < p.count; index += gridDim.x) {
    solve_gram<T>(team, p, index, memory);
  }
}

}  // namespace

cudaError_t cuda_spectrum(const SpectrumParams& p, cudaStream_t stream) {
  if (p.count == 0 || p.samples == 0) return cudaSuccess;
  const int64_t warps = (p.samples + kWarp - 1) / kWarp;
  const unsigned threads =
      static_cast<unsigned>(std::clamp<int64_t>(warps * kWarp, 2 * kWarp, kMaxThreads));
  const unsigned blocks = static_cast<unsigned>(std::min(p.workers, p.count));
  if (p.gram_type == Scalar::kFloat64) {
    spectrum_kernel<double><<<blocks, threads, 0, stream>>>(p);
  } else {
    spectrum_kernel<float><<<blocks, threads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lightning_mat
