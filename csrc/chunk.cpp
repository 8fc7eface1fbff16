#include "chunk.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace lightning_mat {

std::vector<Chunk> cut_chunks(const LayerPlan& layer, const std::vector<Source>& sources,
                              int64_t elements) {
  // What a cut may not divide: a channel's kernel, and, across groups, a group's rows.
  int64_t row_grain = 1, column_grain = 1;
  bool by_columns = false;
  int64_t copied_tokens = 1;  // of what is copied for a chunk: patches, gradients
  for (const Source& s : sources) {
    if (s.kind != Kind::kConv) continue;
    copied_tokens = std::max(copied_tokens, s.tokens());
    column_grain = std::lcm(column_grain, s.kernel_size());
    // Patches are copied: cut so that no part of them is copied twice.
    by_columns = s.groups == 1;
    if (s.groups > 1) row_grain = std::lcm(row_grain, layer.rows / s.groups);
  }
  // The rows and columns that pieces cover, the rows in runs.
  std::vector<Chunk> runs;
  std::vector<std::pair<int64_t, int64_t>> spans;
  int64_t c0 = layer.columns, c1 = 0;
  for (int64_t k = 0; k < layer.piece_count; ++k) {
    const Piece& p = layer.pieces[k];
    if (p.r0 == p.r1 || p.c0 == p.c1) continue;
    spans.emplace_back(p.r0, p.r1);
    c0 = std::min(c0, p.c0);
    c1 = std::max(c1, p.c1);
  }
  if (spans.empty()) return {};
  c0 = c0 / column_grain * column_grain;
  c1 = std::min(layer.columns, (c1 + column_grain - 1) / column_grain * column_grain);
  std::sort(spans.begin(), spans.end());
  for (const auto& [first, last] : spans) {
    const int64_t r0 = first / row_grain * row_grain;
    const int64_t r1 = std::min(layer.rows, (last + row_grain - 1) / row_grain * row_grain);
    if (!runs.empty() && r0 <= runs.back().r1) {
      runs.back().r1 = std::max(runs.back().r1, r1);
    } else {
      runs.push_back({r0, r1, c0, c1});
    }
  }
  // Parts of about the same size, multiples of the grain.
  const auto even = [](int64_t total, int64_t most, int64_t grain) {
    const int64_t count = std::max<int64_t>((total + most - 1) / most, 1);
    return std::max<int64_t>(((total + count - 1) / count + grain - 1) / grain, 1) * grain;
  };
  // One sample's copies of a chunk stay within kCopyBytes, too.
  const int64_t copied = std::max<int64_t>(kCopyBytes / 4 / copied_tokens, 1);
  const auto whole = [](int64_t most, int64_t grain) {
    return std::max(most / grain * grain, grain);
  };
  std::vector<Chunk> chunks;
  for (const Chunk& run : runs) {
    const int64_t rows = run.r1 - run.r0, columns = run.c1 - run.c0;
    int64_t row_step = rows, column_step = columns;
    if (by_columns) {
      column_step =
          even(columns, whole(std::min(elements / rows, copied), column_grain), column_grain);
      row_step = even(rows, std::min(std::max<int64_t>(elements / column_step, 1), copied), 1);
    } else {
      const bool conv = copied_tokens > 1;
      const int64_t fitting = conv ? copied / columns * row_grain : elements;
      row_step = even(rows, whole(std::min(elements / columns, fitting), row_grain), row_grain);
      column_step = even(columns, whole(elements / row_step, column_grain), column_grain);
    }
    for (int64_t r = run.r0; r < run.r1; r += row_step) {
      for (int64_t c = run.c0; c < run.c1; c += column_step) {
        chunks.push_back({r, std::min(r + row_step, run.r1), c, std::min(c + column_step, run.c1)});
      }
    }
  }
  return chunks;
}

}  // namespace lightning_mat
