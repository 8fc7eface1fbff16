// Copying small tables to the device within a CUDA graph.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lightning_mat {

// Writes `bytes` of host memory to `to`, [bytes rounded up to 16], through the arguments of
// kernels.
cudaError_t upload_by_arguments(const void* values, int64_t bytes, void* to, cudaStream_t stream);

}  // namespace lightning_mat
