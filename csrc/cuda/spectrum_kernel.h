// Eigenvalues of Grams on the device: each block takes one Gram after another.

#pragma once

#include "../mntk.h"
#include "block_team.h"

namespace lightning_mat {

// Threads of a block: on chip as many as the fused kernel has, so that results agree in every bit.
constexpr int kChipThreads = 128;
constexpr int kMaxThreads = 512;

// solve(gram, results, diagonal) for the Grams that fall to this block.
template <class T, class Solve>
__device__ void for_grams(const SpectrumParams& p, double* scratch, Solve solve) {
  for (int64_t index = blockIdx.x; index < p.count; index += gridDim.x) {
    const int64_t gram = p.which != nullptr ? p.which[2 * index] : index;
    const int64_t row = p.which != nullptr ? p.which[2 * index + 1] : index;
    const Results results = results_of(p, row);
    solve(static_cast<const T*>(p.grams) + gram * p.samples * p.samples, results,
          results.eigenvalues != nullptr ? results.eigenvalues : scratch);
  }
}

template <class T>
__global__ void __launch_bounds__(kChipThreads, 4)
    chip_spectrum_kernel(SpectrumParams p, Basis basis) {
  for_grams<T>(p, p.workspace + blockIdx.x * p.samples,
               [&](const T* gram, const Results& results, double* diagonal) {
                 solve_on_chip(gram, p.samples, basis, diagonal, results);
               });
}

// With the work matrices in global memory.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) spectrum_kernel(SpectrumParams p) {
  BlockTeam<false> team(shared_memory());
  const int n = static_cast<int>(p.samples);
  double* workspace = p.workspace + blockIdx.x * lanczos_workspace(n);
  unsigned char* memory = reinterpret_cast<unsigned char*>(workspace);
  double* scratch = workspace + LanczosSpace<T, double, RowLayout>::bytes(n) / sizeof(double);
  for_grams<T>(p, scratch, [&](const T* gram, const Results& results, double* diagonal) {
    solve_gram<double>(team, gram, n, memory, diagonal, results);
  });
}

}  // namespace lightning_mat
