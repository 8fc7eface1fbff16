// Elements that cannot be copied 16 bytes at a time: with strides, unaligned, or formed from
// tokens.

#pragma once

#include <cstdint>
#include <cstring>

#include "../work.h"
#include "formats.h"

namespace lightning_mat {

constexpr int kGramThreads = 128;
constexpr int kGramWarps = kGramThreads / 32;

// A lane's samples: every eighth of a tile's rows or columns.
struct Samples {
  int first;
  int left;  // samples from the first one on

  __device__ Samples(int start, int64_t samples)
      : first(start + threadIdx.x % 32 / 4), left(static_cast<int>(samples) - first) {}
  __device__ bool has(int group) const { return 8 * group < left; }
};

// Elements one by one: of a block that lies in memory, as the strides say, or formed from tokens.
// The code takes a few groups at a time into shared memory, so that it is a short loop. What is not
// inside is loaded from the item's first element and then dropped: without branches between them,
// loads do not wait for each other.
template <class Format, int kAtOnce>
__device__ __forceinline__ void gather_groups(const Block& block, const Walk& walk,
                                              const Position& start, int count, bool vectors,
                                              const Samples& samples, int group, uint4* words) {
  using Element = typename Format::Element;
  constexpr int kVector = 16 / sizeof(Element);
  float values[kAtOnce][kVector] = {};
  Position position = start;
  if (block.grad != nullptr) {
    const auto* grad = static_cast<const Element*>(block.grad);
    const int64_t first = walk.offset(walk.start());
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const int64_t offset = walk.offset(position);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t sample = samples.first + 8 * (group + k);
        const bool inside = e < count && samples.has(group + k);
        const float value = widen(grad[inside ? offset + sample * block.sample_stride : first]);
        values[k][e] = inside ? value : 0.0f;
      }
      walk.next(position);
    }
  } else {
    // Where the first token's elements lie in a and b.
    const auto at = [&](const Position& place, int k, bool inside, const Element*& a,
                        const Element*& b) {
      const Position from = inside ? place : walk.start();
      const int64_t sample = inside ? samples.first + 8 * (group + k) : 0;
      a = static_cast<const Element*>(block.a) + sample * block.a_sample +
          (walk.first_column + from.column) * block.a_column;
      b = static_cast<const Element*>(block.b) + sample * block.b_sample +
          (walk.first_row + from.row) * block.b_row;
    };
    const int64_t a_token = block.a_token, b_token = block.b_token;
    const Element *a[kAtOnce], *b[kAtOnce];
    if (vectors) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        at(position, k, count > 0 && samples.has(group + k), a[k], b[k]);
      }
#pragma unroll 1
      for (int64_t t = 0; t < block.tokens; ++t) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const float scale = widen(b[k][t * b_token]);
          const uint4 row = load_16(a[k] + t * a_token);
          Element elements[kVector];
          std::memcpy(elements, &row, sizeof(row));
#pragma unroll
          for (int e = 0; e < kVector; ++e) values[k][e] += scale * widen(elements[e]);
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          at(position, k, e < count && samples.has(group + k), a[k], b[k]);
        }
#pragma unroll 1
        for (int64_t t = 0; t < block.tokens; ++t) {
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            values[k][e] += widen(b[k][t * b_token]) * widen(a[k][t * a_token]);
          }
        }
        walk.next(position);
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (e >= count || !samples.has(group + k)) values[k][e] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    constexpr int kWord = kVector / 4;
    words[k * kGramThreads] = {Format::word(values[k]), Format::word(values[k] + kWord),
                               Format::word(values[k] + 2 * kWord),
                               Format::word(values[k] + 3 * kWord)};
  }
}

}  // namespace lightning_mat
