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

// A rectangle of a chunk's per-sample gradients and the unit that owns it: rows [r0, r1), columns
// [c0, c1). It is one row of the int64 tensor `pieces`, read in place.
struct Piece {
  int64_t unit, r0, r1, c0, c1;
};
static_assert(sizeof(Piece) == 5 * sizeof(int64_t), "Piece mirrors one row of `pieces`");

// The pieces [first, last) of one unit.
struct Segment {
  int64_t first, last;
};

// grams[u] += sum over the pieces of u of V V^T, V = grad[:, r0:r1, c0:c1] as [samples, elements].
struct GramParams {
  const void* grad;
  int64_t sample_stride, row_stride, column_stride;  // in elements
  const Piece* pieces;
  const Segment* segments;
  int64_t segment_count;
  void* grams;  // [units, samples, samples], contiguous
  int64_t samples;
  Scalar grad_type, gram_type;
};

// Eigenvalues of `count` symmetric matrices [samples, samples], contiguous.
struct SpectrumParams {
  const void* grams;
  Scalar gram_type;
  int64_t count, samples;
  double* eigenvalues;  // [count, samples] descending, or null where only the extremes are wanted
  double* largest;      // [count], where only the extremes are wanted
  double* smallest;     // [count], likewise
  double* workspace;    // lanczos_workspace(samples) doubles for every worker
  int64_t workers;      // how many Grams are worked on at a time
};

void cpu_spectrum(const SpectrumParams& p);

#ifdef LIGHTNING_MAT_WITH_CUDA
// Return the launch's error, for the caller to raise with the shapes in its message.
cudaError_t cuda_gram_accumulate(const GramParams& p, cudaStream_t stream);
cudaError_t cuda_spectrum(const SpectrumParams& p, cudaStream_t stream);
#endif

}  // namespace lightning_mat
