// A pass on the device: blocks of gradients are staged one after the other in one arena, and
// everything that is pending is launched at once when the arena is full or the pass is over.

#include "backend.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../lanczos.h"
#include "../work.h"
#include "ghost.h"
#include "gram_launch.h"
#include "rows.h"
#include "upload.h"

namespace lightning_mat {
namespace {

using at::Tensor;

// What the eigenvalue kernel may take for its work matrices at a time.
constexpr int64_t kSolverBytes = 64 << 20;
// Partial Grams of one launch, about.
constexpr int64_t kPartialBytes = 32 << 20;

Scalar scalar_of(at::ScalarType type) {
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

void check(cudaError_t error, const char* what, const Tensor& grams) {
  TORCH_CHECK(error == cudaSuccess, what, " could not start on ", grams.device(), ": ",
              cudaGetErrorString(error), " (a tensor of shape ", grams.sizes(), ")");
}

// Copies host values to the device on the current stream, without waiting for it.
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

// Where the solver keeps its basis: within half of a multiprocessor's memory, so that two blocks
// fit, or else within what one block may have.
Basis basis_for(Scalar gram_type, int64_t samples) {
  int device = 0, of_block = 0, of_multiprocessor = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&device),
        cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                               device)}) {
    TORCH_CHECK(error == cudaSuccess,
                "the device does not tell its shared memory: ", cudaGetErrorString(error));
  }
  const Basis shared = chip_basis(gram_type, samples, std::min(of_block, of_multiprocessor / 2));
  return shared != Basis::kNone ? shared : chip_basis(gram_type, samples, of_block);
}

int64_t items_of(const Piece& piece) {
  return (piece_elements(piece) + kItemElements - 1) / kItemElements;
}

// Cuts pieces into lists of at most `most` items each, as far as rows and columns can be cut. The
// cuts depend on the pieces alone, and so does the order of sums.
std::vector<std::vector<Piece>> in_parts(const std::vector<Piece>& pieces, int64_t most) {
  std::vector<std::vector<Piece>> parts(1);
  int64_t items = 0;
  const auto put = [&](const Piece& piece) {
    if (items > 0 && items + items_of(piece) > most) {
      parts.emplace_back();
      items = 0;
    }
    parts.back().push_back(piece);
    items += items_of(piece);
  };
  for (const Piece& piece : pieces) {
    const int64_t rows = piece.r1 - piece.r0, columns = piece.c1 - piece.c0;
    if (items_of(piece) <= most) {
      put(piece);
      continue;
    }
    const int64_t row_step = std::max<int64_t>(most * kItemElements / columns, 1);
    const int64_t column_step = std::min(columns, most * kItemElements);
    for (int64_t r = 0; r < rows; r += row_step) {
      for (int64_t c = 0; c < columns; c += column_step) {
        put({piece.unit, piece.r0 + r, std::min(piece.r0 + r + row_step, piece.r1), piece.c0 + c,
             std::min(piece.c0 + c + column_step, piece.c1)});
      }
    }
  }
  return parts;
}

// What is going to be launched.
class Pending {
 public:
  Pending(Tensor grams, Tensor eigenvalues, at::ScalarType type, Precision precision)
      : grams_(std::move(grams)),
        eigenvalues_(std::move(eigenvalues)),
        type_(type),
        precision_(precision),
        place_(grams_.size(0), -1) {}

  bool empty() const { return targets_.empty(); }
  bool has(int64_t slot) const { return place_[slot] >= 0; }
  // Items that a launch may have: so many that their partial Grams stay within kPartialBytes.
  int64_t most_items() const {
    const int64_t scalar = sums_in_double(scalar_of(type_), gram_type()) ? 8 : 4;
    const int64_t samples = grams_.size(1);
    const int64_t each = tile_count(samples) * partial_elements(samples) * scalar;
    return std::max<int64_t>(kPartialBytes / each, 1);
  }
  int64_t items() const { return items_; }

  Target& target(int64_t slot) {
    if (!has(slot)) {
      place_[slot] = static_cast<int64_t>(targets_.size());
      targets_.push_back({slot, 0, 0, 0, -1});
      shares_.emplace_back();
    }
    return targets_[place_[slot]];
  }

  // Adds a block; `slots` gives the Gram of each target that the pieces name. `held` is kept until
  // the launch.
  void add(const Block& block, const std::vector<Piece>& pieces, const TargetRecord* targets,
           const std::vector<Tensor>& held) {
    const auto index = static_cast<int64_t>(blocks_.size());
    blocks_.push_back(block);
    held_.insert(held_.end(), held.begin(), held.end());
    for (const Piece& piece : pieces) {
      const int64_t slot = targets[piece.unit].slot;
      target(slot);
      std::vector<Share>& shares = shares_[place_[slot]];
      const auto at = static_cast<int64_t>(pieces_.size());
      if (shares.empty() || shares.back().block != index) shares.push_back({index, at, at});
      shares.back().last = at + 1;
      pieces_.push_back(piece);
      pieces_.back().unit = place_[slot];
      items_ += items_of(piece);
    }
  }

