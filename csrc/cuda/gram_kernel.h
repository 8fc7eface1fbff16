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

#include <cstdint>
#include <cstring>

#include "../work.h"
#include "block_team.h"
#include "device.h"
#include "gram_launch.h"

namespace lightning_mat {

constexpr int kGramThreads = 128;
constexpr int kGramWarps = kGramThreads / 32;
// Of gram_kernel's kTile: more samples than one tile has.
constexpr int kManyTiles = 2 * kLargeTile;
// The first bytes of shared memory: whether this block was the last.
constexpr int kVerdictBytes = 16;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class Narrow>
__device__ __forceinline__ uint32_t pack(Narrow low, Narrow high) {
  uint16_t bits[2];
  std::memcpy(&bits[0], &low, 2);
  std::memcpy(&bits[1], &high, 2);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

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

// ---- Formats: what a 32-bit register of elements becomes, and how it is multiplied -------------

struct Float32AsTF32 {
  using Element = float;
  using Sum = float;
  static constexpr int kParts = 1;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) {
    parts[0] = to_tf32(__uint_as_float(word));
  }
  __device__ static uint32_t word(const float* values) { return __float_as_uint(values[0]); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};

// x = high + low, high being the nearest TF32 number: with three of the four products, and of `low`
// what the tensor cores do not ignore, an element's error is about 2^-22. One of the parts of a NaN
// or an infinity is not finite.
struct Float32InTwo : Float32AsTF32 {
  static constexpr int kParts = 2;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) {
    parts[0] = (word + 0x1000u) & 0xffffe000u;
    parts[1] = __float_as_uint(__uint_as_float(word) - __uint_as_float(parts[0]));
  }
};

struct BFloat16 {
  using Element = __nv_bfloat16;
  using Sum = float;
  static constexpr int kParts = 1;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) { parts[0] = word; }
  __device__ static uint32_t word(const float* values) {
    return pack(__float2bfloat16_rn(values[0]), __float2bfloat16_rn(values[1]));
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

struct Float16 {
  using Element = __half;
  using Sum = float;
  static constexpr int kParts = 1;
  __device__ static void split(uint32_t word, uint32_t (&parts)[kParts]) { parts[0] = word; }
  __device__ static uint32_t word(const float* values) {
    return pack(__float2half_rn(values[0]), __float2half_rn(values[1]));
  }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};

// Elements of any type, products and sums in float64, without tensor cores.
struct AnyInFloat64 {
  using Sum = double;
};

// ---- What a lane loads --------------------------------------------------------------------------

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

// ---- Products of an item on tensor cores --------------------------------------------------------

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
    constexpr int kAtOnce = kGroups % 4 == 0 ? 4 : 2;
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

// ---- Products of an item in float64 -------------------------------------------------------------

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

// ---- Partials to Grams --------------------------------------------------------------------------

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

// ---- The kernel -----------------------------------------------------------------------------

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
