// How the Gram kernel's work is cut up, walked and put together again. Host and device share this:
// what the kernel does with indices is tested without a GPU.
//
// A Gram [samples, samples] is cut into tiles; a share's pieces are cut into items of consecutive
// elements. One block of threads takes one item for one tile and leaves a partial Gram. Partials
// are added in an order that depends on nothing but the share: items within groups, groups within
// the share; then the shares are added to the Gram, one after the other.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "mntk.h"
#include "portable.h"

namespace lightning_mat {

// ---- Tiles of a Gram --------------------------------------------------------------------------

// Tiles on the diagonal are squares of 16, 32 or 64 samples, of which the lower triangle counts.
// Below them are tiles of 64 by 32: a 64 by 64 square would not fit the registers.
constexpr int kLargeTile = 64;
constexpr int kSideColumns = 32;
// Samples that one row of a product's fragments has, and the columns of one fragment.
constexpr int kFragmentRows = 16;
constexpr int kFragmentColumns = 8;
constexpr int kFragment = kFragmentRows * kFragmentColumns;

struct Tile {
  int row, column;  // its first samples
  bool diagonal;
};

LIGHTNING_MAT_INLINE int tile_samples(int64_t samples) {
  return samples <= 16 ? 16 : samples <= 32 ? 32 : kLargeTile;
}

LIGHTNING_MAT_INLINE int64_t tile_count(int64_t samples) {
  const int64_t squares = (samples + kLargeTile - 1) / kLargeTile;
  return squares <= 1 ? 1 : squares * squares;  // squares, and 2 r tiles left of the r-th of them
}

LIGHTNING_MAT_INLINE Tile tile_at(int64_t samples, int index) {
  const int squares = static_cast<int>((samples + kLargeTile - 1) / kLargeTile);
  if (index < squares) return {index * kLargeTile, index * kLargeTile, true};
  int row = 1;
  for (index -= squares; index >= 2 * row; ++row) index -= 2 * row;
  return {row * kLargeTile, index * kSideColumns, false};
}

// Fragments of a tile: those of the 16x16 squares of the lower triangle, or of all of a side tile.
LIGHTNING_MAT_INLINE constexpr int square_fragments(int tile) {
  return tile / kFragmentRows * (tile / kFragmentRows + 1);
}
LIGHTNING_MAT_INLINE constexpr int side_fragments() {
  return kLargeTile / kFragmentRows * (kSideColumns / kFragmentColumns);
}

struct Place {
  int row, column;  // within the tile
};

// Where element `index` of a tile's partial Gram belongs. The order is that of a tensor core's
// sums, so that threads store what they have: [fragment][lane][4], a lane's four being
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1) with g = lane / 4, t = lane % 4.
LIGHTNING_MAT_INLINE Place fragment_place(bool diagonal, int index) {
  const int fragment = index / kFragment, lane = index / 4 % 32, part = index % 4;
  constexpr int kSide = kSideColumns / kFragmentColumns;
  // The squares of row r start at fragment r (r + 1).
  const int row =
      diagonal ? (fragment >= 2) + (fragment >= 6) + (fragment >= 12) : fragment / kSide;
  const int column = diagonal ? fragment - row * (row + 1) : fragment % kSide;
  return {row * kFragmentRows + lane / 4 + part / 2 * 8,
          column * kFragmentColumns + lane % 4 * 2 + part % 2};
}

// ---- Items, groups, cells ---------------------------------------------------------------------

constexpr int64_t kItemElements = 1024;  // of an item, unless its share would have too many items
constexpr int64_t kShareItems = 1024;    // the most that a share and its pieces' ends may need

// Elements [first, first + elements) of a piece, times one tile of its target's Gram. A target
// without elements has one item per tile with none.
struct Item {
  int64_t first;
  int32_t elements, piece, block, tile, group;
};

// Items [first, last), of one share and one tile, whose partials are added first.
struct Group {
  int32_t first, last, cell, share;
};

// One tile of one target's Gram: groups [first, last), of all its shares in their order.
struct Cell {
  int32_t first, last, target, tile;
};

struct Work {
  int64_t samples = 0, target_count = 0;
  std::vector<Item> items;
  std::vector<Group> groups;
  std::vector<Cell> cells;
};

LIGHTNING_MAT_INLINE int64_t piece_elements(const Piece& piece) {
  return (piece.r1 - piece.r0) * (piece.c1 - piece.c0);
}

