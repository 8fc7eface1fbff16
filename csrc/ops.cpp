// The extension's operations: schemas, checks, dispatch to the CPU and the CUDA kernels, and what
// the library was built with.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/gram.h"
#include "lanczos.h"
#include "lightning_mat_build.h"  // written by build_tools/extension.py
#include "mntk.h"

#ifdef LIGHTNING_MAT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace lightning_mat {
namespace {

using at::Tensor;

Scalar scalar_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Scalar::kFloat64;
    case at::kFloat:
      return Scalar::kFloat32;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    case at::kHalf:
      return Scalar::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, "grad has type ", t.scalar_type(),
                        ": pass float64, float32, bfloat16 or float16");
  }
}

void check_grams(const Tensor& grams) {
  TORCH_CHECK_VALUE(grams.dim() == 3 && grams.size(1) == grams.size(2),
                    "grams must be [units, samples, samples], got shape ", grams.sizes());
  TORCH_CHECK_VALUE(grams.scalar_type() == at::kFloat || grams.scalar_type() == at::kDouble,
                    "grams has type ", grams.scalar_type(),
                    ": Grams are float32 or float64, whatever the gradients are");
}

void check_accumulate(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  check_grams(grams);
  TORCH_CHECK_VALUE(grams.is_contiguous(),
                    "grams must be contiguous, since it is modified in place, got strides ",
                    grams.strides());
  TORCH_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == grams.size(1),
                    "grad must be [samples, rows, columns] with the ", grams.size(1),
                    " samples of grams, got shape ", grad.sizes());
  TORCH_CHECK_VALUE(grad.device() == grams.device(), "grad is on ", grad.device(), " and grams on ",
                    grams.device(), ": put both on one device");
  scalar_of(grad);
  TORCH_CHECK_VALUE(pieces.dim() == 2 && pieces.size(1) == 5 && pieces.scalar_type() == at::kLong &&
                        pieces.device().is_cpu() && pieces.is_contiguous(),
                    "pieces must be a contiguous int64 tensor [pieces, 5] on the CPU with the "
                    "columns (unit, r0, r1, c0, c1), got shape ",
                    pieces.sizes(), " of type ", pieces.scalar_type(), " on ", pieces.device());
}

const Piece* piece_data(const Tensor& pieces) {
  return reinterpret_cast<const Piece*>(pieces.const_data_ptr<int64_t>());
}

// Checks the pieces themselves and returns where each unit's begin and end.
std::vector<Segment> check_pieces(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  const Piece* all = piece_data(pieces);
  const int64_t units = grams.size(0), rows = grad.size(1), columns = grad.size(2);
  std::vector<Segment> segments;
  for (int64_t k = 0; k < pieces.size(0); ++k) {
    const Piece& p = all[k];
    TORCH_CHECK_VALUE(p.unit >= 0 && p.unit < units, "pieces[", k, "] belongs to unit ", p.unit,
                      ", but grams has ", units, " units");
    TORCH_CHECK_VALUE(
        0 <= p.r0 && p.r0 <= p.r1 && p.r1 <= rows && 0 <= p.c0 && p.c0 <= p.c1 && p.c1 <= columns,
        "pieces[", k, "] covers rows [", p.r0, ", ", p.r1, ") and columns [", p.c0, ", ", p.c1,
        "), but grad has ", rows, " rows and ", columns,
        " columns: give the pieces in the chunk's own coordinates");
    TORCH_CHECK_VALUE(k == 0 || all[k - 1].unit <= p.unit, "pieces[", k, "] belongs to unit ",
                      p.unit, " and follows one of unit ", all[k - 1].unit,
                      ": sort the pieces by unit");
    if (k == 0 || all[k - 1].unit != p.unit) segments.push_back({k, k});
    segments.back().last = k + 1;
  }
  return segments;
}

SpectrumParams spectrum_params(const Tensor& grams) {
  SpectrumParams p{};
  p.grams = grams.const_data_ptr();
  p.gram_type = scalar_of(grams);
  p.count = grams.size(0);
  p.samples = grams.size(1);
  return p;
}

// Runs `solve` on the parameters for all eigenvalues.
template <class Solve>
Tensor eigenvalues_with(const Tensor& input, Solve solve) {
  check_grams(input);
  const Tensor grams = input.contiguous();
  const Tensor all = at::empty({grams.size(0), grams.size(1)}, grams.options().dtype(at::kDouble));
  SpectrumParams p = spectrum_params(grams);
  p.eigenvalues = all.mutable_data_ptr<double>();
  if (all.numel() > 0) solve(grams, p);
  return all;
}

// Runs `solve` on the parameters for the extremes.
template <class Solve>
std::tuple<Tensor, Tensor> extremes_with(const Tensor& input, Solve solve) {
  check_grams(input);
  TORCH_CHECK_VALUE(input.size(1) > 0, "grams of shape ", input.sizes(),
                    " have no eigenvalues: measure at least one sample");
  const Tensor grams = input.contiguous();
  const Tensor largest = at::empty({grams.size(0)}, grams.options().dtype(at::kDouble));
  const Tensor smallest = at::empty_like(largest);
  SpectrumParams p = spectrum_params(grams);
  p.largest = largest.mutable_data_ptr<double>();
  p.smallest = smallest.mutable_data_ptr<double>();
  if (p.count > 0) solve(grams, p);
  return {largest, smallest};
}

// ---- CPU ------------------------------------------------------------------------------------

void gram_accumulate_cpu(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  check_accumulate(grams, grad, pieces);
  check_pieces(grams, grad, pieces);
  cpu_gram_accumulate(grams, grad, piece_data(pieces), pieces.size(0));
}

