// A pass on the device: blocks of gradients are staged one after the other in one arena, and
// everything that is pending is launched at once when the arena is full or the pass is over.

#include "backend.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <vector>

#include "../lanczos.h"
#include "ghost.h"
#include "pending.h"
#include "rows.h"
#include "support.h"

namespace lightning_mat {
namespace {

using at::Tensor;

// What the eigenvalue kernel may take for its work matrices at a time.
constexpr int64_t kSolverBytes = 64 << 20;

Block block_of(const Tensor& grad) {
  Block block{};
  block.grad = grad.const_data_ptr();
  block.sample_stride = grad.stride(0);
  block.row_stride = grad.stride(1);
  block.column_stride = grad.stride(2);
  return block;
}

void patch_products(const Tensor& elements, const Tensor& patches, const PatchParams& params) {
  const int64_t words = params.tokens * params.kernel;
  const Tensor at =
      upload(params.at, words * static_cast<int64_t>(sizeof(int64_t)), patches.device());
  PatchParams p = params;
  p.at = reinterpret_cast<const int64_t*>(at.const_data_ptr());
  p.elements = elements.const_data_ptr();
  p.patches = patches.mutable_data_ptr();
  p.type = scalar_of_type(patches.scalar_type());
  check_launch(cuda_patch_products(p, c10::cuda::getCurrentCUDAStream()), "the products of patches",
               patches);
}

void ghost_sum(const Tensor& grams, const Tensor& products, const Tensor& b,
               const GhostParams& params) {
  std::vector<int64_t> words(params.slots, params.slots + params.runs);
  words.insert(words.end(), params.begins, params.begins + params.runs + 1);
  const Tensor tables =
      upload(words.data(), static_cast<int64_t>(words.size() * sizeof(int64_t)), grams.device());
  GhostParams p = params;
  p.slots = reinterpret_cast<const int64_t*>(tables.const_data_ptr());
  p.begins = p.slots + p.runs;
  p.products = products.const_data_ptr();
  p.b = b.const_data_ptr();
  p.grams = grams.mutable_data_ptr();
  p.type = scalar_of_type(grams.scalar_type());
  check_launch(cuda_ghost_sum(p, c10::cuda::getCurrentCUDAStream()), "the sum over tokens", grams);
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const Tensor& grams, const Tensor& eigenvalues, const std::string& precision,
              int64_t workspace)
      : grams_(grams),
        type_(grams.scalar_type() == at::kDouble ? at::kDouble
              : precision == "bf16"              ? at::kBFloat16
                                                 : at::kFloat),
        workspace_(workspace),
        pending_(grams, eigenvalues, type_,
                 precision == "tf32" ? Precision::kTF32 : Precision::kFloat32) {}

  void begin(const LayerPlan& layer) override {
    layer_ = layer;
    for (int64_t k = 0; k < layer.target_count; ++k) {
      // A Gram's place that is taken again belongs to another unit from here on.
      if (layer.targets[k].fresh != 0 && pending_.has(layer.targets[k].slot)) flush();
    }
    for (int64_t k = 0; k < layer.target_count; ++k) {
      Target& target = pending_.target(layer.targets[k].slot);
      target.fresh |= layer.targets[k].fresh;
    }
  }

  Tensor stage(int64_t rows, int64_t columns) override {
    const auto scalar = static_cast<int64_t>(c10::elementSize(type_));
    // Every sample's gradient starts at 16 bytes, so that it can be read by as many at a time.
    const int64_t per_16 = 16 / scalar;
    const int64_t pitch = (rows * columns + per_16 - 1) / per_16 * per_16;
    const int64_t bytes = grams_.size(1) * pitch * scalar;
    if (used_ > 0 && used_ + bytes > arena_.numel()) flush();
    if (!arena_.defined() || arena_.numel() < bytes) {
      arena_ = Tensor();
      arena_ = at::empty({std::max(bytes, workspace_)}, grams_.options().dtype(at::kByte));
    }
    const Tensor memory = arena_.narrow(0, used_, bytes).view(type_);
    used_ += bytes;
    return memory.as_strided({grams_.size(1), rows, columns}, {pitch, columns, 1});
  }

  bool reads(const Tensor& grad) const override { return grad.scalar_type() == type_; }

  void add(const Tensor& block, const std::vector<Piece>& pieces) override {
    add_parts(block_of(block), pieces, {block});
  }

