// The launch of the copies of boxes.

#include <cuda_runtime.h>

#include "boxes_kernel.h"

namespace lightning_mat {

cudaError_t cuda_copy_boxes(const BoxesParams& p, cudaStream_t stream) {
  boxes_kernel<<<static_cast<unsigned>(boxes_blocks(p)), kBoxesThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace lightning_mat
