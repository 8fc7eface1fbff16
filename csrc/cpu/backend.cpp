// A pass on the CPU: blocks of gradients in one workspace, multiplied by BLAS as they are formed.

#include "backend.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace lightning_mat {
namespace {

using at::Tensor;

class CpuBackend : public Backend {
 public:
  CpuBackend(const Tensor& grams, const Tensor& eigenvalues)
      : grams_(grams), eigenvalues_(eigenvalues) {}

  void begin(const LayerPlan& layer) override {
    layer_ = layer;
    // Neighbouring Grams at once: there can be thousands of small ones.
    for (int64_t k = 0; k < layer.target_count;) {
      const TargetRecord* first = layer.targets + k;
      int64_t count = 0;
      while (k + count < layer.target_count && first[count].fresh != 0 &&
             first[count].slot == first->slot + count) {
        ++count;
      }
      if (count > 0) grams_.narrow(0, first->slot, count).zero_();
      k += std::max<int64_t>(count, 1);
    }
  }

  Tensor stage(int64_t rows, int64_t columns) override {
    constexpr int64_t kLine = 16;  // every sample's gradient starts a line of the cache
    const int64_t pitch = (rows * columns + kLine - 1) / kLine * kLine;
    const int64_t elements = grams_.size(1) * pitch;
    // Grows, and is kept from one layer to the next: fresh pages cost as much as the products.
    if (!memory_.defined() || memory_.numel() < elements) {
      memory_ = Tensor();
      memory_ = at::empty({elements}, grams_.options());
    }
    return memory_.as_strided({grams_.size(1), rows, columns}, {pitch, columns, 1});
  }

  bool reads(const Tensor&) const override { return true; }

  void add(const Tensor& block, const std::vector<Piece>& pieces) override {
    std::vector<Piece> of_grams = pieces;
    for (Piece& p : of_grams) p.unit = layer_.targets[p.unit].slot;
    cpu_gram_accumulate(grams_, block, of_grams.data(), static_cast<int64_t>(of_grams.size()));
  }

  bool add_chip(const Source&, const std::vector<Piece>&) override { return false; }

  void add_ghost(const LayerPlan& layer, const std::vector<Source>& sources,
                 int64_t elements) override {
    lightning_mat::add_ghost(grams_, layer, sources, elements, cpu_ghost_kernels());
  }

  void end(const LayerPlan& layer) override {
    std::vector<int64_t> which;
    for (int64_t k = 0; k < layer.target_count; ++k) {
      const TargetRecord& target = layer.targets[k];
      if (target.row >= 0) which.insert(which.end(), {target.slot, target.row});
    }
    if (which.empty() || grams_.size(1) == 0) return;
    SpectrumParams p{};
    p.grams = grams_.const_data_ptr();
    p.gram_type = grams_.scalar_type() == at::kDouble ? Scalar::kFloat64 : Scalar::kFloat32;
    p.count = static_cast<int64_t>(which.size()) / 2;
    p.samples = grams_.size(1);
    p.which = which.data();
    p.eigenvalues = eigenvalues_.mutable_data_ptr<double>();
    cpu_spectrum(p);
  }

  void finish() override {}

  at::ScalarType type() const override { return grams_.scalar_type(); }

 private:
  Tensor grams_, eigenvalues_, memory_;
  LayerPlan layer_{};
};

}  // namespace

std::unique_ptr<Backend> cpu_backend(const Tensor& grams, const Tensor& eigenvalues) {
  return std::make_unique<CpuBackend>(grams, eigenvalues);
}

}  // namespace lightning_mat
