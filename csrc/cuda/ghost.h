// The ghost way's kernels on the device: see ghost_kernels.h.

#pragma once

#include <cuda_runtime_api.h>

#include "../ghost_kernels.h"

namespace lightning_mat {

// All pointers are the device's. They return the launch's error.
cudaError_t cuda_patch_products(const PatchParams& p, cudaStream_t stream);
cudaError_t cuda_ghost_sum(const GhostParams& p, cudaStream_t stream);

}  // namespace lightning_mat
