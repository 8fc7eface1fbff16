// The plan of a pass, decoded: which captured tensors make which layer's per-sample gradients, and
// which units own what of them. lightning_mat/mntk/words.py writes the words.
//
// A plan is a list of int64 words: the version, the number of layers, and per layer
//   rows, columns, way, sources, targets, pieces,
//   its sources (SourceRecord), its targets (TargetRecord), its pieces (Piece, sorted by target).

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "mntk.h"

namespace lightning_mat {

constexpr int64_t kPlanVersion = 1;
// Of a kernel, a stride and so on: products of three of them stay within 64 bits.
constexpr int64_t kLargestSize = int64_t{1} << 20;

// How a source's tensors make a per-sample gradient, [samples, rows, columns].
enum class Kind : int64_t {
  kLinear,     // a [S, T, columns], b [S, T, rows]: the sum over tokens of b a^T
  kConv,       // a [S, T, channels, *size], b [S, T, rows, *out size]
  kBias,       // b [S, T, rows]: the sum over tokens
  kScale,      // a, b [S, T, rows]: the sum over tokens of a * b
  kEmbedding,  // a [S, T] int64, b [S, T, columns]: b's rows, added to the table's rows a
  kDense,      // b [S, rows, columns]: the gradient itself
};
constexpr int64_t kKinds = 6;

// How a layer's Grams get their numbers.
enum class Way : int64_t {
  kStaged,  // blocks of gradients are formed by the library, then multiplied by themselves
  kChip,    // gradients are formed where they are multiplied, and never stored
  kGhost,   // products of tokens: gradients are never formed
};
constexpr int64_t kWays = 3;

// One captured call, of the samples [first, first + samples).
struct SourceRecord {
  int64_t kind;
  int64_t index;    // which of the tensors a and b
  int64_t swapped;  // nonzero: a and b change places (the transposed weight), linear only
  int64_t first, samples;
  int64_t adds;  // nonzero: adds to what earlier sources gave for these samples
  int64_t groups, dims;
  int64_t kernel[3], stride[3], dilation[3];
  int64_t padding[3];  // zeros before the first element; as many as are needed after the last
};
constexpr int64_t kSourceWords = sizeof(SourceRecord) / sizeof(int64_t);

struct TargetRecord {
  int64_t slot;   // its Gram
  int64_t fresh;  // nonzero: this layer is the first that adds to it
  int64_t row;    // this layer is the last: its eigenvalues go to this row; else -1
};
constexpr int64_t kTargetWords = sizeof(TargetRecord) / sizeof(int64_t);
constexpr int64_t kPieceWords = sizeof(Piece) / sizeof(int64_t);
constexpr int64_t kLayerWords = 6;

// One layer's part of the plan: pointers into its words.
struct LayerPlan {
  int64_t rows, columns;
  Way way;
  const SourceRecord* sources;
  int64_t source_count;
  const TargetRecord* targets;
  int64_t target_count;
  const Piece* pieces;
  int64_t piece_count;
};

namespace plan_detail {

[[noreturn]] inline void fail(const std::string& what) {
  throw std::invalid_argument("plan: " + what);
}

inline std::string number(int64_t value) { return std::to_string(value); }

}  // namespace plan_detail

// Checks one layer against itself: what it says of the tensors is checked where they are used.
inline void check_layer(const LayerPlan& layer, const std::string& name, int64_t slots,
                        int64_t rows_of_eigenvalues, int64_t samples) {
  using plan_detail::fail;
  using plan_detail::number;
  if (layer.rows < 0 || layer.columns < 0) fail(name + " has a negative size");
  for (int64_t k = 0; k < layer.source_count; ++k) {
    const SourceRecord& s = layer.sources[k];
    if (s.kind < 0 || s.kind >= kKinds) fail(name + " has no known kind: " + number(s.kind));
    if (s.first < 0 || s.samples < 0 || s.samples > samples || s.first > samples - s.samples) {
      fail(name + " has a source of " + number(s.samples) + " samples from " + number(s.first) +
           " on, of " + number(samples));
    }
    if (s.dims < 0 || s.dims > 3 || s.groups < 1) fail(name + " has no known geometry");
    for (const int64_t* sizes : {s.kernel, s.stride, s.dilation, s.padding}) {
      for (int64_t d = 0; d < s.dims; ++d) {
        const bool padding = sizes == s.padding;
        if (sizes[d] < (padding ? 0 : 1) || sizes[d] > kLargestSize) {
          fail(name + " has a geometry of size " + number(sizes[d]));
        }
      }
    }
  }
  std::unordered_set<int64_t> taken;
  for (int64_t k = 0; k < layer.target_count; ++k) {
    const TargetRecord& t = layer.targets[k];
    if (t.slot < 0 || t.slot >= slots) {
      fail(name + " adds to Gram " + number(t.slot) + " of " + number(slots));
    }
    if (!taken.insert(t.slot).second) fail(name + " names Gram " + number(t.slot) + " twice");
    if (t.row < -1 || t.row >= rows_of_eigenvalues) {
      fail(name + " writes row " + number(t.row) + " of " + number(rows_of_eigenvalues) +
           " rows of eigenvalues");
    }
  }
  for (int64_t k = 0; k < layer.piece_count; ++k) {
    const Piece& p = layer.pieces[k];
    const bool inside = 0 <= p.r0 && p.r0 <= p.r1 && p.r1 <= layer.rows && 0 <= p.c0 &&
                        p.c0 <= p.c1 && p.c1 <= layer.columns;
    if (!inside) {
      fail(name + " gives rows [" + number(p.r0) + ", " + number(p.r1) + ") and columns [" +
           number(p.c0) + ", " + number(p.c1) + ") away, but has " + number(layer.rows) +
           " rows and " + number(layer.columns) + " columns");
    }
    if (p.unit < 0 || p.unit >= layer.target_count) {
      fail(name + " gives a piece to target " + number(p.unit) + " of " +
           number(layer.target_count));
    }
    if (k > 0 && layer.pieces[k - 1].unit > p.unit) fail(name + ": sort the pieces by target");
  }
}

// Decodes and checks the words; the result points into them.
inline std::vector<LayerPlan> decode_plan(const int64_t* words, int64_t count, int64_t slots,
                                          int64_t rows_of_eigenvalues, int64_t samples) {
  using plan_detail::fail;
  using plan_detail::number;
  if (count < 2 || words[0] != kPlanVersion) {
    fail("made by another version of lightning_mat: compile the extension again");
  }
  std::vector<LayerPlan> layers;
  std::vector<bool> solved(slots), written(rows_of_eigenvalues);
  int64_t at = 2;
  const auto take = [&](int64_t records, int64_t words_each) {
    if (records < 0 || records > (count - at) / words_each) {
      fail("ends within layer " + number(static_cast<int64_t>(layers.size())));
    }
    const int64_t* start = words + at;
    at += records * words_each;
    return start;
  };
  for (int64_t k = 0; k < words[1]; ++k) {
    const int64_t* head = take(1, kLayerWords);
    LayerPlan layer{};
    layer.rows = head[0];
    layer.columns = head[1];
    if (head[2] < 0 || head[2] >= kWays) fail("layer " + number(k) + " goes no known way");
    layer.way = static_cast<Way>(head[2]);
    layer.source_count = head[3];
    layer.target_count = head[4];
    layer.piece_count = head[5];
    layer.sources = reinterpret_cast<const SourceRecord*>(take(head[3], kSourceWords));
    layer.targets = reinterpret_cast<const TargetRecord*>(take(head[4], kTargetWords));
    layer.pieces = reinterpret_cast<const Piece*>(take(head[5], kPieceWords));
    check_layer(layer, "layer " + number(k), slots, rows_of_eigenvalues, samples);
    for (int64_t t = 0; t < layer.target_count; ++t) {
      const TargetRecord& target = layer.targets[t];
      if (solved[target.slot] && target.fresh == 0) {
        fail("layer " + number(k) + " adds to Gram " + number(target.slot) + ", which is solved");
      }
      solved[target.slot] = target.row >= 0;
      if (target.row < 0) continue;
      if (written[target.row]) fail("row " + number(target.row) + " is written twice");
      written[target.row] = true;
    }
    layers.push_back(layer);
  }
  if (at != count) fail("has " + number(count - at) + " words too many");
  return layers;
}

}  // namespace lightning_mat
