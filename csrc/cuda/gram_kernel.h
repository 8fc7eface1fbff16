// Grams of per-sample gradients on tensor cores, and the eigenvalues of those that are complete, in
// one launch. One block of threads takes one item of work.h: up to 1024 elements of a piece, of all
// samples of one tile. The last block of a group adds the group's partial Grams, the last of a cell
// adds these to the Gram, the last of a target solves it. Which block is last changes from run to
// run, the order of additions does not.
//
// A warp takes slabs of 64 bytes of every sample, a thread 16 of them. The order of elements within
// a slab does not matter to the sum, so what a thread loads is its part of both operands of the
// products: every element is loaded once, and the main loop needs no barrier. Slabs on their way
// lie in shared memory, where each thread touches its own words only, because registers are too
// few.
//
// Counts for a tile of 64 samples, per warp and slab: 4 KB by 8 copies a thread; 20 fragments of 2
// products, 40 HMMA (120 with three terms), and 72 (or 144) additions. An item of 1024 float32
// elements reads 256 KB and leaves 10 KB. Of a thread's registers 72 hold sums and up to 64
// operands; two blocks share a multiprocessor and have 64 KB on their way at a time.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../work.h"
#include "formats.h"
#include "gram_launch.h"
#include "partials.h"
#include "products.h"
#include "products64.h"

namespace lightning_mat {

// Of gram_kernel's kTile: more samples than one tile has.
constexpr int kManyTiles = 2 * kLargeTile;

// kTile: tile_samples(), or kManyTiles. A grid of item_count blocks.
template <class Format, int kTile, class Gram>
__global__ void __launch_bounds__(kGramThreads, 2) gram_kernel(GramLaunch p) {
  using Sum = typename Format::Sum;
  const Item& item = p.items[blockIdx.x];
  const Tile tile = kTile < kManyTiles ? Tile{0, 0, true} : tile_at(p.samples, item.tile);
  Sum* partial = static_cast<Sum*>(p.partials) + blockIdx.x * partial_elements(p.samples);
  unsigned char* shared = shared_memory() + kVerdictBytes;
  if constexpr (sizeof(Sum) == sizeof(double)) {
    multiply_item_in_double(p, item, tile, partial, reinterpret_cast<double*>(shared));
  } else {
    auto* words = reinterpret_cast<uint4*>(shared);
    if (tile.diagonal) {
      constexpr int kRows = (kTile < kManyTiles ? kTile : kLargeTile) / 8;
      multiply_item<Format, kRows, 0>(p, item, tile, partial, words);
    } else if constexpr (kTile == kManyTiles) {
      multiply_item<Format, kLargeTile / 8, kSideColumns / 8>(p, item, tile, partial, words);
    }
  }
  combine<Sum, kTile, Gram>(p, item, tile);
}

using GramKernel = void (*)(GramLaunch);

template <class Format>
GramKernel gram_kernel_of(int64_t samples) {
  if (samples > kLargeTile) return gram_kernel<Format, kManyTiles, float>;
  switch (tile_samples(samples)) {
    case 16:
      return gram_kernel<Format, 16, float>;
    case 32:
      return gram_kernel<Format, 32, float>;
    default:
      return gram_kernel<Format, kLargeTile, float>;
  }
}

// The kernel for a launch's types and samples.
inline GramKernel gram_kernel_for(const GramLaunch& p) {
  if (p.gram_type == Scalar::kFloat64) return gram_kernel<AnyInFloat64, kManyTiles, double>;
  switch (p.element_type) {
    case Scalar::kFloat64:
      return gram_kernel<AnyInFloat64, kManyTiles, float>;
    case Scalar::kBFloat16:
      return gram_kernel_of<BFloat16>(p.samples);
    case Scalar::kFloat16:
      return gram_kernel_of<Float16>(p.samples);
    default:
      return p.precision == Precision::kTF32 ? gram_kernel_of<Float32AsTF32>(p.samples)
                                             : gram_kernel_of<Float32InTwo>(p.samples);
  }
}

// Dynamic shared memory of one block, in bytes.
inline int64_t gram_shared_bytes(const GramLaunch& p) {
  int64_t words = 0;
  if (p.samples <= 16) {
    words = Products<BFloat16, 2, 0>::kSharedWords;
  } else if (p.samples <= 32) {
    words = Products<BFloat16, 4, 0>::kSharedWords;
  } else {
    words = Products<BFloat16, kLargeTile / 8, 0>::kSharedWords;
  }
  if (p.samples > kLargeTile) {
    words = std::max<int64_t>(words,
                              Products<BFloat16, kLargeTile / 8, kSideColumns / 8>::kSharedWords);
  }
  int64_t bytes = words * sizeof(uint4);
  if (sums_in_double(p.element_type, p.gram_type)) bytes = kDoubleSharedBytes;
  return std::max(kVerdictBytes + bytes, chip_bytes(p.gram_type, p.samples, p.basis));
}

}  // namespace lightning_mat
