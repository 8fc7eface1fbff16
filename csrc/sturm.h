// Eigenvalues of a symmetric tridiagonal matrix by multisection.
//
// The leading minors p_k of T - x obey p_k = (d_k - x) p_{k-1} - e_{k-1}^2 p_{k-2}, and T has as
// many eigenvalues below x as their sequence has changes of sign. Whoever looks for eigenvalue i
// keeps an interval that holds it and counts at points inside: lanes and threads work on different
// eigenvalues or points, and nothing waits for anything but its own recurrence. Rescaling by powers
// of two keeps the minors in range without a division.
//
// The counts are those of a matrix within a few roundings of T, so the eigenvalues' errors are a
// few times 2^-53 * |T|.
//
// Source: Barth, Martin & Wilkinson (1967); Lo, Philippe & Sameh (1987) for multisection; Demmel,
// Dhillon & Ren (1995) for the correctness of counts that are not monotone.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "portable.h"

namespace lightning_mat {

// One row of T.
struct alignas(16) SturmRow {
  double diagonal;
  double coupling;  // to the row before: the square of the off-diagonal element
};

LIGHTNING_MAT_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

LIGHTNING_MAT_INLINE double from_bits(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// How many eigenvalues of T lie below each of the points x.
template <int kLanes>
LIGHTNING_MAT_INLINE void count_below(const SturmRow* rows, int n, const double (&x)[kLanes],
                                      int64_t (&below)[kLanes]) {
  // No minor shrinks or grows by more than 2^110 a row, so eight rows stay within the range.
  constexpr int kStretch = 8;
  constexpr uint64_t kExponent = 0x7ff0000000000000, kTwiceBias = 0x7fe0000000000000;
  double minor[kLanes], before[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    minor[l] = 1.0;
    before[l] = 0.0;
    below[l] = 0;
  }
  const auto step = [&](const SturmRow& row) {
    for (int l = 0; l < kLanes; ++l) {
      const double next = (row.diagonal - x[l]) * minor[l] - row.coupling * before[l];
      below[l] += static_cast<int64_t>((bits_of(next) ^ bits_of(minor[l])) >> 63);
      before[l] = minor[l];
      minor[l] = next;
    }
  };
  int k = 0;
  for (; k + kStretch <= n; k += kStretch) {
    for (int s = 0; s < kStretch; ++s) step(rows[k + s]);
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t exponent = bits_of(fabs(minor[l]) + fabs(before[l])) & kExponent;
      const double scale = from_bits(kTwiceBias - exponent);
      minor[l] *= scale;
      before[l] *= scale;
    }
  }
  for (; k < n; ++k) step(rows[k]);
}

// Calls write(i, eigenvalue) for i < wanted: in descending order, eigenvalue number i * step of T.
// All of them lie in [low, high]. The results do not increase with i, whatever the roundings.
template <class Team, class Write>
LIGHTNING_MAT_INLINE void tridiagonal_eigenvalues(Team& team, const SturmRow* rows, int n,
                                                  double low, double high, int wanted, int step,
                                                  Write write) {
  constexpr int kLanes = Team::kLanes;
  constexpr double kShrink = 0x1p-52;  // of the interval in which an eigenvalue is left
  team.share(wanted, [&](int first, int part, int parts) {
    double from[kLanes], to[kLanes], x[kLanes];
    int64_t below[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      from[l] = low;
      to[l] = high;
    }
    const double section = 1.0 / (parts + 1);
    for (double size = 1.0; size > kShrink; size *= section) {
      for (int l = 0; l < kLanes; ++l) x[l] = from[l] + (part + 1) * section * (to[l] - from[l]);
      count_below(rows, n, x, below);
      for (int l = 0; l < kLanes; ++l) {
        // The eigenvalue lies below the first of the parts' points that has enough below it.
        const int number = n - 1 - (first + l) * step;
        const int found = team.first_part(below[l] > number, part, parts);
        const double width = section * (to[l] - from[l]), start = from[l];
        if (found > 0) from[l] = start + found * width;
        if (found < parts) to[l] = start + (found + 1) * width;
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      if (part == 0 && first + l < wanted) write(first + l, 0.5 * (from[l] + to[l]));
    }
  });
}

}  // namespace lightning_mat
