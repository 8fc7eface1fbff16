// Gram accumulation on the device: one block per (unit, tile of its Gram), which walks the unit's
// pieces in order. Every element of a Gram belongs to one thread, so the order of additions is
// fixed and nothing is atomic. Tiles above the diagonal are the mirror image of those below.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../mntk.h"

namespace lightning_mat {
namespace {

constexpr int kSide = 16;  // threads along each side of a tile
constexpr int kThreads = kSide * kSide;
constexpr int kChunk = 32;  // elements of every sample's gradient staged at a time
constexpr int kFold = 64;   // chunks that are summed before their sum is added to the total

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// kMicro: each thread owns kMicro x kMicro elements of a tile of kSide * kMicro samples.
template <class T, class Acc, int kMicro>
__global__ void __launch_bounds__(kThreads, 2) gram_kernel(GramParams p) {
  constexpr int kTile = kSide * kMicro;
  // + 1: threads of a warp that read one column of neighbouring samples hit different banks.
  __shared__ Acc left[kTile][kChunk + 1];
  __shared__ Acc right[kTile][kChunk + 1];

  // The tile's place (row >= column) among the tiles of the lower triangle.
  int tile_row = 0, tile_column = blockIdx.y;
  while (tile_column > tile_row) tile_column -= ++tile_row;
  const int64_t row_start = static_cast<int64_t>(tile_row) * kTile;
  const int64_t column_start = static_cast<int64_t>(tile_column) * kTile;
  const bool diagonal = tile_row == tile_column;

  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const int lane = threadIdx.x % kChunk, first_sample = threadIdx.x / kChunk;
  const T* grad = static_cast<const T*>(p.grad);
  const Segment segment = p.segments[blockIdx.x];

  // Sums of bounded length, then their total: the rounding error grows with the root of both
  // lengths, not with the root of the millions of elements that a unit can have.
  Acc total[kMicro][kMicro] = {};
  Acc sum[kMicro][kMicro] = {};
  int staged = 0;
  const auto fold = [&] {
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
#pragma unroll
      for (int n = 0; n < kMicro; ++n) {
        total[m][n] += sum[m][n];
        sum[m][n] = Acc(0);
      }
    }
    staged = 0;
  };
  for (int64_t k = segment.first; k < segment.last; ++k) {
    const Piece piece = p.pieces[k];
    const int64_t columns = piece.c1 - piece.c0;
    const int64_t width = (piece.r1 - piece.r0) * columns;
    for (int64_t start = 0; start < width; start += kChunk) {
      // Reads beyond the piece or the samples are zeros, so that the products need no bounds.
      const int64_t element = start + lane;
      const bool inside = element < width;
      const int64_t offset = inside ? (piece.r0 + element / columns) * p.row_stride +
                                          (piece.c0 + element % columns) * p.column_stride
                                    : 0;
      for (int s = first_sample; s < kTile; s += kThreads / kChunk) {
        const int64_t i = row_start + s, j = column_start + s;
        left[s][lane] = inside && i < p.samples
                            ? static_cast<Acc>(widen(grad[i * p.sample_stride + offset]))
                            : Acc(0);
        if (!diagonal) {
          right[s][lane] = inside && j < p.samples
                               ? static_cast<Acc>(widen(grad[j * p.sample_stride + offset]))
                               : Acc(0);
        }
      }
      __syncthreads();
      const Acc(*other)[kChunk + 1] = diagonal ? left : right;
#pragma unroll 4
      for (int e = 0; e < kChunk; ++e) {
        Acc a[kMicro], b[kMicro];
#pragma unroll
        for (int m = 0; m < kMicro; ++m) {
          a[m] = left[y + m * kSide][e];
          b[m] = other[x + m * kSide][e];
        }
#pragma unroll
        for (int m = 0; m < kMicro; ++m) {
#pragma unroll
          for (int n = 0; n < kMicro; ++n) sum[m][n] += a[m] * b[n];
        }
      }
      if (++staged == kFold) fold();
      __syncthreads();
    }
  }
  fold();

  const int64_t unit = p.pieces[segment.first].unit;
  Acc* gram = static_cast<Acc*>(p.grams) + unit * p.samples * p.samples;
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
#pragma unroll
    for (int n = 0; n < kMicro; ++n) {
      const int64_t i = row_start + y + m * kSide, j = column_start + x + n * kSide;
      if (i >= p.samples || j >= p.samples) continue;
      gram[i * p.samples + j] += total[m][n];
      if (!diagonal) gram[j * p.samples + i] += total[m][n];
    }
  }
}

template <class T, class Acc, int kMicro>
cudaError_t launch_tiles(const GramParams& p, cudaStream_t stream) {
  constexpr int64_t kTile = kSide * kMicro;
  const int64_t tiles = (p.samples + kTile - 1) / kTile;
  const dim3 grid(static_cast<unsigned>(p.segment_count),
                  static_cast<unsigned>(tiles * (tiles + 1) / 2));
  gram_kernel<T, Acc, kMicro><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T, class Acc>
cudaError_t launch_samples(const GramParams& p, cudaStream_t stream) {
  if (p.samples <= kSide) return launch_tiles<T, Acc, 1>(p, stream);
  if (p.samples <= 2 * kSide) return launch_tiles<T, Acc, 2>(p, stream);
  return launch_tiles<T, Acc, 4>(p, stream);
}

template <class Acc>
cudaError_t launch_types(const GramParams& p, cudaStream_t stream) {
  switch (p.grad_type) {
    case Scalar::kFloat64:
      return launch_samples<double, Acc>(p, stream);
    case Scalar::kFloat32:
      return launch_samples<float, Acc>(p, stream);
    case Scalar::kBFloat16:
      return launch_samples<__nv_bfloat16, Acc>(p, stream);
    case Scalar::kFloat16:
      return launch_samples<__half, Acc>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cuda_gram_accumulate(const GramParams& p, cudaStream_t stream) {
  if (p.segment_count == 0 || p.samples == 0) return cudaSuccess;
  return p.gram_type == Scalar::kFloat64 ? launch_types<double>(p, stream)
                                         : launch_types<float>(p, stream);
}

}  // namespace lightning_mat
