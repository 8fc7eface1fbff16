// Forming per-sample gradients, one bounded block at a time, from what a backward pass captured.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "plan.h"

namespace lightning_mat {

// A layer's captured tensors, checked against its plan and brought into one form.
struct Source {
  Kind kind;
  at::Tensor a;  // [samples, tokens, columns], or as plan.h says for the kind; may be undefined
  at::Tensor b;
  int64_t first, samples;
  bool adds;
  // Convolutions: channels and rows per group, and one entry per spatial dimension.
  int64_t groups;
  std::vector<int64_t> kernel, stride, dilation, padding;

  int64_t tokens() const;  // summed over: tokens, and the positions of a convolution
  int64_t kernel_size() const;
  int64_t positions() const;  // elements of a channel, of all T inputs of a sample
};

// Returns the sources of a layer, or raises a ValueError that names the tensor that does not fit.
std::vector<Source> check_sources(const LayerPlan& layer, int64_t layer_index,
                                  const std::vector<at::Tensor>& a,
                                  const std::vector<at::Tensor>& b, int64_t samples);

// A rectangle of a layer's gradient that is formed at a time.
struct Chunk {
  int64_t r0, r1, c0, c1;
};

// Cuts what the pieces cover into chunks of at most `elements` elements (per sample), but at least
// what cannot be cut. Depends on the layer and on `elements` alone.
std::vector<Chunk> cut_chunks(const LayerPlan& layer, const std::vector<Source>& sources,
                              int64_t elements);

// Writes the chunk's gradients into `out`, [samples, rows, columns], every sample's contiguous, in
// out's type.
void form_chunk(const at::Tensor& out, const std::vector<Source>& sources, const Chunk& chunk);

// Returns a convolution's patches: [samples, groups, channels * kernel, tokens], of the samples
// [first, last), the groups [g0, g1) and of the columns [c0, c1), which are whole channels.
at::Tensor conv_patches(const Source& source, int64_t first, int64_t last, int64_t g0, int64_t g1,
                        int64_t c0, int64_t c1, at::ScalarType type);

}  // namespace lightning_mat
