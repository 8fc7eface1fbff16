// Grams from products of tokens, without the gradients: for G_s = sum over t of b_st a_st^T,
//   (G G^T)[s, s'] = sum over t, t' of (a_st . a_s't') (b_st . b_s't').

#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

#include "form.h"
#include "ghost_kernels.h"

namespace lightning_mat {

// A device's part: pointers in the parameters are the host's, or not set yet where tensors are
// given.
struct GhostKernels {
  std::function<void(const at::Tensor& elements, const at::Tensor& patches, const PatchParams&)>
      patches;
  std::function<void(const at::Tensor& grams, const at::Tensor& products, const at::Tensor& b,
                     const GhostParams&)>
      sum;
};

// Adds the layer's share to its Grams, whose slots are already zeroed where they are fresh.
// `elements`: numbers that an intermediate may hold at a time.
void add_ghost(const at::Tensor& grams, const LayerPlan& layer, const std::vector<Source>& sources,
               int64_t elements, const GhostKernels& kernels);

// Whether the layer and its sources can go this way: every piece has all columns, and every sample
// has one source, a sum of outer products; convolutions, of one group, from one source. Products of
// all pairs of tokens have to fit `elements` numbers.
bool can_ghost(const LayerPlan& layer, const std::vector<Source>& sources, int64_t samples,
               int64_t elements);

}  // namespace lightning_mat
