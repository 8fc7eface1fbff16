// Launches the Gram kernel.

#include <cuda_runtime.h>

#include "gram_kernel.h"
#include "gram_launch.h"

namespace lightning_mat {

cudaError_t cuda_gram(const GramLaunch& launch, cudaStream_t stream) {
  if (launch.item_count == 0 || launch.samples == 0) return cudaSuccess;
  const GramKernel kernel = gram_kernel_for(launch);
  const int bytes = static_cast<int>(gram_shared_bytes(launch));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(launch.item_count), kGramThreads, bytes, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace lightning_mat
