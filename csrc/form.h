// Forming per-sample gradients, one bounded chunk at a time, from what a backward pass captured.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "chunk.h"
#include "source.h"

namespace lightning_mat {

// Writes the chunk's gradients into `out`, [samples, rows, columns], every sample's contiguous, in
// out's type.
void form_chunk(const at::Tensor& out, const std::vector<Source>& sources, const Chunk& chunk);

// Returns a convolution's patches: [samples, groups, channels * kernel, tokens], of the samples
// [first, last), the groups [g0, g1) and of the columns [c0, c1), which are whole channels.
at::Tensor conv_patches(const Source& source, int64_t first, int64_t last, int64_t g0, int64_t g1,
                        int64_t c0, int64_t c1, at::ScalarType type);

}  // namespace lightning_mat
