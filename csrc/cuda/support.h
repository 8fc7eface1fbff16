// What the device's host code shares: types, errors of launches, tables.

#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../mntk.h"

namespace lightning_mat {

Scalar scalar_of_type(at::ScalarType type);

// Raises a RuntimeError that names what could not start, and the shape it was for.
void check_launch(cudaError_t error, const char* what, const at::Tensor& grams);

// Copies host values to the device on the current stream, without waiting for it.
at::Tensor upload(const void* values, int64_t bytes, const at::Device& device);

}  // namespace lightning_mat