namespace work_detail {

inline int32_t narrow(size_t value) {
  if (value > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::length_error("the Gram kernel's work has too many items for one launch");
  }
  return static_cast<int32_t>(value);
}

// Cuts one share into items for one tile, and these into about as many groups as a group has items.
inline void add_share(Work& work, const Piece* pieces, const Share& share, int32_t index,
                      int tile) {
  int64_t total = 0;
  for (int64_t k = share.first; k < share.last; ++k) total += piece_elements(pieces[k]);
  int64_t size = kItemElements;
  while (size * kShareItems < total) size *= 2;
  const size_t begin = work.items.size();
  for (int64_t k = share.first; k < share.last; ++k) {
    const int64_t elements = piece_elements(pieces[k]);
    for (int64_t first = 0; first < elements; first += size) {
      work.items.push_back({first, static_cast<int32_t>(std::min(size, elements - first)),
                            static_cast<int32_t>(k), static_cast<int32_t>(share.block), tile, 0});
    }
  }
  const size_t end = work.items.size();
  narrow(end);
  const auto in_group = static_cast<size_t>(std::ceil(std::sqrt(static_cast<double>(end - begin))));
  for (size_t first = begin; first < end; first += in_group) {
    const size_t last = std::min(first + in_group, end);
    for (size_t i = first; i < last; ++i) work.items[i].group = narrow(work.groups.size());
    work.groups.push_back({narrow(first), narrow(last), narrow(work.cells.size()), index});
  }
}

}  // namespace work_detail

inline Work plan_work(int64_t samples, const Piece* pieces, const Share* shares,
                      const Target* targets, int64_t target_count) {
  using work_detail::narrow;
  Work work;
  work.samples = samples;
  work.target_count = target_count;
  for (int64_t t = 0; t < target_count; ++t) {
    for (int tile = 0; tile < tile_count(samples); ++tile) {
      const size_t first = work.groups.size();
      for (int64_t k = targets[t].first; k < targets[t].last; ++k) {
        work_detail::add_share(work, pieces, shares[k], narrow(static_cast<size_t>(k)), tile);
      }
      if (work.groups.size() == first) {
        const int32_t item = narrow(work.items.size());
        work.items.push_back({0, 0, 0, 0, tile, narrow(first)});
        work.groups.push_back({item, item + 1, narrow(work.cells.size()), 0});
      }
      work.cells.push_back(
          {narrow(first), narrow(work.groups.size()), narrow(static_cast<size_t>(t)), tile});
    }
  }
  return work;
}

// ---- Memory -----------------------------------------------------------------------------------

// Whether partials are float64: where the elements or the Grams are.
LIGHTNING_MAT_INLINE bool sums_in_double(Scalar element_type, Scalar gram_type) {
  return element_type == Scalar::kFloat64 || gram_type == Scalar::kFloat64;
}

// Elements between the partials of neighbouring items.
LIGHTNING_MAT_INLINE int64_t partial_elements(int64_t samples) {
  return square_fragments(tile_samples(samples)) * kFragment;
}

inline int64_t partial_bytes(const Work& work, bool wide) {
  const int64_t scalar = wide ? sizeof(double) : sizeof(float);
  return static_cast<int64_t>(work.items.size()) * partial_elements(work.samples) * scalar;
}

// Where the tables lie in one buffer, in bytes, so that one copy brings all of them to the device.
struct TableLayout {
  int64_t blocks, pieces, targets, items, groups, cells, counters, bytes;
};

inline TableLayout table_layout(const Work& work, int64_t block_count, int64_t piece_count) {
  int64_t end = 0;
  const auto take = [&](int64_t count, size_t size) {
    const int64_t start = end;
    end += (count * static_cast<int64_t>(size) + 15) / 16 * 16;
    return start;
  };
  const auto items = static_cast<int64_t>(work.items.size());
  const auto groups = static_cast<int64_t>(work.groups.size());
  const auto cells = static_cast<int64_t>(work.cells.size());
  TableLayout layout{};
  layout.blocks = take(block_count, sizeof(Block));
  layout.pieces = take(piece_count, sizeof(Piece));
  layout.targets = take(work.target_count, sizeof(Target));
  layout.items = take(items, sizeof(Item));
  layout.groups = take(groups, sizeof(Group));
  layout.cells = take(cells, sizeof(Cell));
  layout.counters = take(groups + cells + work.target_count, sizeof(uint32_t));
  layout.bytes = end;
  return layout;
}

// Fills a buffer of layout.bytes; the counters become zeros.
inline void write_tables(const Work& work, const TableLayout& layout, const Block* blocks,
                         int64_t block_count, const Piece* pieces, int64_t piece_count,
                         const Target* targets, unsigned char* buffer) {
  std::memset(buffer, 0, static_cast<size_t>(layout.bytes));
  const auto put = [&](int64_t offset, const auto* from, size_t count) {
    if (count > 0) std::memcpy(buffer + offset, from, count * sizeof(*from));
  };
  put(layout.blocks, blocks, static_cast<size_t>(block_count));
  put(layout.pieces, pieces, static_cast<size_t>(piece_count));
  put(layout.targets, targets, static_cast<size_t>(work.target_count));
  put(layout.items, work.items.data(), work.items.size());
  put(layout.groups, work.groups.data(), work.groups.size());
  put(layout.cells, work.cells.data(), work.cells.size());
}

