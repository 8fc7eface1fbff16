// What a backward pass captured of a layer.

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

}  // namespace lightning_mat
