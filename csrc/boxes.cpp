// The operations that copy boxes of many tensors to one flat tensor, and back: schemas, checks,
// dispatch.

#include "boxes.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#ifdef LIGHTNING_MAT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/support.h"
#endif

namespace lightning_mat {
namespace {

using at::Tensor;

void check_boxes(const Tensor& flat, const Tensor& boxes) {
  TORCH_CHECK_VALUE(flat.dim() == 1 && flat.is_contiguous(),
                    "flat must be contiguous and of one dimension, got shape ", flat.sizes(),
                    " and strides ", flat.strides());
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 6 && boxes.scalar_type() == at::kLong &&
                        boxes.device().is_cpu() && boxes.is_contiguous(),
                    "boxes must be a contiguous int64 tensor [boxes, 6] on the CPU with the "
                    "columns (full, offset, stride, rows, run, flat), got shape ",
                    boxes.sizes(), " of type ", boxes.scalar_type(), " on ", boxes.device());
}

// How many elements the memory of a tensor spans.
int64_t span_of(const Tensor& full) {
  if (full.numel() == 0) return 0;
  int64_t span = 1;
  for (int64_t d = 0; d < full.dim(); ++d) span += (full.size(d) - 1) * full.stride(d);
  return span;
}

std::vector<int64_t> check_fulls(const std::vector<Tensor>& fulls, const Tensor& flat) {
  std::vector<int64_t> spans;
  spans.reserve(fulls.size());
  for (size_t k = 0; k < fulls.size(); ++k) {
    const Tensor& full = fulls[k];
    TORCH_CHECK_VALUE(full.layout() == at::kStrided, "fulls[", k, "] has layout ", full.layout(),
                      ": pass strided tensors");
    TORCH_CHECK_VALUE(full.scalar_type() == flat.scalar_type(), "fulls[", k, "] has type ",
                      full.scalar_type(), " and flat ", flat.scalar_type(),
                      ": elements are copied as they are");
    TORCH_CHECK_VALUE(full.device() == flat.device(), "fulls[", k, "] is on ", full.device(),
                      " and flat on ", flat.device(), ": put all on one device");
    spans.push_back(span_of(full));
  }
  return spans;
}

void check_record(const BoxRecord& b, int64_t k, const std::vector<int64_t>& spans, int64_t numel) {
  TORCH_CHECK_VALUE(b.full >= 0 && b.full < static_cast<int64_t>(spans.size()), "boxes[", k,
                    "] is of tensor ", b.full, ", but there are ", spans.size());
  TORCH_CHECK_VALUE(b.offset >= 0 && b.stride >= 0 && b.rows >= 0 && b.run >= 0 && b.flat >= 0,
                    "boxes[", k, "] has a negative number: (", b.full, ", ", b.offset, ", ",
                    b.stride, ", ", b.rows, ", ", b.run, ", ", b.flat, ")");
  if (b.rows == 0 || b.run == 0) return;
  TORCH_CHECK_VALUE(b.rows == 1 || b.stride >= b.run, "boxes[", k, "] has rows of ", b.run,
                    " elements, ", b.stride, " apart: they overlap");
  const int64_t span = spans[static_cast<size_t>(b.full)];
  // Divided, since products of wrong numbers overflow.
  TORCH_CHECK_VALUE(b.offset <= span && b.run <= span - b.offset &&
                        (b.rows == 1 || b.rows - 1 <= (span - b.offset - b.run) / b.stride),
                    "boxes[", k, "] has ", b.rows, " rows of ", b.run, " elements, ", b.stride,
                    " apart, from element ", b.offset, " on: fulls[", b.full, "] has ", span,
                    " elements of memory");
  TORCH_CHECK_VALUE(b.flat <= numel && b.rows <= (numel - b.flat) / b.run, "boxes[", k, "] has ",
                    b.rows, " rows of ", b.run, " elements for flat from element ", b.flat,
                    " on, which has ", numel);
}

// Returns the boxes with their addresses, checked.
std::vector<BoxCopy> copies_of(const std::vector<Tensor>& fulls, const Tensor& boxes,
                               const Tensor& flat) {
  check_boxes(flat, boxes);
  const std::vector<int64_t> spans = check_fulls(fulls, flat);
  const auto* records = reinterpret_cast<const BoxRecord*>(boxes.const_data_ptr<int64_t>());
  // Which of the two is written, the caller knows: it has the mutable tensor.
  void* to = const_cast<void*>(flat.const_data_ptr());
  std::vector<BoxCopy> copies;
  copies.reserve(static_cast<size_t>(boxes.size(0)));
  int64_t words = 0;
  for (int64_t k = 0; k < boxes.size(0); ++k) {
    const BoxRecord& b = records[k];
    check_record(b, k, spans, flat.numel());
    if (b.rows == 0 || b.run == 0) continue;
    const Tensor& full = fulls[static_cast<size_t>(b.full)];
    const BoxCopy copy =
        box_copy(b, const_cast<void*>(full.const_data_ptr()), to, flat.element_size(), words);
    words += copy.rows * copy.run;
    copies.push_back(copy);
  }
  return copies;
}

BoxesParams params_of(const std::vector<BoxCopy>& copies, bool gather) {
  BoxesParams p{copies.data(), static_cast<int64_t>(copies.size()), 0, gather};
  if (p.count > 0) p.words = copies.back().first + copies.back().rows * copies.back().run;
  return p;
}

// What autograd saved of a tensor that is written is no longer there.
void bump_version(const Tensor& written) {
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

void copy_on_cpu(const Tensor&, const BoxesParams& p) { cpu_copy_boxes(p); }

#ifdef LIGHTNING_MAT_WITH_CUDA
void copy_on_cuda(const Tensor& flat, BoxesParams p) {
  const c10::cuda::CUDAGuard guard(flat.device());
  const Tensor table =
      upload(p.boxes, p.count * static_cast<int64_t>(sizeof(BoxCopy)), flat.device());
  p.boxes = static_cast<const BoxCopy*>(table.const_data_ptr());
  check_launch(cuda_copy_boxes(p, c10::cuda::getCurrentCUDAStream()), "the copy of boxes", flat);
}
#endif

template <auto copy>
void gather_boxes(const std::vector<Tensor>& fulls, const Tensor& boxes, const Tensor& flat) {
  const std::vector<BoxCopy> copies = copies_of(fulls, boxes, flat);
  if (!copies.empty()) copy(flat, params_of(copies, /*gather=*/true));
  bump_version(flat);
}

template <auto copy>
void scatter_boxes(const Tensor& flat, const Tensor& boxes, const std::vector<Tensor>& fulls) {
  const std::vector<BoxCopy> copies = copies_of(fulls, boxes, flat);
  if (!copies.empty()) copy(flat, params_of(copies, /*gather=*/false));
  for (const Tensor& full : fulls) bump_version(full);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lightning_mat, m) {
  m.def("gather_boxes(Tensor[] fulls, Tensor boxes, Tensor(a!) flat) -> ()");
  m.def("scatter_boxes(Tensor flat, Tensor boxes, Tensor(a!)[] fulls) -> ()");
}

TORCH_LIBRARY_IMPL(lightning_mat, CPU, m) {
  m.impl("gather_boxes", gather_boxes<copy_on_cpu>);
  m.impl("scatter_boxes", scatter_boxes<copy_on_cpu>);
}

#ifdef LIGHTNING_MAT_WITH_CUDA
TORCH_LIBRARY_IMPL(lightning_mat, CUDA, m) {
  m.impl("gather_boxes", gather_boxes<copy_on_cuda>);
  m.impl("scatter_boxes", scatter_boxes<copy_on_cuda>);
}
#endif

}  // namespace lightning_mat
