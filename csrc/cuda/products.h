// Products of an item on tensor cores.

#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"
#include "gather.h"
#include "gram_launch.h"

namespace lightning_mat {

// One warp's part of an item: 8 * kRows samples times themselves (kColumns = 0: the squares of the
// lower triangle) or times 8 * kColumns others.
template <class Format, int kRows, int kColumns>
class Products {
 public:
  static constexpr int kGroups = kRows + kColumns;
  static constexpr int kFragments =
      kColumns == 0 ? square_fragments(8 * kRows) : kRows / 2 * kColumns;
  // Slabs in shared memory at a time: one is multiplied, the others are on their way. Two blocks
  // have room on a multiprocessor of 100 KB; smaller tiles need more slabs to fill the time.
  static constexpr int kStages = kGroups > 8 ? 2 : kGroups == 8 ? 3 : 4;
  // Shared memory in 16-byte words: slabs, then the warps' sums.
  static constexpr int kSharedWords =
      kGramThreads * (kStages * kGroups > kFragments ? kStages * kGroups : kFragments);

  __device__ Products(const GramLaunch& p, const Tile& tile)
      : rows_(tile.row, p.samples), columns_(tile.column, p.samples) {}

  __device__ __forceinline__ void add(const Block& block, const Walk& walk, int elements,
                                      uint4* shared) {
    // Warps take slabs in turn, and lanes 16 bytes of each.
    constexpr int kSlab = 4 * kVector, kTurn = kGramWarps * kSlab;
    const int first = threadIdx.x / 32 * kSlab;
    const int slabs = (elements - first + kTurn - 1) / kTurn;
    int element = first + threadIdx.x % 4 * kVector;

    const bool loads = loads_vectors(walk, block, sizeof(Element));
    const bool forms = forms_vectors(walk, block, sizeof(Element));
    const int64_t sample_stride = block.sample_stride;
    const Stride stride = walk.stride(kTurn);
    const Element* from = nullptr;
    int column = 0;
    if (loads) {
      const Position start = walk.at(element);
      from = static_cast<const Element*>(block.grad) + rows_.first * sample_stride +
             walk.offset(start);
      column = start.column;
    }

    // This thread's words of a slab lie kGramThreads apart, and nobody else touches them.
    uint4* const own = shared + threadIdx.x;
    uint4 *next = own, *current = own;
    const auto advance = [&](uint4*& stage) {
      stage += kGroups * kGramThreads;
      if (stage == own + kStages * kGroups * kGramThreads) stage = own;
    };
    for (int slab = 1 - kStages; slab < slabs; ++slab) {
      if (slab + kStages - 1 < slabs) {
        if (loads) {
          copy_slab(from, sample_stride, element < elements, next);
          from += walk.step(column, stride);
        } else {
          gather_slab(block, walk, walk.at(element), elements - element, forms, next);
        }
        element += kTurn;
        advance(next);
      }
      end_group();
      if (slab < 0) continue;
      wait_for_groups<kStages - 1>();
      add_slab(current);
      advance(current);
    }
  }

  // Adds the warps' sums in their order into the item's partial Gram.
  __device__ __forceinline__ void store(float4* partial, uint4* shared) const {
    // A thread's sums go where only its own words of slabs were.
    float4* sums = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      sums[f * kGramThreads + threadIdx.x] = {sums_[f][0], sums_[f][1], sums_[f][2], sums_[f][3]};
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int f = warp; f < kFragments; f += kGramWarps) {
      float4 total = sums[f * kGramThreads + lane];
#pragma unroll
      for (int w = 1; w < kGramWarps; ++w) {
        const float4 more = sums[f * kGramThreads + w * 32 + lane];
        total = {total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w};
      }
      partial[f * 32 + lane] = total;
    }
  }

 private:
  using Element = typename Format::Element;
  static constexpr int kVector = 16 / sizeof(Element);
  // Of a thread's four 32-bit words of a slab and sample, those that are multiplied at a time: with
  // more, the parts would not fit the registers.
  static constexpr int kWords = 4 / Format::kParts;

