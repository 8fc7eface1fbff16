// Adding tokens' vectors to the rows of an embedding's table. A thread has one column of one sample
// and takes the tokens in their order: no atomics, the same bits every time.

#pragma once

#include <cstdint>

#include "../mntk.h"
#include "device.h"

namespace lightning_mat {

constexpr int kRowsThreads = 128;

inline int64_t rows_blocks(const RowsParams& p) {
  return p.rows == 0 ? 0 : p.samples * ((p.columns + kRowsThreads - 1) / kRowsThreads);
}

template <class T>
__global__ void __launch_bounds__(kRowsThreads) rows_kernel(RowsParams p) {
  const int64_t s = blockIdx.x % p.samples;
  const int64_t column = blockIdx.x / p.samples * kRowsThreads + threadIdx.x;
  if (column >= p.columns) return;
  T* table = static_cast<T*>(p.table) + s * p.rows * p.columns + column;
  const T* values = static_cast<const T*>(p.values) + s * p.tokens * p.columns + column;
  const int64_t* index = p.index + s * p.tokens;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t row = index[t] - p.first;
    if (row >= 0 && row < p.rows) table[row * p.columns] += values[t * p.columns];
  }
}

}  // namespace lightning_mat
