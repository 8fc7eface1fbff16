#include "pending.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "../lanczos.h"
#include "backend.h"
#include "gram_launch.h"

namespace lightning_mat {
namespace {

using at::Tensor;

// Partial Grams of one launch, about.
constexpr int64_t kPartialBytes = 32 << 20;

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

}  // namespace

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

int64_t Pending::most_items() const {
  const int64_t scalar = sums_in_double(scalar_of_type(type_), gram_type()) ? 8 : 4;
  const int64_t samples = grams_.size(1);
  const int64_t each = tile_count(samples) * partial_elements(samples) * scalar;
  return std::max<int64_t>(kPartialBytes / each, 1);
}

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
  launch.element_type = scalar_of_type(type_);
  launch.gram_type = gram_type();
  launch.precision = precision_;
  const bool wide = sums_in_double(launch.element_type, launch.gram_type);
  const Tensor partials = at::empty({partial_bytes(work, wide)}, tables.options());
  launch.partials = partials.mutable_data_ptr();
  launch.grams = grams_.mutable_data_ptr();
  launch.eigenvalues = eigenvalues_.defined() ? eigenvalues_.mutable_data_ptr<double>() : nullptr;
  launch.basis = basis;
  check_launch(cuda_gram(launch, c10::cuda::getCurrentCUDAStream()), "the Gram kernel", grams_);

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

}  // namespace lightning_mat
