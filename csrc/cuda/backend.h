// The device's part of a pass, on tensors. Nothing here waits for the device.

#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "../mntk.h"
#include "../pass.h"

namespace lightning_mat {

// All on the current device and stream; errors of launches are raised as RuntimeErrors.

std::unique_ptr<Backend> cuda_backend(const at::Tensor& grams, const at::Tensor& eigenvalues,
                                      const std::string& precision, int64_t workspace);

// grams[u] += sum over the pieces of u of V V^T; `pieces` has `count` entries, sorted by unit.
void cuda_gram_accumulate(const at::Tensor& grams, const at::Tensor& grad, const Piece* pieces,
                          int64_t count);

// table [samples, rows, columns] += the vectors [samples, tokens, columns] of tokens whose row,
// index [samples, tokens], is `first` or one of those after it; float32 or float64, contiguous.
void cuda_add_token_rows(const at::Tensor& table, const at::Tensor& index, const at::Tensor& values,
                         int64_t first);

// Solves the Grams that `params` names; allocates the workspace.
void cuda_solve(const at::Tensor& grams, SpectrumParams params);

}  // namespace lightning_mat
