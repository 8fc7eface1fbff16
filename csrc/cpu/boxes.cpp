// Copies of boxes on the CPU: threads take equal shares of the words.

#include "../boxes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace lightning_mat {
namespace {

constexpr int64_t kGrain = 4096;  // words; less is not worth a thread

template <int64_t kWidth>
void copy_words(unsigned char* to, int64_t to_stride, const unsigned char* from,
                int64_t from_stride, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * to_stride * kWidth, from + r * from_stride * kWidth, kWidth);
  }
}

// Rows of a single word: a call for each would cost more than the word.
void copy_column(unsigned char* to, int64_t to_stride, const unsigned char* from,
                 int64_t from_stride, int64_t rows, int64_t width) {
  switch (width) {
    case 16:
      return copy_words<16>(to, to_stride, from, from_stride, rows);
    case 8:
      return copy_words<8>(to, to_stride, from, from_stride, rows);
    case 4:
      return copy_words<4>(to, to_stride, from, from_stride, rows);
    case 2:
      return copy_words<2>(to, to_stride, from, from_stride, rows);
    default:
      return copy_words<1>(to, to_stride, from, from_stride, rows);
  }
}

// Copies the words [begin, end) of a box.
void copy_part(const BoxCopy& b, int64_t begin, int64_t end, bool gather) {
  const auto bytes = [&](int64_t words) { return words * b.width; };
  if (b.run == 1) {
    unsigned char* full = b.full + bytes(begin * b.stride);
    unsigned char* flat = b.flat + bytes(begin);
    if (gather) return copy_column(flat, 1, full, b.stride, end - begin, b.width);
    return copy_column(full, b.stride, flat, 1, end - begin, b.width);
  }
  int64_t row = begin / b.run, column = begin % b.run;
  while (begin < end) {
    const int64_t words = std::min(b.run - column, end - begin);
    unsigned char* full = b.full + bytes(row * b.stride + column);
    unsigned char* flat = b.flat + bytes(begin);
    std::memcpy(gather ? flat : full, gather ? full : flat, static_cast<size_t>(bytes(words)));
    begin += words;
    ++row;
    column = 0;
  }
}

}  // namespace

void cpu_copy_boxes(const BoxesParams& p) {
  at::parallel_for(0, p.words, kGrain, [&](int64_t begin, int64_t end) {
    const BoxCopy* box =
        std::upper_bound(p.boxes, p.boxes + p.count, begin,
                         [](int64_t word, const BoxCopy& b) { return word < b.first; }) -
        1;
    for (; begin < end; ++box) {
      const int64_t stop = std::min(box->first + box->rows * box->run, end);
      copy_part(*box, begin - box->first, stop - box->first, p.gather);
      begin = stop;
    }
  });
}

}  // namespace lightning_mat
