// Gradients that wait for a launch of the Gram kernel.

#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "../mntk.h"
#include "../plan.h"
#include "../work.h"
#include "support.h"

namespace lightning_mat {

// Items of the Gram kernel that a piece is cut into.
inline int64_t items_of(const Piece& piece) {
  return (piece_elements(piece) + kItemElements - 1) / kItemElements;
}

// Cuts pieces into lists of at most `most` items each, as far as rows and columns can be cut. The
// cuts depend on the pieces alone, and so does the order of sums.
std::vector<std::vector<Piece>> in_parts(const std::vector<Piece>& pieces, int64_t most);

// What is going to be launched: blocks of gradients, who owns what of them, which Grams they
// complete.
class Pending {
 public:
  Pending(at::Tensor grams, at::Tensor eigenvalues, at::ScalarType type, Precision precision)
      : grams_(std::move(grams)),
        eigenvalues_(std::move(eigenvalues)),
        type_(type),
        precision_(precision),
        place_(grams_.size(0), -1) {}

  bool empty() const { return targets_.empty(); }
  bool has(int64_t slot) const { return place_[slot] >= 0; }
  // Items that a launch may have: so many that their partial Grams stay within kPartialBytes.
  int64_t most_items() const;
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
           const std::vector<at::Tensor>& held) {
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
  Scalar gram_type() const { return scalar_of_type(grams_.scalar_type()); }

  at::Tensor grams_, eigenvalues_;
  at::ScalarType type_;
  Precision precision_;
  std::vector<int64_t> place_;  // of each slot among the targets, or -1
  std::vector<Block> blocks_;
  std::vector<Piece> pieces_;
  std::vector<Target> targets_;
  std::vector<std::vector<Share>> shares_;  // of each target
  std::vector<at::Tensor> held_;
  int64_t items_ = 0;
};

}  // namespace lightning_mat