  bool add_chip(const Source& source, const std::vector<Piece>& pieces) override {
    if (source.a.scalar_type() != type_ || source.b.scalar_type() != type_) return false;
    Block block{};
    block.a = source.a.const_data_ptr();
    block.b = source.b.const_data_ptr();
    block.a_sample = source.a.stride(0);
    block.a_token = source.a.stride(1);
    block.a_column = source.a.stride(2);
    block.b_sample = source.b.stride(0);
    block.b_token = source.b.stride(1);
    block.b_row = source.b.stride(2);
    block.tokens = source.tokens();
    add_parts(block, pieces, {source.a, source.b});
    return true;
  }

  void add_ghost(const LayerPlan& layer, const std::vector<Source>& sources,
                 int64_t elements) override {
    flush();  // what is pending comes first, and what is fresh becomes zero
    lightning_mat::add_ghost(grams_, layer, sources, elements, {patch_products, ghost_sum});
    for (int64_t k = 0; k < layer.target_count; ++k) pending_.target(layer.targets[k].slot);
  }

  void end(const LayerPlan& layer) override {
    for (int64_t k = 0; k < layer.target_count; ++k) {
      pending_.target(layer.targets[k].slot).row = layer.targets[k].row;
    }
  }

  void finish() override { flush(); }

  at::ScalarType type() const override { return type_; }

 private:
  // Each part of a block is a share of its own.
  void add_parts(const Block& block, const std::vector<Piece>& pieces,
                 const std::vector<Tensor>& held) {
    for (const std::vector<Piece>& part : in_parts(pieces, pending_.most_items())) {
      int64_t items = 0;
      for (const Piece& piece : part) items += items_of(piece);
      // What is staged stays where it is: the arena is free only when all of it was launched.
      if (pending_.items() + items > pending_.most_items()) pending_.launch();
      pending_.add(block, part, layer_.targets, held);
    }
  }

  void flush() {
    pending_.launch();
    used_ = 0;
  }

  Tensor grams_;
  at::ScalarType type_;
  int64_t workspace_;
  Pending pending_;
  Tensor arena_;
  int64_t used_ = 0;
  LayerPlan layer_{};
};

}  // namespace

std::unique_ptr<Backend> cuda_backend(const Tensor& grams, const Tensor& eigenvalues,
                                      const std::string& precision, int64_t workspace) {
  return std::make_unique<CudaBackend>(grams, eigenvalues, precision, workspace);
}

void cuda_gram_accumulate(const Tensor& grams, const Tensor& grad, const Piece* pieces,
                          int64_t count) {
  if (count == 0 || grams.numel() == 0) return;
  Pending pending(grams, Tensor(), grad.scalar_type(), Precision::kFloat32);
  std::vector<TargetRecord> targets;
  std::vector<Piece> local;
  for (int64_t k = 0; k < count; ++k) {
    if (targets.empty() || targets.back().slot != pieces[k].unit) {
      targets.push_back({pieces[k].unit, 0, -1});
    }
    local.push_back(pieces[k]);
    local.back().unit = static_cast<int64_t>(targets.size()) - 1;
  }
  for (const std::vector<Piece>& part : in_parts(local, pending.most_items())) {
    pending.add(block_of(grad), part, targets.data(), {grad});
    pending.launch();
  }
}

void cuda_add_token_rows(const Tensor& table, const Tensor& index, const Tensor& values,
                         int64_t first) {
  RowsParams p{};
  p.table = table.mutable_data_ptr();
  p.values = values.const_data_ptr();
  p.index = index.const_data_ptr<int64_t>();
  p.samples = table.size(0);
  p.rows = table.size(1);
  p.columns = table.size(2);
  p.tokens = index.size(1);
  p.first = first;
  p.type = scalar_of_type(table.scalar_type());
  check_launch(cuda_add_rows(p, c10::cuda::getCurrentCUDAStream()),
               "the sum over an embedding's tokens", table);
}

void cuda_solve(const Tensor& grams, SpectrumParams p) {
  p.grams = grams.const_data_ptr();
  p.gram_type = scalar_of_type(grams.scalar_type());
  p.samples = grams.size(1);
  const int64_t doubles = lanczos_workspace(p.samples);
  const auto bytes = doubles * static_cast<int64_t>(sizeof(double));
  p.workers = std::min<int64_t>(p.count, std::max<int64_t>(kSolverBytes / bytes, 1));
  const Tensor workspace = at::empty({p.workers * doubles}, grams.options().dtype(at::kDouble));
  p.workspace = workspace.mutable_data_ptr<double>();
  check_launch(cuda_spectrum(p, c10::cuda::getCurrentCUDAStream()), "the eigenvalue kernel", grams);
}

}  // namespace lightning_mat
