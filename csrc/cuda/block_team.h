// A block of threads as a team, and the solution of a Gram by a block in its shared memory.
//
// Several threads of one warp share the work for one element where there are more threads than
// elements. Whatever is written for an element is written by the first of them, which is the same
// thread for all arrays of one length, so that only reads of others' elements need a barrier.

#pragma once

#include <type_traits>

#include "../lanczos.h"
#include "device.h"

namespace lightning_mat {

// kOnChip: the work matrices lie in shared memory; else in global memory.
template <bool kOnChip>
class BlockTeam {
 public:
  using Layout = std::conditional_t<kOnChip, PackedLayout, RowLayout>;
  static constexpr int kLanes = 1;

  // `memory`: kTeamBytes of shared memory.
  __device__ explicit BlockTeam(unsigned char* memory)
      : per_warp_(reinterpret_cast<double*>(memory)) {}

  __device__ int rank() const { return threadIdx.x; }
  __device__ void sync() const { __syncthreads(); }
  __device__ double sum(double x) {
    double values[] = {x};
    reduce(values, add);
    return values[0];
  }
  __device__ void sum(double& x, double& y) {
    double values[] = {x, y};
    reduce(values, add);
    x = values[0];
    y = values[1];
  }
  __device__ double max(double x) {
    double values[] = {x};
    reduce(values, greater);
    return values[0];
  }
  template <class T>
  __device__ T load(const T* p) const {
    return load_fresh(p);
  }

  template <class Value, class Use>
  __device__ void entries(int n, Value value, Use use) const {
    constexpr int kBatch = 4;  // loads under way at a time
    const int width = Layout::width(n), end = n * width, threads = blockDim.x;
    for (int start = threadIdx.x; start < end; start += kBatch * threads) {
      double values[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int k = start + b * threads, i = k / width, j = k % width;
        values[b] = stored(k, end, i, j) ? value(i, j) : 0.0;
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int k = start + b * threads, i = k / width, j = k % width;
        if (stored(k, end, i, j)) use(i, j, values[b]);
      }
    }
  }

  template <class F>
  __device__ void each(int n, F f) const {
    const Places p = places(n);
    if (p.part > 0) return;
    for (int i = p.first; i < n; i += p.step) f(i);
  }

  template <class Q>
  __device__ double dot(const Q* x, const Q* y, int n) const {
    double total = 0.0;
    each(n, [&](int i) { total += static_cast<double>(x[i]) * y[i]; });
    return total;
  }

  template <class T, class Q>
  __device__ void symmetric_product(const T* matrix, int n, const Q* x, Q* y) const {
    const int width = Layout::width(n);
    const auto write = [&](int i, double total) { y[i] = static_cast<Q>(total); };
    if constexpr (kOnChip) {
      // Along row i of the lower triangle, and from the diagonal on down column i.
      totals(
          places(width), width, n, matrix, x,
          [](int i, int j) { return j <= i ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i; },
          [](int i, int j, int) { return j < i ? 1 : j + 1; }, write);
    } else {
      // Down column i, because neighbouring threads then read neighbouring elements.
      totals(
          places(width), width, n, matrix, x, [=](int i, int j) { return j * width + i; },
          [=](int, int, int by) { return by * width; }, write);
    }
  }

  template <class Q>
  __device__ void row_products(const Q* m, int stride, int rows, int width, const Q* x,
                               Q* out) const {
    // In global memory a warp takes a row.
    totals(
        kOnChip ? places(rows) : split(kWarpShift), rows, width, m, x,
        [=](int r, int i) { return r * stride + i; }, [](int, int, int by) { return by; },
        [&](int r, double total) { out[r] = static_cast<Q>(total); });
  }

  template <class Q>
  __device__ void subtract_rows(const Q* m, int stride, int rows, int width, const Q* x,
                                Q* y) const {
    totals(
        places(width), width, rows, m, x, [=](int i, int r) { return r * stride + i; },
        [=](int, int, int by) { return by * stride; },
        [&](int i, double total) { y[i] = static_cast<Q>(y[i] - total); });
  }

  template <class F>
  __device__ void share(int wanted, F f) const {
    const Places p = places(wanted);
    for (int start = 0; start < wanted; start += p.step) f(start + p.first, p.part, p.parts);
  }
  __device__ int first_part(bool found, int part, int parts) const {
    int first = found ? part : parts;
    for (int step = kWarp / 2; step * parts >= kWarp; step /= 2) {
      const int other = __shfl_xor_sync(kAllLanes, first, step);
      first = first < other ? first : other;
    }
    return first;
  }

 private:
  static constexpr int kWarpShift = 5;
  static constexpr int kWarp = 1 << kWarpShift;
  static constexpr unsigned kAllLanes = 0xffffffffu;
  static constexpr int kMaxWarps = static_cast<int>(kTeamBytes / (4 * sizeof(double)));

