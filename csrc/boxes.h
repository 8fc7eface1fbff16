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

// The addresses of a box that is not empty, of elements of `item` bytes in memory that begins at
// `full` and `flat`, after `words` words of other boxes.
inline BoxCopy box_copy(BoxRecord b, void* full, void* flat, int64_t item, int64_t words) {
  if (b.rows == 1 || b.stride == b.run) {
    b.run *= b.rows;
    b.rows = 1;
    b.stride = b.run;
  }
  BoxCopy copy{static_cast<unsigned char*>(full) + b.offset * item,
               static_cast<unsigned char*>(flat) + b.flat * item,
               0,
               b.rows,
               0,
               words,
               16};
  const auto all = reinterpret_cast<uintptr_t>(copy.full) | reinterpret_cast<uintptr_t>(copy.flat) |
                   static_cast<uintptr_t>(b.stride * item) | static_cast<uintptr_t>(b.run * item);
  while (all % static_cast<uintptr_t>(copy.width) != 0) copy.width /= 2;
  copy.stride = b.stride * item / copy.width;
  copy.run = b.run * item / copy.width;
  return copy;
}

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
