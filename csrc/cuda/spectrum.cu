// Launches the eigenvalue kernels.

#include <cuda_runtime.h>

#include <algorithm>

#include "../mntk.h"
#include "spectrum_kernel.h"

namespace lightning_mat {
namespace {

template <class T>
cudaError_t launch(const SpectrumParams& p, cudaStream_t stream) {
  int device = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  const Basis basis = chip_basis(p.gram_type, p.samples, shared);
  // Only what lies in the workspace limits how many Grams are worked on at a time.
  const bool chip_only = basis != Basis::kNone && p.eigenvalues != nullptr;
  const unsigned blocks = static_cast<unsigned>(chip_only ? p.count : std::min(p.workers, p.count));
  if (basis == Basis::kNone) {
    const int64_t threads =
        std::clamp<int64_t>((p.samples + 31) / 32 * 32, kChipThreads, kMaxThreads);
    spectrum_kernel<T><<<blocks, static_cast<unsigned>(threads), kTeamBytes, stream>>>(p);
  } else {
    const int bytes = static_cast<int>(chip_bytes(p.gram_type, p.samples, basis));
    error = cudaFuncSetAttribute(chip_spectrum_kernel<T>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    chip_spectrum_kernel<T><<<blocks, kChipThreads, bytes, stream>>>(p, basis);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t cuda_spectrum(const SpectrumParams& p, cudaStream_t stream) {
  if (p.count == 0 || p.samples == 0) return cudaSuccess;
  return p.gram_type == Scalar::kFloat64 ? launch<double>(p, stream) : launch<float>(p, stream);
}

}  // namespace lightning_mat