// ---- Walking the elements of an item ----------------------------------------------------------

struct Position {
  int row, column;
};

struct Stride {
  int64_t offset, next_row;  // what to add to an offset, and once more where a row ends
  int columns;
};

// The elements of one item in the order in which they are multiplied. Element e of a piece is
// column e % width of row e / width. For a block that lies in memory, "columns" are the dimension
// whose neighbours are closer, and rows that follow each other without a gap are walked as one.
class Walk {
 public:
  int64_t first_row, first_column;  // of the block: position (0, 0)
  int64_t row_stride, column_stride;

  LIGHTNING_MAT_INLINE Walk(const Block& block, const Piece& piece, const Item& item) {
    const int64_t rows = piece.r1 - piece.r0, columns = piece.c1 - piece.c0;
    first_row = piece.r0;
    first_column = piece.c0;
    row_stride = block.row_stride;
    column_stride = block.column_stride;
    int64_t height = rows, width = columns;
    const bool stored = block.grad != nullptr;
    if (stored && (columns == 1 || (rows > 1 && row_stride < column_stride))) {
      first_row = piece.c0;
      first_column = piece.r0;
      row_stride = block.column_stride;
      column_stride = block.row_stride;
      height = columns;
      width = rows;
    }
    if (stored && (height == 1 || row_stride == width * column_stride)) {
      origin_ = first_row * row_stride + (first_column + item.first) * column_stride;
      row_stride = 0;
      start_ = 0;
      width_ = item.elements;
    } else {
      first_row += item.first / width;
      origin_ = first_row * row_stride + first_column * column_stride;
      start_ = static_cast<int>(item.first % width);
      width_ = static_cast<int>(width);
    }
  }

  // The item's first position, and that of its element `index`.
  LIGHTNING_MAT_INLINE Position start() const { return {0, start_}; }
  LIGHTNING_MAT_INLINE Position at(int index) const {
    return {(start_ + index) / width_, (start_ + index) % width_};
  }

  LIGHTNING_MAT_INLINE void next(Position& position) const {
    if (++position.column == width_) position = {position.row + 1, 0};
  }

  // Where the first sample's element lies in a block that lies in memory.
  LIGHTNING_MAT_INLINE int64_t offset(const Position& position) const {
    return origin_ + position.row * row_stride + position.column * column_stride;
  }

  // The same for a thread that goes on and on by a fixed number of elements: its offset grows by
  // what step() returns, and it keeps its column.
  LIGHTNING_MAT_INLINE Stride stride(int elements) const {
    const int64_t rows = elements / width_;
    const int columns = elements % width_;
    return {rows * row_stride + columns * column_stride, row_stride - width_ * column_stride,
            columns};
  }
  LIGHTNING_MAT_INLINE int64_t step(int& column, const Stride& stride) const {
    column += stride.columns;
    if (column < width_) return stride.offset;
    column -= width_;
    return stride.offset + stride.next_row;
  }

  // Whether the elements can be taken `count` at a time, all of one row, starting at any multiple
  // of `count`.
  LIGHTNING_MAT_INLINE bool even(int count) const {
    return width_ % count == 0 && start_ % count == 0;
  }

 private:
  int64_t origin_;
  int start_, width_;
};

LIGHTNING_MAT_INLINE bool on_16_bytes(const void* address, int64_t offset, int scalar) {
  return (reinterpret_cast<uintptr_t>(address) + static_cast<uint64_t>(offset * scalar)) % 16 == 0;
}

// Whether 16 bytes of every sample can be loaded at once: always of elements that are one row's,
// neighbours and aligned.
LIGHTNING_MAT_INLINE bool loads_vectors(const Walk& walk, const Block& block, int scalar) {
  const int count = 16 / scalar;
  return block.grad != nullptr && walk.even(count) && walk.column_stride == 1 &&
         walk.row_stride % count == 0 && block.sample_stride % count == 0 &&
         on_16_bytes(block.grad, walk.offset({0, 0}), scalar);
}

// The same of the rows of `a` that a block on chip is formed from.
LIGHTNING_MAT_INLINE bool forms_vectors(const Walk& walk, const Block& block, int scalar) {
  const int count = 16 / scalar;
  return block.grad == nullptr && walk.even(count) && block.a_column == 1 &&
         block.a_token % count == 0 && block.a_sample % count == 0 &&
         on_16_bytes(block.a, walk.first_column, scalar);
}

}  // namespace lightning_mat
