#include "ghost.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <unordered_set>

namespace lightning_mat {
namespace {

using at::Tensor;

// Only pairs s' <= s are needed: with this many panels of s, 5/8 of all products are formed.
constexpr int64_t kPanels = 4;
constexpr int64_t kSmallPanel = 128;  // tokens

// A piece of many rows is cheaper by the Gram of its output gradients, formed as a whole.
bool is_wide(const Piece& p, int64_t tokens) { return p.r1 - p.r0 > 4 * tokens; }

int64_t all_tokens(const std::vector<Source>& sources) {
  int64_t most = 0;
  for (const Source& s : sources) most = std::max(most, s.tokens());
  return most;
}

// Panels of samples: their bounds.
std::vector<int64_t> panel_bounds(int64_t samples, int64_t tokens) {
  const int64_t panels =
      std::clamp<int64_t>(samples * tokens / kSmallPanel, 1, std::min(kPanels, samples));
  std::vector<int64_t> bounds;
  for (int64_t k = 0; k <= panels; ++k) bounds.push_back(samples * k / panels);
  return bounds;
}

// m (+)= x x^T by panels of rows: only what lies left of a panel's end is formed.
void add_products(const Tensor& m, const Tensor& x, const std::vector<int64_t>& bounds,
                  int64_t rows_each, bool adds) {
  for (size_t k = 0; k + 1 < bounds.size(); ++k) {
    const int64_t first = bounds[k] * rows_each, last = bounds[k + 1] * rows_each;
    Tensor panel = m.narrow(0, first, last - first).narrow(1, 0, last);
    const Tensor left = x.narrow(0, first, last - first), right = x.narrow(0, 0, last).t();
    if (adds) {
      panel.addmm_(left, right);
    } else {
      at::mm_out(panel, left, right);
    }
  }
}

// The position at which each element of each token's patch lies, or -1: [tokens, kernel].
std::vector<int64_t> patch_positions(const Source& s) {
  const auto dims = static_cast<int64_t>(s.kernel.size());
  const int64_t kernel = s.kernel_size(), tokens = s.tokens(), per_input = tokens / s.a.size(1);
  std::vector<int64_t> at(tokens * kernel);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < kernel; ++k) {
      int64_t token = t % per_input, element = k, position = 0, scale = 1;
      bool inside = true;
      for (int64_t d = dims - 1; d >= 0; --d) {
        const int64_t out = token % s.b.size(d + 3), tap = element % s.kernel[d];
        token /= s.b.size(d + 3);
        element /= s.kernel[d];
        const int64_t place = out * s.stride[d] + tap * s.dilation[d] - s.padding[d];
        inside = inside && place >= 0 && place < s.a.size(d + 3);
        position += place * scale;
        scale *= s.a.size(d + 3);
      }
      at[t * kernel + k] = inside ? t / per_input * scale + position : -1;
    }
  }
  return at;
}

// The products of a convolution's patches, without the patches.
void patch_products(const Tensor& m, const Source& s, const std::vector<int64_t>& bounds,
                    const GhostKernels& kernels) {
  const int64_t positions = s.positions(), rows = s.samples * positions;
  const Tensor x = s.a.flatten(3).transpose(2, 3).reshape({rows, s.a.size(2)}).to(m.scalar_type());
  const Tensor elements = at::empty({rows, rows}, m.options());
  add_products(elements, x, bounds, positions, false);
  const std::vector<int64_t> at = patch_positions(s);
  PatchParams p{};
  p.at = at.data();
  p.tokens = s.tokens();
  p.kernel = s.kernel_size();
  p.positions = positions;
  p.samples = s.samples;
  for (size_t k = 0; k + 1 < bounds.size(); ++k) {
    p.first = bounds[k];
    p.last = bounds[k + 1];
    kernels.patches(elements, m, p);
  }
}

