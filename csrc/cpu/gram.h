// Gram accumulation on the CPU, on tensors: the products are BLAS's.

#pragma once

#include <ATen/core/Tensor.h>

#include "../mntk.h"

namespace lightning_mat {

// grams[u] += sum over the pieces of u of V V^T: see GramParams. `pieces` has `count` entries,
// sorted by unit and within the shapes of grams and grad.
void cpu_gram_accumulate(const at::Tensor& grams, const at::Tensor& grad, const Piece* pieces,
                         int64_t count);

}  // namespace lightning_mat
