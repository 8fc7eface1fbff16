// The CPU's part of a pass, on tensors: the products are BLAS's.

#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "../ghost.h"
#include "../mntk.h"
#include "../pass.h"

namespace lightning_mat {

// grams[u] += sum over the pieces of u of V V^T, V = grad[:, r0:r1, c0:c1] as [samples, elements].
// `pieces` has `count` entries within the shapes of grams and grad; one unit's are neighbours.
void cpu_gram_accumulate(const at::Tensor& grams, const at::Tensor& grad, const Piece* pieces,
                         int64_t count);

GhostKernels cpu_ghost_kernels();

std::unique_ptr<Backend> cpu_backend(const at::Tensor& grams, const at::Tensor& eigenvalues);

}  // namespace lightning_mat
