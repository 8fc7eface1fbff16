// A pass over captured tensors: layer after layer, each the way its plan says, into Grams and, as
// soon as a Gram is complete, eigenvalues.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "form.h"
#include "ghost.h"
#include "plan.h"

namespace lightning_mat {

// What a device does with a layer. Calls come as begin, any of the adds, end; finish comes last.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual void begin(const LayerPlan& layer) = 0;
  // Memory for a block of gradients, [samples, rows, columns], of the type that is multiplied.
  virtual at::Tensor stage(int64_t rows, int64_t columns) = 0;
  // Whether `add` can read gradients where they lie.
  virtual bool reads(const at::Tensor& grad) const = 0;
  // Adds a block; pieces are in its coordinates, sorted by the layer's target.
  virtual void add(const at::Tensor& block, const std::vector<Piece>& pieces) = 0;
  // Adds the whole layer from tensors of its one source; false where the device has no such way.
  virtual bool add_chip(const Source& source, const std::vector<Piece>& pieces) = 0;
  virtual void add_ghost(const LayerPlan& layer, const std::vector<Source>& sources,
                         int64_t elements) = 0;
  virtual void end(const LayerPlan& layer) = 0;
  virtual void finish() = 0;
  // The type of staged gradients.
  virtual at::ScalarType type() const = 0;
};

// Runs the layers of a plan. `workspace` bounds, in bytes, the gradients that are formed at a time.
// With `tf32` the library's products are as exact as the process lets them be; else exact.
void run_pass(Backend& backend, const std::vector<LayerPlan>& layers,
              const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, int64_t samples,
              int64_t workspace, bool tf32);

}  // namespace lightning_mat
