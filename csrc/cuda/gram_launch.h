// One launch of the Gram kernel: the work of a plan, and what happens to the Grams it completes.

#pragma once

#include "../lanczos.h"
#include "../mntk.h"
#include "../work.h"

namespace lightning_mat {

struct GramLaunch {
  // Tables of work.h, in device memory.
  const Block* blocks;
  const Piece* pieces;
  const Target* targets;
  const Item* items;
  const Group* groups;
  const Cell* cells;
  uint32_t* counters;  // of groups, cells, targets: zero at the launch, and zero again after it
  int64_t item_count, group_count, cell_count;
  int64_t samples;

  Scalar element_type;  // of all blocks
  Scalar gram_type;     // float32 or float64
  Precision precision;  // of float32 elements with float32 Grams
  void* partials;       // partial_bytes() of scratch memory, aligned to 16 bytes
  void* grams;          // [slots, samples, samples]
  double* eigenvalues;  // [rows, samples], of targets with a row
  Basis basis;          // chip_basis() of the solver; kNone: no target has a row
};

// Sets the tables that write_tables() laid out in the buffer that now lies at `base`.
inline void point_at_tables(GramLaunch& launch, const Work& work, const TableLayout& layout,
                            unsigned char* base) {
  launch.blocks = reinterpret_cast<const Block*>(base + layout.blocks);
  launch.pieces = reinterpret_cast<const Piece*>(base + layout.pieces);
  launch.targets = reinterpret_cast<const Target*>(base + layout.targets);
  launch.items = reinterpret_cast<const Item*>(base + layout.items);
  launch.groups = reinterpret_cast<const Group*>(base + layout.groups);
  launch.cells = reinterpret_cast<const Cell*>(base + layout.cells);
  launch.counters = reinterpret_cast<uint32_t*>(base + layout.counters);
  launch.item_count = static_cast<int64_t>(work.items.size());
  launch.group_count = static_cast<int64_t>(work.groups.size());
  launch.cell_count = static_cast<int64_t>(work.cells.size());
  launch.samples = work.samples;
}

#ifdef LIGHTNING_MAT_WITH_CUDA
// Returns the launch's error, for the caller to raise with the shapes in its message.
cudaError_t cuda_gram(const GramLaunch& launch, cudaStream_t stream);
#endif

}  // namespace lightning_mat
