// A thread has one column of one sample and takes the tokens in their order: no atomics, the same
// bits every time.

#include <cuda_runtime.h>

#include "rows.h"

namespace lightning_mat {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(RowsParams p) {
  const int64_t s = blockIdx.x, column = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  T* table = static_cast<T*>(p.table) + s * p.rows * p.columns + column;
  const T* values = static_cast<const T*>(p.values) + s * p.tokens * p.columns + column;
  const int64_t* index = p.index + s * p.tokens;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t row = index[t] - p.first;
    if (row >= 0 && row < p.rows) table[row * p.columns] += values[t * p.columns];
  }
}

}  // namespace

cudaError_t cuda_add_rows(const RowsParams& p, cudaStream_t stream) {
  if (p.samples == 0 || p.columns == 0 || p.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(p.samples),
                  static_cast<unsigned>((p.columns + kThreads - 1) / kThreads));
  if (p.type == Scalar::kFloat64) {
    rows_kernel<double><<<grid, kThreads, 0, stream>>>(p);
  } else {
    rows_kernel<float><<<grid, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace lightning_mat
