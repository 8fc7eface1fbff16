#include "pass.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>

namespace lightning_mat {
namespace {

// The parts of the layer's pieces that lie in a chunk, in its coordinates.
std::vector<Piece> pieces_within(const LayerPlan& layer, const Chunk& chunk) {
  std::vector<Piece> pieces;
  for (int64_t k = 0; k < layer.piece_count; ++k) {
    const Piece& p = layer.pieces[k];
    const Piece part{p.unit, std::max(p.r0, chunk.r0) - chunk.r0,
                     std::min(p.r1, chunk.r1) - chunk.r0, std::max(p.c0, chunk.c0) - chunk.c0,
                     std::min(p.c1, chunk.c1) - chunk.c0};
    if (part.r0 < part.r1 && part.c0 < part.c1) pieces.push_back(part);
  }
  return pieces;
}

void run_staged(Backend& backend, const LayerPlan& layer, const std::vector<Source>& sources,
                int64_t samples, int64_t workspace) {
  const auto bytes = static_cast<int64_t>(c10::elementSize(backend.type())) * samples;
  const bool dense = sources.size() == 1 && sources[0].kind == Kind::kDense &&
                     sources[0].samples == samples && backend.reads(sources[0].b);
  for (const Chunk& chunk : cut_chunks(layer, sources, std::max<int64_t>(workspace / bytes, 1))) {
    const std::vector<Piece> pieces = pieces_within(layer, chunk);
    if (pieces.empty()) continue;
    const int64_t rows = chunk.r1 - chunk.r0, columns = chunk.c1 - chunk.c0;
    if (dense) {
      backend.add(sources[0].b.narrow(1, chunk.r0, rows).narrow(2, chunk.c0, columns), pieces);
      continue;
    }
    const at::Tensor block = backend.stage(rows, columns);
    form_chunk(block, sources, chunk);
    backend.add(block, pieces);
  }
}

bool run_on_chip(Backend& backend, const LayerPlan& layer, const std::vector<Source>& sources,
                 int64_t samples) {
  if (sources.size() != 1 || sources[0].kind != Kind::kLinear) return false;
  if (sources[0].samples != samples) return false;
  return backend.add_chip(sources[0], pieces_within(layer, {0, layer.rows, 0, layer.columns}));
}

}  // namespace

void run_pass(Backend& backend, const std::vector<LayerPlan>& layers,
              const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, int64_t samples,
              int64_t workspace, bool tf32) {
  // No graph is recorded, and products are of the types that are asked for here.
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::optional<at::NoTF32Guard> exact;
  if (!tf32) exact.emplace();
  // Everything is checked before anything is changed.
  std::vector<std::vector<Source>> sources;
  for (size_t k = 0; k < layers.size(); ++k) {
    sources.push_back(check_sources(layers[k], static_cast<int64_t>(k), a, b, samples));
  }
  for (size_t k = 0; k < layers.size(); ++k) {
    const LayerPlan& layer = layers[k];
    const auto elements = workspace / static_cast<int64_t>(c10::elementSize(backend.type()));
    backend.begin(layer);
    if (samples > 0 && layer.piece_count > 0 && !sources[k].empty()) {
      if (layer.way == Way::kGhost && can_ghost(layer, sources[k], samples, elements)) {
        backend.add_ghost(layer, sources[k], elements);
      } else if (layer.way != Way::kChip || !run_on_chip(backend, layer, sources[k], samples)) {
        run_staged(backend, layer, sources[k], samples, workspace);
      }
    }
    backend.end(layer);
  }
  backend.finish();
}

}  // namespace lightning_mat
