// Copies of boxes: a thread copies words, a block a stretch of neighbouring ones, which mostly are
// one box's.

#pragma once

#include <cstdint>

#include "../boxes.h"
#include "device.h"

namespace lightning_mat {

constexpr int kBoxesThreads = 256;
constexpr int kBoxesWords = 4;  // of a thread
constexpr int64_t kBoxesStretch = int64_t{kBoxesThreads} * kBoxesWords;

inline int64_t boxes_blocks(const BoxesParams& p) {
  return (p.words + kBoxesStretch - 1) / kBoxesStretch;
}

// The last of the boxes [low, high] that begins at `word` or before it; `low` does.
__device__ inline int64_t box_of(const BoxCopy* boxes, int64_t low, int64_t high, int64_t word) {
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (boxes[middle].first <= word) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <class T>
__device__ inline void copy_word(unsigned char* to, const unsigned char* from, int64_t to_word,
                                 int64_t from_word) {
  reinterpret_cast<T*>(to)[to_word] = reinterpret_cast<const T*>(from)[from_word];
}

__global__ void __launch_bounds__(kBoxesThreads) boxes_kernel(BoxesParams p) {
  const int64_t begin = blockIdx.x * kBoxesStretch;
  const int64_t end = begin + kBoxesStretch < p.words ? begin + kBoxesStretch : p.words;
  const int64_t low = box_of(p.boxes, 0, p.count - 1, begin);
  const int64_t high = box_of(p.boxes, low, p.count - 1, end - 1);
  for (int64_t word = begin + threadIdx.x; word < end; word += kBoxesThreads) {
    const BoxCopy b = p.boxes[box_of(p.boxes, low, high, word)];
    const int64_t in_flat = word - b.first;
    int64_t in_full = in_flat;
    if (b.rows > 1) {
      // A division of 64 bits takes as long as the copy.
      const int64_t row = (in_flat | b.run) >> 32 == 0
                              ? static_cast<uint32_t>(in_flat) / static_cast<uint32_t>(b.run)
                              : in_flat / b.run;
      in_full += row * (b.stride - b.run);
    }
    unsigned char* to = p.gather ? b.flat : b.full;
    const unsigned char* from = p.gather ? b.full : b.flat;
    const int64_t to_word = p.gather ? in_flat : in_full;
    const int64_t from_word = p.gather ? in_full : in_flat;
    switch (b.width) {
      case 16:
        copy_word<uint4>(to, from, to_word, from_word);
        break;
      case 8:
        copy_word<uint64_t>(to, from, to_word, from_word);
        break;
      case 4:
        copy_word<uint32_t>(to, from, to_word, from_word);
        break;
      case 2:
        copy_word<uint16_t>(to, from, to_word, from_word);
        break;
      default:
        copy_word<uint8_t>(to, from, to_word, from_word);
    }
  }
}

}  // namespace lightning_mat
