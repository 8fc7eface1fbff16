// What the kernels take: plain structs of pointers, sizes and strides, no torch types.
//
// ops.cpp checks the tensors, fills these and dispatches; the files in cpu/ and cuda/ compute.

#pragma once

#include <cstdint>

#ifdef LIGHTNING_MAT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lightning_mat {

enum class Scalar { kFloat64, kFloat32, kBFloat16, kFloat16 };

// How products of float32 elements are formed on the device: three TF32 terms (float32's accuracy),
// or one.
enum class Precision { kFloat32, kTF32 };

// A block of per-sample gradients, [samples, rows, columns]: where it lies, or what it is formed
// from.
struct Block {
  const void* grad;                                  // null where it is formed on chip
  int64_t sample_stride, row_stride, column_stride;  // in elements
  // On chip: grad[s][r][c] = sum over t of b[s][t][r] * a[s][t][c]. Strides in elements.
  const void* a;
  const void* b;
  int64_t a_sample, a_token, a_column;
  int64_t b_sample, b_token, b_row;
  int64_t tokens;
};

// A rectangle of a block and the target that owns it: rows [r0, r1), columns [c0, c1).
struct Piece {
  int64_t unit, r0, r1, c0, c1;
};
static_assert(sizeof(Piece) == 5 * sizeof(int64_t), "Piece mirrors five words of a plan");

// What one block gives to one target: the pieces [first, last).
struct Share {
  int64_t block, first, last;
};

// A Gram that is added to: gram = (gram + share) + share ..., and then solved where it is complete.
struct Target {
  int64_t slot;         // its Gram is grams[slot]
  int64_t first, last;  // its shares, in the order in which they are added
  int64_t fresh;        // nonzero: the Gram starts at zero, whatever the memory holds
  int64_t row;          // its eigenvalues go to eigenvalues[row] now; -1 where more is to come
};

// Eigenvalues of `count` symmetric matrices [samples, samples], contiguous.
struct SpectrumParams {
  const void* grams;
  Scalar gram_type;
  int64_t count, samples;
  const int64_t* which;  // [count][2]: Gram and row of the results; null: both are 0, 1, ...
  double* eigenvalues;   // [rows, samples] descending, or null where only the extremes are wanted
  double* largest;       // [rows], where only the extremes are wanted
  double* smallest;      // [rows], likewise
  double* workspace;     // lanczos_workspace(samples) doubles for every worker
  int64_t workers;       // how many Grams are worked on at a time
};

// An embedding: adds tokens' vectors to the rows of a table that they name.
struct RowsParams {
  void* table;           // [samples, rows, columns]
  const void* values;    // [samples, tokens, columns]
  const int64_t* index;  // [samples, tokens]: rows of the whole table
  int64_t samples, rows, columns, tokens;
  int64_t first;  // the table's first row, of the whole one
  Scalar type;    // of table and values: float32 or float64
};

void cpu_spectrum(const SpectrumParams& p);

#ifdef LIGHTNING_MAT_WITH_CUDA
// Returns the launch's error, for the caller to raise with the shapes in its message.
cudaError_t cuda_spectrum(const SpectrumParams& p, cudaStream_t stream);
#endif

}  // namespace lightning_mat
