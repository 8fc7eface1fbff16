// Copies of boxes between tensors and one flat tensor: plain structs, no torch types.

#pragma once

#include <cstdint>

#ifdef LIGHTNING_MAT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lightning_mat {

// A row of the table: `rows` runs of `run` elements, `stride` apart, from `offset` on in the memory
// of tensor `full`; side by side from `flat` on in the flat tensor.
struct BoxRecord {
  int64_t full, offset, stride, rows, run, flat;
};
static_assert(sizeof(BoxRecord) == 6 * sizeof(int64_t), "BoxRecord mirrors a row of the table");

// A box with its addresses. Lengths are in words of `width` bytes, the widest that fit it.
struct BoxCopy {
  unsigned char* full;
  unsigned char* flat;
  int64_t stride, rows, run;
  int64_t first;  // words of all boxes before this one
  int64_t width;  // 16, 8, 4, 2 or 1
};

struct BoxesParams {
  const BoxCopy* boxes;
  int64_t count, words;  // of all boxes
  bool gather;           // to the flat tensor; from there otherwise
};

void cpu_copy_boxes(const BoxesParams& p);

#ifdef LIGHTNING_MAT_WITH_CUDA
// `p.boxes` is on the device. Returns the launch's error, for the caller to raise.
cudaError_t cuda_copy_boxes(const BoxesParams& p, cudaStream_t stream);
#endif

}  // namespace lightning_mat
