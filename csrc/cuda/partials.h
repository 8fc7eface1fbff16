// From the partial Grams of items to Grams and eigenvalues: whoever comes last adds up.

#pragma once

#include <cstdint>

#include "../work.h"
#include "block_team.h"
#include "device.h"
#include "gather.h"
#include "gram_launch.h"

namespace lightning_mat {

// The first bytes of shared memory: whether this block was the last.
constexpr int kVerdictBytes = 16;

// Four neighbours of a partial Gram, as another block left them.
__device__ __forceinline__ void add_four(const float* from, float (&to)[4]) {
  const float4 four = load_fresh(reinterpret_cast<const float4*>(from));
  to[0] += four.x;
  to[1] += four.y;
  to[2] += four.z;
  to[3] += four.w;
}

__device__ __forceinline__ void add_four(const double* from, double (&to)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) to[k] += load_fresh(from + k);
}

__device__ __forceinline__ void store_four(const float (&from)[4], float* to) {
  *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
}

__device__ __forceinline__ void store_four(const double (&from)[4], double* to) {
#pragma unroll
  for (int k = 0; k < 4; ++k) to[k] = from[k];
}

// True in the last of `count` blocks to arrive here; what the others wrote before is visible to it.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, int count) {
  if (count == 1) {
    __syncthreads();
    return true;
  }
  auto* verdict = reinterpret_cast<volatile uint32_t*>(shared_memory());
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = take_ticket(counter) + 1 == static_cast<uint32_t>(count);
    if (last) *counter = 0;  // ready for the next launch
    *verdict = last;
  }
  __syncthreads();
  if (*verdict == 0) return false;
  __threadfence();
  return true;
}

// A thread's share of a tile's elements: fours of neighbours, kGramThreads fours apart.
template <class Sum, int kTile>
struct Fours {
  static constexpr int kCount =
      (square_fragments(kTile < kLargeTile ? kTile : kLargeTile) * 32 + kGramThreads - 1) /
      kGramThreads;
  Sum values[kCount][4] = {};

  __device__ static int start(int n) { return (n * kGramThreads + threadIdx.x) * 4; }

  // Adds the partials slot(first), ..., slot(last - 1), in this order; several are on their way.
  template <class Slot>
  __device__ __forceinline__ void add(const Sum* partials, int64_t stride, int elements, int first,
                                      int last, Slot slot) {
#pragma unroll 4
    for (int k = first; k < last; ++k) {
      const Sum* partial = partials + slot(k) * stride;
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        if (start(n) < elements) add_four(partial + start(n), values[n]);
      }
    }
  }

  template <class Gram>
  __device__ __forceinline__ void add_rounded(const Fours& other) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        values[n][k] = static_cast<Gram>(values[n][k] + other.values[n][k]);
      }
    }
  }
};

// Adds the shares of a tile to the Gram, both below and above the diagonal.
template <class Sum, int kTile, class Gram>
__device__ __forceinline__ void finish_cell(const GramLaunch& p, const Cell& cell, const Tile& tile,
                                            int elements) {
  const Target target = p.targets[cell.target];
  Gram* gram = static_cast<Gram*>(p.grams) + target.slot * p.samples * p.samples;
  const int samples = static_cast<int>(p.samples);
  // Calls visit(value, i, j) for the thread's elements on and below the diagonal.
  const auto for_each = [&](Fours<Sum, kTile>& values, auto visit) {
#pragma unroll
    for (int n = 0; n < Fours<Sum, kTile>::kCount; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int element = values.start(n) + k;
        const Place place = fragment_place(tile.diagonal, element);
        const int i = tile.row + place.row, j = tile.column + place.column;
        if (element < elements && i < samples && j <= i) visit(values.values[n][k], i, j);
      }
    }
  };
  Fours<Sum, kTile> total;
  if (target.fresh == 0) {
    for_each(total,
             [&](Sum& value, int i, int j) { value = load_fresh(gram + i * p.samples + j); });
  }
  const auto slot = [&](int g) -> int64_t { return p.groups[g].first; };
  for (int first = cell.first, last; first < cell.last; first = last) {
    last = first + 1;
    while (last < cell.last && p.groups[last].share == p.groups[first].share) ++last;
    Fours<Sum, kTile> share;
    share.add(static_cast<const Sum*>(p.partials), partial_elements(p.samples), elements, first,
              last, slot);
    // Rounded as it would be if this share were added by a launch of its own.
    total.template add_rounded<Gram>(share);
  }
  for_each(total, [&](Sum value, int i, int j) {
    gram[i * p.samples + j] = static_cast<Gram>(value);
    gram[j * p.samples + i] = static_cast<Gram>(value);
  });
}

// The solver once for all kernels: it takes as long to compile as all the rest.
template <class Gram>
__device__ __attribute__((noinline)) void solve(const Gram* gram, int64_t samples, Basis basis,
                                                double* eigenvalues) {
  solve_on_chip<Gram>(gram, samples, basis, eigenvalues);
}

// What follows an item: the sums that it was the last to wait for.
template <class Sum, int kTile, class Gram>
__device__ __forceinline__ void combine(const GramLaunch& p, const Item& item, const Tile& tile) {
  const int elements =
      kFragment * (tile.diagonal ? square_fragments(tile_samples(p.samples)) : side_fragments());
  const Group group = p.groups[item.group];
  if (!arrives_last(p.counters + item.group, group.last - group.first)) return;
  if (group.last - group.first > 1) {
    using Values = Fours<Sum, kTile>;
    Sum* partials = static_cast<Sum*>(p.partials);
    const int64_t stride = partial_elements(p.samples);
    Values sum;
    sum.add(partials, stride, elements, group.first, group.last,
            [](int item_index) -> int64_t { return item_index; });
    Sum* partial = partials + group.first * stride;
#pragma unroll
    for (int n = 0; n < Values::kCount; ++n) {
      if (Values::start(n) < elements) store_four(sum.values[n], partial + Values::start(n));
    }
  }
  const Cell cell = p.cells[group.cell];
  uint32_t* counter = p.counters + p.group_count + group.cell;
  if (!arrives_last(counter, cell.last - cell.first)) return;
  finish_cell<Sum, kTile, Gram>(p, cell, tile, elements);

  counter = p.counters + p.group_count + p.cell_count + cell.target;
  if (!arrives_last(counter, static_cast<int>(tile_count(p.samples)))) return;
  const Target& target = p.targets[cell.target];
  if (p.basis == Basis::kNone || target.row < 0) return;
  const auto* gram = static_cast<const Gram*>(p.grams) + target.slot * p.samples * p.samples;
  solve<Gram>(gram, p.samples, p.basis, p.eigenvalues + target.row * p.samples);
}

}  // namespace lightning_mat