// The products of inputs, [samples * tokens, samples * tokens], in panels: what lies right of a
// panel's end is not set.
Tensor input_products(const LayerPlan& layer, const std::vector<Source>& sources, int64_t samples,
                      int64_t tokens, const std::vector<int64_t>& bounds, int64_t elements,
                      const at::TensorOptions& options, const GhostKernels& kernels) {
  const at::ScalarType type = c10::typeMetaToScalarType(options.dtype());
  const int64_t rows = samples * tokens;
  Tensor m = at::empty({rows, rows}, options);
  const Source& only = sources[0];
  if (only.kind == Kind::kConv) {
    patch_products(m, only, bounds, kernels);
    return m;
  }
  const bool whole = sources.size() == 1 && only.samples == samples;
  if (whole && only.a.scalar_type() == type) {
    add_products(m, only.a.reshape({rows, layer.columns}), bounds, tokens, false);
    return m;
  }
  // Inputs of several sources side by side, padded with zeros to one number of tokens.
  const int64_t step = std::max<int64_t>(elements / rows, 1);
  for (int64_t c = 0; c < layer.columns; c += step) {
    const int64_t n = std::min(step, layer.columns - c);
    const Tensor inputs = at::zeros({samples, tokens, n}, options);
    for (const Source& s : sources) {
      inputs.narrow(0, s.first, s.samples).narrow(1, 0, s.tokens()).copy_(s.a.narrow(2, c, n));
    }
    add_products(m, inputs.view({rows, n}), bounds, tokens, c > 0);
  }
  if (layer.columns == 0) m.zero_();
  return m;
}

// Some output gradients, [rows, samples, tokens], contiguous, zeros where a sample has fewer
// tokens.
Tensor output_gradients(const std::vector<Source>& sources, int64_t first, int64_t rows,
                        int64_t samples, int64_t tokens, const at::TensorOptions& options) {
  Tensor b = at::empty({rows, samples, tokens}, options);
  int64_t covered = 0;
  for (const Source& s : sources) covered += s.tokens() == tokens ? s.samples : 0;
  if (covered < samples) b.zero_();
  for (const Source& s : sources) {
    const Tensor some = s.b.narrow(2, first, rows);
    const Tensor part =
        s.kind == Kind::kLinear ? some : some.flatten(3).transpose(2, 3).flatten(1, 2);
    b.narrow(1, s.first, s.samples).narrow(2, 0, s.tokens()).copy_(part.permute({2, 0, 1}));
  }
  return b;
}

void mirror(const Tensor& gram, const Tensor& product, int64_t first, int64_t last) {
  // rows [first, last) of the lower triangle, and their mirror image above the diagonal
  gram.narrow(0, first, last - first).narrow(1, 0, last).add_(product);
  if (first > 0) {
    gram.narrow(0, 0, first).narrow(1, first, last - first).add_(product.narrow(1, 0, first).t());
  }
}

// Adds a piece of many rows: the products of its output gradients, summed over some rows at a time,
// times those of the inputs.
void add_wide(const Tensor& grams, const Tensor& m, const std::vector<Source>& sources,
              const Piece& piece, int64_t slot, int64_t tokens, const std::vector<int64_t>& bounds,
              int64_t elements) {
  const int64_t samples = grams.size(1), pairs = samples * tokens;
  const int64_t step = std::max<int64_t>(elements / pairs, 1);
  const Tensor products = at::empty({pairs, pairs}, m.options());
  for (int64_t r = piece.r0; r < piece.r1; r += step) {
    const int64_t rows = std::min(step, piece.r1 - r);
    const Tensor b = output_gradients(sources, r, rows, samples, tokens, m.options());
    add_products(products, b.view({rows, pairs}).t(), bounds, tokens, r > piece.r0);
  }
  const Tensor gram = grams.select(0, slot);
  for (size_t k = 0; k + 1 < bounds.size(); ++k) {
    const int64_t first = bounds[k], last = bounds[k + 1], n = last - first;
    const auto panel = [&](const Tensor& t) {
      return t.narrow(0, first * tokens, n * tokens).narrow(1, 0, last * tokens);
    };
    Tensor product = panel(products).mul_(panel(m));
    if (tokens > 1)
      product = product.unflatten(0, {n, tokens}).unflatten(2, {last, tokens}).sum({1, 3});
    mirror(gram, product, first, last);
  }
}

}  // namespace

