// Products of an item in float64, on the ordinary units: for float64 models, and plain.

#pragma once

#include <cstdint>

#include "formats.h"
#include "gather.h"
#include "gram_launch.h"
#include "partials.h"

namespace lightning_mat {

constexpr int kChunk = 16;             // elements of every sample in shared memory at a time
constexpr int kChunkRow = kChunk + 1;  // neighbouring samples lie in different banks
constexpr int kDoubleSharedBytes = (kLargeTile + kSideColumns) * kChunkRow * sizeof(double);

__device__ __forceinline__ double load_double(const void* from, int64_t offset, Scalar type) {
  switch (type) {
    case Scalar::kFloat64:
      return static_cast<const double*>(from)[offset];
    case Scalar::kFloat32:
      return static_cast<const float*>(from)[offset];
    case Scalar::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(from)[offset]);
    default:
      return widen(static_cast<const __half*>(from)[offset]);
  }
}

__device__ __forceinline__ double double_element(const Block& block, const Walk& walk,
                                                 const Position& position, int64_t sample,
                                                 Scalar type) {
  if (block.grad != nullptr) {
    return load_double(block.grad, sample * block.sample_stride + walk.offset(position), type);
  }
  double sum = 0.0;
  int64_t a = sample * block.a_sample + (walk.first_column + position.column) * block.a_column;
  int64_t b = sample * block.b_sample + (walk.first_row + position.row) * block.b_row;
  for (int64_t t = 0; t < block.tokens; ++t, a += block.a_token, b += block.b_token) {
    sum += load_double(block.a, a, type) * load_double(block.b, b, type);
  }
  return sum;
}

// The same fragments as on tensor cores, each a warp's.
__device__ __forceinline__ void multiply_item_in_double(const GramLaunch& p, const Item& item,
                                                        const Tile& tile, double* partial,
                                                        double* shared) {
  constexpr int kOwned = square_fragments(kLargeTile) / kGramWarps;  // of the largest tile
  const int side = tile.diagonal ? tile_samples(p.samples) : kLargeTile;
  const int fragments = tile.diagonal ? square_fragments(side) : side_fragments();
  const int staged = tile.diagonal ? side : side + kSideColumns;
  const double* columns = shared + (tile.diagonal ? 0 : side * kChunkRow);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sums[kOwned][4] = {};

  for (int start = 0; start < item.elements; start += kChunk) {
    const Block& block = p.blocks[item.block];
    const Walk walk(block, p.pieces[item.piece], item);
    __syncthreads();
    for (int k = threadIdx.x; k < staged * kChunk; k += kGramThreads) {
      const int s = k / kChunk, e = k % kChunk;
      const int64_t sample = s < side ? tile.row + s : tile.column + s - side;
      const bool inside = sample < p.samples && start + e < item.elements;
      shared[s * kChunkRow + e] =
          inside ? double_element(block, walk, walk.at(start + e), sample, p.element_type) : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOwned; ++n) {
      const int fragment = warp + n * kGramWarps;
      if (fragment >= fragments) continue;
      const Place place = fragment_place(tile.diagonal, (fragment * 32 + lane) * 4);
      const double* row = shared + place.row * kChunkRow;
      const double* column = columns + place.column * kChunkRow;
#pragma unroll 4
      for (int e = 0; e < kChunk; ++e) {
        const double left[2] = {row[e], row[8 * kChunkRow + e]};
        const double right[2] = {column[e], column[kChunkRow + e]};
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[n][k] += left[k / 2] * right[k % 2];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kOwned; ++n) {
    const int fragment = warp + n * kGramWarps;
    if (fragment >= fragments) continue;
    store_four(sums[n], partial + (fragment * 32 + lane) * 4);
  }
}

}  // namespace lightning_mat