void solve_on_cpu(const Tensor&, const SpectrumParams& p) { cpu_spectrum(p); }

Tensor gram_eigenvalues_cpu(const Tensor& grams) { return eigenvalues_with(grams, solve_on_cpu); }

std::tuple<Tensor, Tensor> gram_extremes_cpu(const Tensor& grams) {
  return extremes_with(grams, solve_on_cpu);
}

// ---- CUDA -----------------------------------------------------------------------------------

#ifdef LIGHTNING_MAT_WITH_CUDA

// What the eigenvalue kernel may take for its work matrices at a time.
constexpr int64_t kWorkspaceBytes = 64 << 20;

// Copies host values to the device on the current stream, without waiting for it: the pinned
// buffer stays reserved until the copy is done.
template <class T>
Tensor upload(const T* values, int64_t count, const at::Device& device) {
  constexpr int64_t kWords = sizeof(T) / sizeof(int64_t);
  const auto options = at::TensorOptions().dtype(at::kLong);
  const Tensor pinned = at::empty({count * kWords}, options.pinned_memory(true));
  std::copy_n(reinterpret_cast<const int64_t*>(values), count * kWords,
              pinned.mutable_data_ptr<int64_t>());
  return pinned.to(device, /*non_blocking=*/true);
}

void gram_accumulate_cuda(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  check_accumulate(grams, grad, pieces);
  const std::vector<Segment> segments = check_pieces(grams, grad, pieces);
  if (segments.empty() || grad.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(grams.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor device_pieces = upload(piece_data(pieces), pieces.size(0), grams.device());
  const Tensor device_segments =
      upload(segments.data(), static_cast<int64_t>(segments.size()), grams.device());
  GramParams p{};
  p.grad = grad.const_data_ptr();
  p.sample_stride = grad.stride(0);
  p.row_stride = grad.stride(1);
  p.column_stride = grad.stride(2);
  p.pieces = reinterpret_cast<const Piece*>(device_pieces.const_data_ptr<int64_t>());
  p.segments = reinterpret_cast<const Segment*>(device_segments.const_data_ptr<int64_t>());
  p.segment_count = static_cast<int64_t>(segments.size());
  p.grams = grams.mutable_data_ptr();
  p.samples = grams.size(1);
  p.grad_type = scalar_of(grad);
  p.gram_type = scalar_of(grams);
  const cudaError_t error = cuda_gram_accumulate(p, stream);
  TORCH_CHECK(error == cudaSuccess, "gram_accumulate_ could not start on ", grams.device(), ": ",
              cudaGetErrorString(error), " (grams ", grams.sizes(), ", grad ", grad.sizes(), ", ",
              pieces.size(0), " pieces)");
}

void solve_on_cuda(const Tensor& grams, SpectrumParams p) {
  const c10::cuda::CUDAGuard guard(grams.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t doubles = lanczos_workspace(p.samples);
  p.workers = std::min<int64_t>(p.count, kWorkspaceBytes / (doubles * sizeof(double)));
  TORCH_CHECK_VALUE(p.workers > 0, "grams of shape ", grams.sizes(), " have too many samples for ",
                    grams.device(), ": move them to the CPU, or measure fewer samples");
  const Tensor workspace = at::empty({p.workers * doubles}, grams.options().dtype(at::kDouble));
  p.workspace = workspace.mutable_data_ptr<double>();
  const cudaError_t error = cuda_spectrum(p, stream);
  TORCH_CHECK(error == cudaSuccess, "the eigenvalues of grams ", grams.sizes(),
              " could not start on ", grams.device(), ": ", cudaGetErrorString(error));
}

Tensor gram_eigenvalues_cuda(const Tensor& grams) { return eigenvalues_with(grams, solve_on_cuda); }

std::tuple<Tensor, Tensor> gram_extremes_cuda(const Tensor& grams) {
  return extremes_with(grams, solve_on_cuda);
}

#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = LIGHTNING_MAT_BUILD_VERSION;
  info["torch"] = LIGHTNING_MAT_BUILD_TORCH;
  info["backends"] = LIGHTNING_MAT_BUILD_BACKENDS;
  info["reason"] = LIGHTNING_MAT_BUILD_REASON;
  info["cuda"] = LIGHTNING_MAT_BUILD_CUDA;
  info["arch_list"] = LIGHTNING_MAT_BUILD_ARCH_LIST;
  info["compiler"] = LIGHTNING_MAT_BUILD_COMPILER;
  return info;
}

}  // namespace

TORCH_LIBRARY(lightning_mat, m) {
  m.def("gram_accumulate_(Tensor(a!) grams, Tensor grad, Tensor pieces) -> ()");
  m.def("gram_eigenvalues(Tensor grams) -> Tensor");
  m.def("gram_extremes(Tensor grams) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lightning_mat, CPU, m) {
  m.impl("gram_accumulate_", gram_accumulate_cpu);
  m.impl("gram_eigenvalues", gram_eigenvalues_cpu);
  m.impl("gram_extremes", gram_extremes_cpu);
}

#ifdef LIGHTNING_MAT_WITH_CUDA
TORCH_LIBRARY_IMPL(lightning_mat, CUDA, m) {
  m.impl("gram_accumulate_", gram_accumulate_cuda);
  m.impl("gram_eigenvalues", gram_eigenvalues_cuda);
  m.impl("gram_extremes", gram_extremes_cuda);
}
#endif

}  // namespace lightning_mat

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of lightning_mat; importing it registers them with torch.";
  m.def("build_info", &lightning_mat::build_info, "What the library was compiled with.");
}
