// The extension's operations: schemas, checks, dispatch to the CPU and the CUDA kernels, and what
// the library was built with.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/backend.h"
#include "lanczos.h"
#include "lightning_mat_build.h"  // written by build_tools/extension.py
#include "mntk.h"
#include "pass.h"
#include "plan.h"

#ifdef LIGHTNING_MAT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/backend.h"
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

// Checks the pieces themselves.
void check_pieces(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  const Piece* all = piece_data(pieces);
  const int64_t units = grams.size(0), rows = grad.size(1), columns = grad.size(2);
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
  }
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

// A pass's arguments, checked; the plan is decoded.
std::vector<LayerPlan> check_pass(const Tensor& grams, const Tensor& eigenvalues,
                                  const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                  const Tensor& plan, const std::string& precision,
                                  int64_t workspace) {
  check_grams(grams);
  TORCH_CHECK_VALUE(grams.is_contiguous() && eigenvalues.is_contiguous(),
                    "grams and eigenvalues must be contiguous, since they are modified in place, "
                    "got strides ",
                    grams.strides(), " and ", eigenvalues.strides());
  TORCH_CHECK_VALUE(eigenvalues.dim() == 2 && eigenvalues.size(1) == grams.size(1) &&
                        eigenvalues.scalar_type() == at::kDouble &&
                        eigenvalues.device() == grams.device(),
                    "eigenvalues must be a float64 tensor [units, ", grams.size(1), "] on ",
                    grams.device(), ", got shape ", eigenvalues.sizes(), " of type ",
                    eigenvalues.scalar_type(), " on ", eigenvalues.device());
  TORCH_CHECK_VALUE(plan.dim() == 1 && plan.scalar_type() == at::kLong && plan.device().is_cpu() &&
                        plan.is_contiguous(),
                    "plan must be a contiguous int64 tensor [words] on the CPU, got shape ",
                    plan.sizes(), " of type ", plan.scalar_type(), " on ", plan.device());
  TORCH_CHECK_VALUE(precision == "float32" || precision == "tf32" || precision == "bf16",
                    "precision must be float32, tf32 or bf16, got ", precision);
  TORCH_CHECK_VALUE(workspace > 0, "workspace must be a positive number of bytes, got ", workspace);
  TORCH_CHECK_VALUE(a.size() == b.size(), "a and b must come in pairs, got ", a.size(), " and ",
                    b.size());
  for (const std::vector<Tensor>* tensors : {&a, &b}) {
    for (const Tensor& t : *tensors) {
      TORCH_CHECK_VALUE(t.device() == grams.device(), "a captured tensor is on ", t.device(),
                        " and grams on ", grams.device(), ": put all on one device");
    }
  }
  try {
    return decode_plan(plan.const_data_ptr<int64_t>(), plan.numel(), grams.size(0),
                       eigenvalues.size(0), grams.size(1));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

// Runs a whole pass: Grams and eigenvalues start as zeros, `accumulate` adds to them.
template <auto accumulate>
std::tuple<Tensor, Tensor> mntk_spectra(const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                        const Tensor& plan, int64_t units, int64_t samples,
                                        int64_t slots, std::string precision, int64_t workspace,
                                        bool keep_grams) {
  TORCH_CHECK_VALUE(!b.empty(), "no layers were captured: pass at least one pair a, b");
  TORCH_CHECK_VALUE(units >= 0 && samples >= 0 && slots >= 0,
                    "units, samples and slots must not be "
                    "negative, got ",
                    units, ", ", samples, " and ", slots);
  TORCH_CHECK_VALUE(!keep_grams || slots == units, "to keep ", units,
                    " Grams takes as many slots, got ", slots);
  bool wide = true;  // float64 Grams where everything captured is
  for (const Tensor& t : b) wide = wide && t.scalar_type() == at::kDouble;
  const auto options = b[0].options().requires_grad(false);
  const Tensor grams =
      at::zeros({slots, samples, samples}, options.dtype(wide ? at::kDouble : at::kFloat));
  const Tensor eigenvalues = at::zeros({units, samples}, options.dtype(at::kDouble));
  accumulate(grams, eigenvalues, a, b, plan, precision, workspace);
  return {eigenvalues, keep_grams ? grams : at::empty({0, samples, samples}, grams.options())};
}

// ---- CPU ------------------------------------------------------------------------------------

void gram_accumulate_cpu(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  check_accumulate(grams, grad, pieces);
  check_pieces(grams, grad, pieces);
  cpu_gram_accumulate(grams, grad, piece_data(pieces), pieces.size(0));
}

void solve_on_cpu(const Tensor&, const SpectrumParams& p) { cpu_spectrum(p); }

void mntk_accumulate_cpu(const Tensor& grams, const Tensor& eigenvalues,
                         const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                         const Tensor& plan, std::string precision, int64_t workspace) {
  const auto layers = check_pass(grams, eigenvalues, a, b, plan, precision, workspace);
  run_pass(*cpu_backend(grams, eigenvalues), layers, a, b, grams.size(1), workspace,
           /*tf32=*/false);
}

Tensor gram_eigenvalues_cpu(const Tensor& grams) { return eigenvalues_with(grams, solve_on_cpu); }

std::tuple<Tensor, Tensor> gram_extremes_cpu(const Tensor& grams) {
  return extremes_with(grams, solve_on_cpu);
}

// ---- CUDA -----------------------------------------------------------------------------------

#ifdef LIGHTNING_MAT_WITH_CUDA

void gram_accumulate_cuda(const Tensor& grams, const Tensor& grad, const Tensor& pieces) {
  check_accumulate(grams, grad, pieces);
  check_pieces(grams, grad, pieces);
  const c10::cuda::CUDAGuard guard(grams.device());
  cuda_gram_accumulate(grams, grad, piece_data(pieces), pieces.size(0));
}

void mntk_accumulate_cuda(const Tensor& grams, const Tensor& eigenvalues,
                          const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                          const Tensor& plan, std::string precision, int64_t workspace) {
  const auto layers = check_pass(grams, eigenvalues, a, b, plan, precision, workspace);
  const c10::cuda::CUDAGuard guard(grams.device());
  run_pass(*cuda_backend(grams, eigenvalues, precision, workspace), layers, a, b, grams.size(1),
           workspace, precision == "tf32");
}

void solve_on_cuda(const Tensor& grams, const SpectrumParams& p) {
  const c10::cuda::CUDAGuard guard(grams.device());
  cuda_solve(grams, p);
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
#ifdef _OPENMP
  info["parallel"] = "openmp";
#else
  info["parallel"] = "";  // at::parallel_for runs on one thread
#endif
  return info;
}

}  // namespace

TORCH_LIBRARY(lightning_mat, m) {
  m.def("gram_accumulate_(Tensor(a!) grams, Tensor grad, Tensor pieces) -> ()");
  m.def(
      "mntk_spectra(Tensor[] a, Tensor[] b, Tensor plan, int units, int samples, int slots, "
      "str precision, int workspace, bool keep_grams) -> (Tensor, Tensor)");
  m.def(
      "mntk_accumulate_(Tensor(a!) grams, Tensor(b!) eigenvalues, Tensor[] a, Tensor[] b, "
      "Tensor plan, str precision, int workspace) -> ()");
  m.def("gram_eigenvalues(Tensor grams) -> Tensor");
  m.def("gram_extremes(Tensor grams) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lightning_mat, CPU, m) {
  m.impl("gram_accumulate_", gram_accumulate_cpu);
  m.impl("mntk_spectra", mntk_spectra<mntk_accumulate_cpu>);
  m.impl("mntk_accumulate_", mntk_accumulate_cpu);
  m.impl("gram_eigenvalues", gram_eigenvalues_cpu);
  m.impl("gram_extremes", gram_extremes_cpu);
}

#ifdef LIGHTNING_MAT_WITH_CUDA
TORCH_LIBRARY_IMPL(lightning_mat, CUDA, m) {
  m.impl("gram_accumulate_", gram_accumulate_cuda);
  m.impl("mntk_spectra", mntk_spectra<mntk_accumulate_cuda>);
  m.impl("mntk_accumulate_", mntk_accumulate_cuda);
  m.impl("gram_eigenvalues", gram_eigenvalues_cuda);
  m.impl("gram_extremes", gram_extremes_cuda);
}
#endif

}  // namespace lightning_mat

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operations of lightning_mat; importing it registers them with torch.";
  m.def("build_info", &lightning_mat::build_info, "What the library was compiled with.");
}
