// Adding tokens' vectors to the rows of an embedding's table, on the device.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../mntk.h"

namespace lightning_mat {

struct RowsParams {
  void* table;           // [samples, rows, columns]
  const void* values;    // [samples, tokens, columns]
  const int64_t* index;  // [samples, tokens]: rows of the whole table
  int64_t samples, rows, columns, tokens;
  int64_t first;  // the table's first row, of the whole one
  Scalar type;    // of table and values: float32 or float64
};

// Returns the launch's error.
cudaError_t cuda_add_rows(const RowsParams& p, cudaStream_t stream);

}  // namespace lightning_mat
