// How a layer's gradient is cut into bounded rectangles.

#pragma once

#include <vector>

#include "source.h"

namespace lightning_mat {

// What is copied for a chunk (patches, other types, awkward strides) takes about so much at a time.
constexpr int64_t kCopyBytes = 8 << 20;

// A rectangle of a layer's gradient that is formed at a time.
struct Chunk {
  int64_t r0, r1, c0, c1;
};

// Cuts what the pieces cover into chunks of at most `elements` elements (per sample), but at least
// what cannot be cut. Depends on the layer and on `elements` alone.
std::vector<Chunk> cut_chunks(const LayerPlan& layer, const std::vector<Source>& sources,
                              int64_t elements);

}  // namespace lightning_mat