bool can_ghost(const LayerPlan& layer, const std::vector<Source>& sources, int64_t samples,
               int64_t elements) {
  int64_t tokens = 0, positions = 0;
  for (const Source& s : sources) {
    const bool alone = sources.size() == 1 && s.samples == samples && s.groups == 1;
    if (s.adds || !(s.kind == Kind::kLinear || (s.kind == Kind::kConv && alone))) return false;
    tokens = std::max(tokens, s.tokens());
    if (s.kind == Kind::kConv) positions = s.positions();
  }
  // Products of inputs and of output gradients, and those of a convolution's elements.
  const double pairs =
      2.0 * static_cast<double>(samples * tokens) * static_cast<double>(samples * tokens) +
      static_cast<double>(samples * positions) * static_cast<double>(samples * positions);
  if (pairs > static_cast<double>(elements)) return false;
  for (int64_t k = 0; k < layer.piece_count; ++k) {
    const Piece& p = layer.pieces[k];
    if (p.r0 < p.r1 && (p.c0 != 0 || p.c1 != layer.columns)) return false;
  }
  return true;
}

void add_ghost(const Tensor& grams, const LayerPlan& layer, const std::vector<Source>& sources,
               int64_t elements, const GhostKernels& kernels) {
  const int64_t samples = grams.size(1), tokens = all_tokens(sources);
  if (samples == 0 || tokens == 0 || layer.piece_count == 0) return;
  const std::vector<int64_t> bounds = panel_bounds(samples, tokens);
  const Tensor m = input_products(layer, sources, samples, tokens, bounds, elements / 4,
                                  grams.options(), kernels);

  // Wide pieces by themselves; runs of narrow ones together.
  std::vector<Piece> narrow;
  for (int64_t k = 0; k < layer.piece_count; ++k) {
    const Piece& p = layer.pieces[k];
    if (p.r0 == p.r1) continue;
    if (is_wide(p, tokens)) {
      add_wide(grams, m, sources, p, layer.targets[p.unit].slot, tokens, bounds, elements / 4);
    } else {
      narrow.push_back(p);
    }
  }
  std::sort(narrow.begin(), narrow.end(),
            [](const Piece& x, const Piece& y) { return x.r0 < y.r0; });
  const int64_t most = std::max<int64_t>(elements / 2 / (samples * samples * tokens), 1);
  for (size_t k = 0; k < narrow.size();) {
    // Neighbouring pieces, as many rows as fit; a piece is never cut, so that one sum is one
    // Gram's.
    std::vector<int64_t> slots, begins;
    const int64_t row = narrow[k].r0;
    int64_t end = row;
    std::unordered_set<int64_t> seen;
    for (; k < narrow.size() && narrow[k].r0 == end; ++k) {
      const int64_t slot = layer.targets[narrow[k].unit].slot;
      const bool fits = narrow[k].r1 - row <= most || end == row;
      if (!fits || !seen.insert(slot).second) break;  // one Gram is added to once in a sum
      begins.push_back(narrow[k].r0 - row);
      slots.push_back(slot);
      end = narrow[k].r1;
    }
    begins.push_back(end - row);
    const int64_t rows = end - row;
    const Tensor own = output_gradients(sources, row, rows, samples, tokens, grams.options());
    for (size_t panel = 0; panel + 1 < bounds.size(); ++panel) {
      const int64_t first = bounds[panel], last = bounds[panel + 1], n = last - first;
      const Tensor left = own.narrow(1, first, n).transpose(0, 1);
      const Tensor right = m.narrow(0, first * tokens, n * tokens)
                               .narrow(1, 0, last * tokens)
                               .unflatten(0, {n, tokens});
      const Tensor products = at::bmm(left, right);
      GhostParams p{};
      p.first = first;
      p.last = last;
      p.rows = rows;
      p.tokens = tokens;
      p.samples = samples;
      p.slots = slots.data();
      p.begins = begins.data();
      p.runs = static_cast<int64_t>(slots.size());
      kernels.sum(grams, products, own, p);
    }
  }
}

}  // namespace lightning_mat
