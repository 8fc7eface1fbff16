#include "support.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>

#include "upload.h"

namespace lightning_mat {

using at::Tensor;

Scalar scalar_of_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Scalar::kFloat64;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    case at::kHalf:
      return Scalar::kFloat16;
    default:
      return Scalar::kFloat32;
  }
}

void check_launch(cudaError_t error, const char* what, const Tensor& grams) {
  TORCH_CHECK(error == cudaSuccess, what, " could not start on ", grams.device(), ": ",
              cudaGetErrorString(error), " (a tensor of shape ", grams.sizes(), ")");
}

Tensor upload(const void* values, int64_t bytes, const at::Device& device) {
  const auto options = at::TensorOptions().dtype(at::kByte);
  const int64_t padded = (bytes + 15) / 16 * 16;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    // A graph would copy from the host's memory at every replay, when these values are gone:
    // kernels keep their arguments.
    const Tensor on_device = at::empty({padded}, options.device(device));
    const cudaError_t error =
        upload_by_arguments(values, bytes, on_device.mutable_data_ptr(), stream);
    TORCH_CHECK(error == cudaSuccess, "cannot copy tables to ", device, ": ",
                cudaGetErrorString(error));
    return on_device;
  }
  // The pinned buffer stays reserved until the copy is done.
  const Tensor pinned = at::empty({padded}, options.pinned_memory(true));
  std::memcpy(pinned.mutable_data_ptr(), values, static_cast<size_t>(bytes));
  return pinned.to(device, /*non_blocking=*/true);
}

}  // namespace lightning_mat