  void launch();

 private:
  Scalar gram_type() const { return scalar_of(grams_.scalar_type()); }

  Tensor grams_, eigenvalues_;
  at::ScalarType type_;
  Precision precision_;
  std::vector<int64_t> place_;  // of each slot among the targets, or -1
  std::vector<Block> blocks_;
  std::vector<Piece> pieces_;
  std::vector<Target> targets_;
  std::vector<std::vector<Share>> shares_;  // of each target
  std::vector<Tensor> held_;
  int64_t items_ = 0;
};

void Pending::launch() {
  if (empty()) return;
  const int64_t samples = grams_.size(1);
  std::vector<Share> shares;
  std::vector<int64_t> solved;  // (Gram, row) of completed targets
  for (size_t k = 0; k < targets_.size(); ++k) {
    Target& target = targets_[k];
    target.first = static_cast<int64_t>(shares.size());
    shares.insert(shares.end(), shares_[k].begin(), shares_[k].end());
    target.last = static_cast<int64_t>(shares.size());
    if (target.row >= 0) solved.insert(solved.end(), {target.slot, target.row});
  }
  const Basis basis = solved.empty() ? Basis::kNone : basis_for(gram_type(), samples);
  if (basis == Basis::kNone) {
    for (Target& target : targets_) target.row = -1;
  }

  const Work work = plan_work(samples, pieces_.data(), shares.data(), targets_.data(),
                              static_cast<int64_t>(targets_.size()));
  const auto block_count = static_cast<int64_t>(blocks_.size());
  const auto piece_count = static_cast<int64_t>(pieces_.size());
  const TableLayout layout = table_layout(work, block_count, piece_count);
  std::vector<unsigned char> buffer(static_cast<size_t>(layout.bytes));
  write_tables(work, layout, blocks_.data(), block_count, pieces_.data(), piece_count,
               targets_.data(), buffer.data());
  const Tensor tables = upload(buffer.data(), layout.bytes, grams_.device());

  GramLaunch launch{};
  point_at_tables(launch, work, layout, tables.mutable_data_ptr<uint8_t>());
  launch.element_type = scalar_of(type_);
  launch.gram_type = gram_type();
  launch.precision = precision_;
  const bool wide = sums_in_double(launch.element_type, launch.gram_type);
  const Tensor partials = at::empty({partial_bytes(work, wide)}, tables.options());
  launch.partials = partials.mutable_data_ptr();
  launch.grams = grams_.mutable_data_ptr();
  launch.eigenvalues = eigenvalues_.defined() ? eigenvalues_.mutable_data_ptr<double>() : nullptr;
  launch.basis = basis;
  check(cuda_gram(launch, c10::cuda::getCurrentCUDAStream()), "the Gram kernel", grams_);

  if (basis == Basis::kNone && !solved.empty()) {
    const auto bytes = static_cast<int64_t>(solved.size() * sizeof(int64_t));
    const Tensor which = upload(solved.data(), bytes, grams_.device());
    SpectrumParams p{};
    p.count = static_cast<int64_t>(solved.size()) / 2;
    p.which = reinterpret_cast<const int64_t*>(which.const_data_ptr());
    p.eigenvalues = launch.eigenvalues;
    cuda_solve(grams_, p);
  }
  for (const Target& target : targets_) place_[target.slot] = -1;
  blocks_.clear();
  pieces_.clear();
  targets_.clear();
  shares_.clear();
  held_.clear();
  items_ = 0;
}

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
  p.type = scalar_of(patches.scalar_type());
  check(cuda_patch_products(p, c10::cuda::getCurrentCUDAStream()), "the products of patches",
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
  p.type = scalar_of(grams.scalar_type());
  check(cuda_ghost_sum(p, c10::cuda::getCurrentCUDAStream()), "the sum over tokens", grams);
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
  p.type = scalar_of(table.scalar_type());
  check(cuda_add_rows(p, c10::cuda::getCurrentCUDAStream()), "the sum over an embedding's tokens",
        table);
}

void cuda_solve(const Tensor& grams, SpectrumParams p) {
  p.grams = grams.const_data_ptr();
  p.gram_type = scalar_of(grams.scalar_type());
  p.samples = grams.size(1);
  const int64_t doubles = lanczos_workspace(p.samples);
  const auto bytes = doubles * static_cast<int64_t>(sizeof(double));
  p.workers = std::min<int64_t>(p.count, std::max<int64_t>(kSolverBytes / bytes, 1));
  const Tensor workspace = at::empty({p.workers * doubles}, grams.options().dtype(at::kDouble));
  p.workspace = workspace.mutable_data_ptr<double>();
  check(cuda_spectrum(p, c10::cuda::getCurrentCUDAStream()), "the eigenvalue kernel", grams);
}

}  // namespace lightning_mat
