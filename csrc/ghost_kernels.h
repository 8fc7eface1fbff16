// What the ghost way does beside matrix products, on plain pointers.

#pragma once

#include <cstdint>

#include "mntk.h"
#include "portable.h"

namespace lightning_mat {

// The products of a convolution's patches from those of its input's elements: with x_sp the
// channels of sample s at position p and at(t, k) the position that element k of token t's patch
// lies at,
//   a_st . a_s't' = sum over k of x_{s at(t, k)} . x_{s' at(t', k)},
// where positions outside of the input (-1) count for nothing.
struct PatchParams {
  const void* elements;  // [samples, positions, samples, positions], contiguous
  void* patches;         // [samples, tokens, samples, tokens], contiguous
  const int64_t* at;     // [tokens, kernel]
  int64_t tokens, kernel, positions, samples;
  int64_t first, last;  // for first <= s < last, s' < last
  Scalar type;          // of both: float32 or float64
};

template <class T>
LIGHTNING_MAT_INLINE void add_patch_products(const PatchParams& p, int64_t s, int64_t t,
                                             int64_t other) {
  const int64_t width = p.samples * p.positions;
  const T* elements = static_cast<const T*>(p.elements) + s * p.positions * width;
  T* patches = static_cast<T*>(p.patches) + (s * p.tokens + t) * p.samples * p.tokens;
  for (int64_t u = 0; u < p.tokens; ++u) {
    T total = 0;
    for (int64_t k = 0; k < p.kernel; ++k) {
      const int64_t i = p.at[t * p.kernel + k], j = p.at[u * p.kernel + k];
      if (i >= 0 && j >= 0) total += elements[i * width + other * p.positions + j];
    }
    patches[other * p.tokens + u] = total;
  }
}

// The last sum. With the products of tokens
//   N[s, r, s', t'] = sum over t of b[r, s, t] (a_st . a_s't')
// and row r owned by a Gram,
//   gram[s, s'] += sum over r, t' of N[s, r, s', t'] b[r, s', t']   for first <= s < last, s' <= s,
// and the same for gram[s', s].
struct GhostParams {
  const void* products;  // N [last - first, rows, last, tokens], contiguous
  const void* b;         // the same rows [rows, samples, tokens], contiguous
  int64_t first, last, rows, tokens, samples;
  const int64_t* slots;   // [runs]: the Gram of each run of rows
  const int64_t* begins;  // [runs + 1]: rows [begins[i], begins[i + 1]) of N belong to one Gram
  int64_t runs;
  void* grams;  // [slots, samples, samples]
  Scalar type;  // of all: float32 or float64
};

// Adds to one element of one run's Gram, and to its mirror image.
template <class T>
LIGHTNING_MAT_INLINE void add_ghost_element(const GhostParams& p, int64_t run, int64_t s,
                                            int64_t other) {
  const int64_t t = p.tokens, n = p.samples;
  T total = 0;
  for (int64_t r = p.begins[run]; r < p.begins[run + 1]; ++r) {
    const T* left =
        static_cast<const T*>(p.products) + (((s - p.first) * p.rows + r) * p.last + other) * t;
    const T* right = static_cast<const T*>(p.b) + (r * n + other) * t;
    for (int64_t k = 0; k < t; ++k) total += left[k] * right[k];
  }
  T* gram = static_cast<T*>(p.grams) + p.slots[run] * n * n;
  gram[s * n + other] += total;
  if (other != s) gram[other * n + s] += total;
}

}  // namespace lightning_mat