  __device__ __forceinline__ void copy_slab(const Element* rows, int64_t sample_stride, bool inside,
                                            uint4* to) const {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      copy_16(to + k * kGramThreads, rows + 8 * k * sample_stride, inside && rows_.has(k));
    }
    const Element* columns = rows + (columns_.first - rows_.first) * sample_stride;
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      copy_16(to + (kRows + k) * kGramThreads, columns + 8 * k * sample_stride,
              inside && columns_.has(k));
    }
  }

  __device__ __forceinline__ void gather_slab(const Block& block, const Walk& walk,
                                              const Position& position, int count, bool vectors,
                                              uint4* to) const {
    constexpr int kAtOnce = 2;  // more would cost registers that the main loop needs
#pragma unroll 1
    for (int k = 0; k < kGroups; k += kAtOnce) {
      const bool column = kColumns > 0 && k >= kRows;
      const Samples samples = column ? Samples(columns_) : Samples(rows_);
      gather_groups<Format, kAtOnce>(block, walk, position, count, vectors, samples,
                                     column ? k - kRows : k, to + k * kGramThreads);
    }
  }

  __device__ __forceinline__ void add_slab(const uint4* slab) {
#pragma unroll 1
    for (int start = 0; start < 4; start += kWords) {
      uint32_t parts[Format::kParts][kGroups][kWords];
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        uint32_t words[kWords];
        const uint32_t* from = reinterpret_cast<const uint32_t*>(slab + k * kGramThreads) + start;
        std::memcpy(words, __builtin_assume_aligned(from, sizeof(words)), sizeof(words));
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          uint32_t split[Format::kParts];
          Format::split(words[w], split);
#pragma unroll
          for (int q = 0; q < Format::kParts; ++q) parts[q][k][w] = split[q];
        }
      }
      add_products(parts);
    }
  }

  // Sums products from zero and then adds them: tensor cores cut the last bits of sums off, which a
  // long sum would feel.
  __device__ __forceinline__ void add_products(
      const uint32_t (&parts)[Format::kParts][kGroups][kWords]) {
    constexpr int kRight = kColumns == 0 ? kRows : kColumns;
#pragma unroll
    for (int c = 0; c < kRight; ++c) {
      const int right = kColumns == 0 ? c : kRows + c;
#pragma unroll
      for (int r = kColumns == 0 ? c / 2 : 0; r < kRows / 2; ++r) {
        float sum[4] = {};
        if constexpr (Format::kParts == 2) {  // the small terms first
          multiply(sum, parts[1], 2 * r, parts[0], right);
          multiply(sum, parts[0], 2 * r, parts[1], right);
        }
        multiply(sum, parts[0], 2 * r, parts[0], right);
        const int fragment = (kColumns == 0 ? r * (r + 1) : r * kColumns) + c;
        const bool above = kColumns == 0 && c == 2 * r + 1;  // its upper half is above the diagonal
#pragma unroll
        for (int k = above ? 2 : 0; k < 4; ++k) sums_[fragment][k] += sum[k];
      }
    }
  }

  // The 16 samples of groups `left` and `left` + 1 times the 8 of group `right`.
  __device__ static void multiply(float (&sum)[4], const uint32_t (&a)[kGroups][kWords], int left,
                                  const uint32_t (&b)[kGroups][kWords], int right) {
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      Format::multiply(sum, {a[left][w], a[left + 1][w], a[left][w + 1], a[left + 1][w + 1]},
                       {b[right][w], b[right][w + 1]});
    }
  }

  Samples rows_, columns_;
  float sums_[kFragments][4] = {};
};

template <class Format, int kRows, int kColumns>
__device__ __forceinline__ void multiply_item(const GramLaunch& p, const Item& item,
                                              const Tile& tile, float* partial, uint4* shared) {
  Products<Format, kRows, kColumns> products(p, tile);
  if (item.elements > 0) {
    const Block& block = p.blocks[item.block];
    products.add(block, Walk(block, p.pieces[item.piece], item), item.elements, shared);
  }
  products.store(reinterpret_cast<float4*>(partial), shared);
}

}  // namespace lightning_mat
