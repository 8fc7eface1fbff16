// The launch of the kernel for embeddings.

#include <cuda_runtime.h>

#include "rows.h"
#include "rows_kernel.h"

namespace lightning_mat {

cudaError_t cuda_add_rows(const RowsParams& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows_blocks(p));
  if (blocks == 0) return cudaSuccess;
  if (p.type == Scalar::kFloat64) {
    rows_kernel<double><<<blocks, kRowsThreads, 0, stream>>>(p);
  } else {
    rows_kernel<float><<<blocks, kRowsThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lightning_mat
