// Adding tokens' vectors to the rows of an embedding's table, on the device.

#pragma once

#include <cuda_runtime_api.h>

#include "../mntk.h"

namespace lightning_mat {

// Returns the launch's error.
cudaError_t cuda_add_rows(const RowsParams& p, cudaStream_t stream);

}  // namespace lightning_mat
