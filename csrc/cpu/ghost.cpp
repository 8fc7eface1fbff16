// The ghost way's loops on the CPU. In the last sum threads share out the samples, so that every
// element of a Gram is added to by one thread; rows are multiplied as a whole, which
// add_ghost_element does not, so that the loop over them is vectorised.

#include "../ghost.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "backend.h"

namespace lightning_mat {
namespace {

template <class T>
void sum_rows(const GhostParams& p) {
  const T* products = static_cast<const T*>(p.products);
  const T* b = static_cast<const T*>(p.b);
  T* grams = static_cast<T*>(p.grams);
  const int64_t t = p.tokens, n = p.samples;
  at::parallel_for(p.first, p.last, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sums(p.last * t);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t width = (s + 1) * t;
      for (int64_t run = 0; run < p.runs; ++run) {
        std::fill_n(sums.begin(), width, T(0));
        for (int64_t r = p.begins[run]; r < p.begins[run + 1]; ++r) {
          const T* left = products + ((s - p.first) * p.rows + r) * p.last * t;
          const T* right = b + r * n * t;
          for (int64_t k = 0; k < width; ++k) sums[k] += left[k] * right[k];
        }
        T* gram = grams + p.slots[run] * n * n;
        for (int64_t other = 0; other <= s; ++other) {
          T total = 0;
          for (int64_t k = 0; k < t; ++k) total += sums[other * t + k];
          gram[s * n + other] += total;
          if (other != s) gram[other * n + s] += total;
        }
      }
    }
  });
}

template <class T>
void patches_of(const PatchParams& p) {
  at::parallel_for(p.first * p.tokens, p.last * p.tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t other = 0; other < p.last; ++other) {
        add_patch_products<T>(p, row / p.tokens, row % p.tokens, other);
      }
    }
  });
}

void patches(const at::Tensor& elements, const at::Tensor& patches, const PatchParams& params) {
  PatchParams p = params;
  p.elements = elements.const_data_ptr();
  p.patches = patches.mutable_data_ptr();
  if (patches.scalar_type() == at::kDouble) {
    patches_of<double>(p);
  } else {
    patches_of<float>(p);
  }
}

void sum(const at::Tensor& grams, const at::Tensor& products, const at::Tensor& b,
         const GhostParams& params) {
  GhostParams p = params;
  p.products = products.const_data_ptr();
  p.b = b.const_data_ptr();
  p.grams = grams.mutable_data_ptr();
  if (grams.scalar_type() == at::kDouble) {
    sum_rows<double>(p);
  } else {
    sum_rows<float>(p);
  }
}

}  // namespace

GhostKernels cpu_ghost_kernels() { return {patches, sum}; }

}  // namespace lightning_mat