  // This thread's place: part `part` of `parts` of the elements first, first + step, ...
  struct Places {
    int shift, parts, part, first, step;  // parts = 2^shift
  };

  // As many threads for each of `count` elements as there are, up to a warp.
  __device__ static Places places(int count) {
    const int threads = blockDim.x;
    int shift = 0;
    while (shift < kWarpShift && (2 * count << shift) <= threads) ++shift;
    return split(shift);
  }
  // 2^shift threads for each element. The lanes of one part have neighbouring elements.
  __device__ static Places split(int shift) {
    const int warp = threadIdx.x >> kWarpShift, lane = threadIdx.x & (kWarp - 1);
    const int each = kWarpShift - shift;
    return {shift, 1 << shift, lane >> each, (warp << each) + (lane & ((1 << each) - 1)),
            static_cast<int>(blockDim.x) >> shift};
  }

  __device__ static bool stored(int k, int end, int i, int j) {
    return k < end && (!kOnChip || j <= i);
  }

  // write(i, sum over j < length of x[j] * m[entry]) for i < count, in an order that depends only
  // on the sizes. The entry is first(i, j), and `by` elements later it is next(i, j, by) further.
  template <class T, class Q, class First, class Next, class Write>
  __device__ static void totals(const Places& p, int count, int length, const T* m, const Q* x,
                                First first, Next next, Write write) {
    constexpr int kChains = 4;  // sums that do not wait for each other
    // On chip each part is a stretch, which keeps addresses simple; in global memory the parts
    // alternate, so that neighbouring lanes read neighbouring elements.
    const int stretch = (length + p.parts - 1) >> p.shift;
    const int begin = kOnChip ? p.part * stretch : p.part;
    const int end = kOnChip && begin + stretch < length ? begin + stretch : length;
    const int by = kOnChip ? 1 : p.parts;
    for (int start = 0; start < count; start += p.step) {
      const int i = start + p.first, row = i < count ? i : count - 1;
      double sums[kChains] = {};
      int j = begin, entry = first(row, begin);
      const auto add_one = [&](double& sum) {
        sum += static_cast<double>(m[entry]) * x[j];
        entry += next(row, j, by);
        j += by;
      };
      while (j + (kChains - 1) * by < end) {
#pragma unroll
        for (int c = 0; c < kChains; ++c) add_one(sums[c]);
      }
      while (j < end) add_one(sums[0]);
      double total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (int step = kWarp / 2; step * p.parts >= kWarp; step /= 2) {
        total += __shfl_xor_sync(kAllLanes, total, step);
      }
      if (p.part == 0 && i < count) write(i, total);
    }
  }

  __device__ static double add(double x, double y) { return x + y; }
  __device__ static double greater(double x, double y) { return x > y ? x : y; }

  // Within warps, then over the warps' results in their order: the same order every time. Two
  // buffers take turns, so that nobody overwrites what a slower thread still reads.
  template <int kCount, class Combine>
  __device__ void reduce(double (&values)[kCount], Combine combine) {
    for (int step = kWarp / 2; step > 0; step /= 2) {
      for (double& value : values) {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
      }
    }
    double* results = per_warp_ + turn_ * 2 * kMaxWarps;
    turn_ ^= 1;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    for (int v = 0; v < kCount; ++v) {
      if (threadIdx.x % kWarp == 0) results[kCount * warp + v] = values[v];
    }
    __syncthreads();
    for (int v = 0; v < kCount; ++v) {
      values[v] = results[v];
      for (int w = 1; w < warps; ++w) values[v] = combine(values[v], results[kCount * w + v]);
    }
  }

  double* per_warp_;
  int turn_ = 0;
};

// Solves a Gram [n, n] in global memory, which other blocks may have written earlier in this
// launch, in chip_bytes() of dynamic shared memory. All threads of the block call it; their number
// is a multiple of 32, at most 512.
template <class T>
__device__ void solve_on_chip(const T* gram, int64_t samples, Basis basis, double* diagonal,
                              const Results& results) {
  __syncthreads();  // the shared memory may still be in use
  BlockTeam<true> team(shared_memory());
  unsigned char* memory = shared_memory() + kTeamBytes;
  const int n = static_cast<int>(samples);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (basis == Basis::kFloat32) {
      solve_gram<float>(team, gram, n, memory, diagonal, results);
      return;
    }
  }
  solve_gram<double>(team, gram, n, memory, diagonal, results);
}

template <class T>
__device__ void solve_on_chip(const T* gram, int64_t samples, Basis basis, double* eigenvalues) {
  solve_on_chip(gram, samples, basis, eigenvalues, {eigenvalues, nullptr, nullptr});
}

}  // namespace lightning_mat
