// Eigenvalues of a symmetric positive semi-definite matrix by Lanczos with full
// reorthogonalisation, in float64, for one thread on the host or a block of threads on the device.
//
// A = Q T Q^T with Q orthogonal and T tridiagonal: S steps give all eigenvalues, and a few steps
// often give the extremes. Where the Krylov space is exhausted early (repeated eigenvalues, low
// rank) the recurrence restarts with a new direction, so that Q is complete in any case. The
// eigenvalues' errors are a small multiple of S * 2^-53 * lambda_max.
//
// Both sides compile this source: it sees its threads only through a `Team`, which has
//   kWidth                     neighbouring elements that a thread works on at a time
//   rank(), size()             which of how many threads this is
//   sum(x), max(x)             over the team's threads, the same bits in every thread
//   sync()                     waits for the others and makes their writes visible
//
// Source: Lanczos (1950); Golub & Van Loan, Matrix Computations, sections 8.3 and 10.1-10.3;
// Daniel, Gragg, Kaufman & Stewart (1976) for the repeated reorthogonalisation.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "mntk.h"

#ifdef __CUDACC__
#define LIGHTNING_MAT_INLINE __host__ __device__ inline
#else
#define LIGHTNING_MAT_INLINE inline
#endif

namespace lightning_mat {

// Rows of the work matrices are padded with zeros to a multiple of this, so that no loop over
// kWidth elements needs a remainder.
constexpr int64_t kPad = 8;

// An extreme eigenvalue is accepted when its residual is at most this share of lambda_max. A small
// residual says that some eigenvalue is near, not that it is the last one: eigenvalues of the low
// end that lie within a few tolerances of each other are told apart only by going on, so that the
// low end is taken to rounding.
constexpr double kHighTolerance = 1e-12;
constexpr double kLowTolerance = 1e-16;

LIGHTNING_MAT_INLINE int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Doubles of scratch memory that one team needs for matrices of n rows.
LIGHTNING_MAT_INLINE int64_t lanczos_workspace(int64_t n) {
  return 2 * n * padded(n) + 7 * padded(n);
}

// One team's scratch memory.
struct LanczosSpace {
  double* matrix;  // [n, padded(n)] the scaled Gram
  double* basis;   // [n, padded(n)] orthonormal vectors, one per row
  double* next;    // [n] the vector that becomes the next row of the basis
  double* dots;    // [n] its products with the rows so far
  double* alpha;   // [n] diagonal of T
  double* beta;    // [n] beta[k] couples steps k and k + 1
  double* d;       // [n] diagonal, then eigenvalues, in the QL iteration
  double* e;       // [n] off-diagonal in the QL iteration
  double* last;    // [n] last components of T's eigenvectors; [0] also carries a verdict

  LIGHTNING_MAT_INLINE LanczosSpace(double* memory, int64_t n) {
    const int64_t row = padded(n);
    matrix = memory;
    basis = matrix + n * row;
    next = basis + n * row;
    dots = next + row;
    alpha = dots + row;
    beta = alpha + row;
    d = beta + row;
    e = d + row;
    last = e + row;
  }
};

// A pseudo-random number in [-1, 1) for each (stream, index): the same on every machine
// (SplitMix64).
LIGHTNING_MAT_INLINE double hashed_uniform(uint64_t stream, uint64_t index) {
  uint64_t z = (stream << 32) + index + 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-52 - 1.0;
}

// out[k] = <row k of m, x> for k < rows.
template <class Team>
LIGHTNING_MAT_INLINE void row_products(Team& team, const double* m, int64_t stride, int64_t rows,
                                       const double* x, double* out) {
  for (int64_t k = team.rank(); k < rows; k += team.size()) {
    const double* row = m + k * stride;
    double part[kPad] = {};
    for (int64_t i = 0; i < stride; i += kPad) {
      for (int64_t w = 0; w < kPad; ++w) part[w] += row[i + w] * x[i + w];
    }
    double sum = 0.0;
    for (int64_t w = 0; w < kPad; ++w) sum += part[w];
    out[k] = sum;
  }
  team.sync();
}

// y = scale * y + sign * sum over k < rows of x[k] * (row k of m).
template <class Team>
LIGHTNING_MAT_INLINE void combine_rows(Team& team, const double* m, int64_t stride, int64_t rows,
                                       const double* x, double scale, double sign, double* y) {
  constexpr int64_t kWidth = Team::kWidth;
  for (int64_t i = team.rank() * kWidth; i < stride; i += team.size() * kWidth) {
    double part[kWidth] = {};
    for (int64_t k = 0; k < rows; ++k) {
      const double* row = m + k * stride + i;
      for (int64_t w = 0; w < kWidth; ++w) part[w] += x[k] * row[w];
    }
    for (int64_t w = 0; w < kWidth; ++w) {
      y[i + w] = (scale == 0.0 ? 0.0 : scale * y[i + w]) + sign * part[w];
    }
  }
  team.sync();
}

template <class Team>
LIGHTNING_MAT_INLINE double norm(Team& team, const double* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = team.rank(); i < n; i += team.size()) sum += x[i] * x[i];
  return sqrt(team.sum(sum));
}

// Makes space.next orthogonal to the first `rows` rows of the basis; returns its norm after, and
// adds what it had along the last of them to `along_last`.
template <class Team>
LIGHTNING_MAT_INLINE double orthogonalize(Team& team, const LanczosSpace& space, int64_t n,
                                          int64_t rows, double& along_last) {
  double before = 0.0, after = 0.0;
  // Twice is enough unless the second pass, too, cancels most of what was left.
  for (int pass = 0; pass < 4; ++pass) {
    row_products(team, space.basis, padded(n), rows, space.next, space.dots);
    along_last += space.dots[rows - 1];
    combine_rows(team, space.basis, padded(n), rows, space.dots, 1.0, -1.0, space.next);
    after = norm(team, space.next, n);
    if (pass > 0 && after > 0.5 * before) break;
    before = after;
  }
  return after;
}

// Row `rows` of the basis becomes a new direction, orthogonal to the rows before it.
template <class Team>
LIGHTNING_MAT_INLINE void new_direction(Team& team, const LanczosSpace& space, int64_t n,
                                        int64_t rows) {
  const int64_t stride = padded(n);
  for (int64_t i = team.rank(); i < stride; i += team.size()) {
    space.next[i] = i < n ? hashed_uniform(rows + 1, i) : 0.0;
  }
  team.sync();
  double unused = 0.0;
  const double length =
      rows == 0 ? norm(team, space.next, n) : orthogonalize(team, space, n, rows, unused);
  for (int64_t i = team.rank(); i < stride; i += team.size()) {
    space.basis[rows * stride + i] = space.next[i] / length;
  }
  team.sync();
}

// Replaces d by the eigenvalues of the tridiagonal (d, e) and overwrites e: implicit QL, by one
// thread. Where `last` is given it starts as the last unit vector and becomes the last components
// of the eigenvectors. False where the iteration did not converge.
LIGHTNING_MAT_INLINE bool tridiagonal_eigenvalues(int64_t n, double* d, double* e, double* last) {
  constexpr int kMaxIterations = 64;
  if (n > 0) e[n - 1] = 0.0;
  for (int64_t l = 0; l < n; ++l) {
    for (int iteration = 0;; ++iteration) {
      int64_t m = l;  // the block [l, m] is not yet split by a negligible off-diagonal element
      while (m < n - 1 && fabs(e[m]) > DBL_EPSILON * (fabs(d[m]) + fabs(d[m + 1]))) ++m;
      if (m == l) break;
      if (iteration == kMaxIterations) return false;
      double g = (d[l + 1] - d[l]) / (2.0 * e[l]);
      g = d[m] - d[l] + e[l] / (g + copysign(sqrt(g * g + 1.0), g));
      double s = 1.0, c = 1.0, p = 0.0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        double r = sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r == 0.0) {  // the matrix splits here: start over with the smaller blocks
          d[i + 1] -= p;
          e[m] = 0.0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        if (last != nullptr) {
          const double upper = last[i + 1];
          last[i + 1] = s * last[i] + c * upper;
          last[i] = c * last[i] - s * upper;
        }
      }
      if (i >= l) continue;
      d[l] -= p;
      e[l] = g;
      e[m] = 0.0;
    }
  }
  return true;
}

// Eigenvalues of the first `steps` steps of T into space.d; false where QL did not converge.
template <class Team>
LIGHTNING_MAT_INLINE bool ritz_values(Team& team, const LanczosSpace& space, int64_t steps) {
  for (int64_t i = team.rank(); i < steps; i += team.size()) {
    space.d[i] = space.alpha[i];
    space.e[i] = space.beta[i];
  }
  team.sync();
  if (team.rank() == 0) {
    space.last[0] = tridiagonal_eigenvalues(steps, space.d, space.e, nullptr) ? 1.0 : 0.0;
  }
  team.sync();
  return space.last[0] != 0.0;
}

// Largest and smallest Ritz value of the first `steps` steps into d[0] and d[1]; true where both
// are within the tolerance of an eigenvalue: |residual| = beta * |last component of the vector|.
template <class Team>
LIGHTNING_MAT_INLINE bool extremes_converged(Team& team, const LanczosSpace& space, int64_t steps) {
  for (int64_t i = team.rank(); i < steps; i += team.size()) {
    space.d[i] = space.alpha[i];
    space.e[i] = space.beta[i];
    space.last[i] = i == steps - 1 ? 1.0 : 0.0;
  }
  team.sync();
  if (team.rank() == 0) {
    const bool solved = tridiagonal_eigenvalues(steps, space.d, space.e, space.last);
    int64_t high = 0, low = 0;
    for (int64_t i = 1; i < steps; ++i) {
      if (space.d[i] > space.d[high]) high = i;
      if (space.d[i] < space.d[low]) low = i;
    }
    const double largest = solved ? space.d[high] : NAN, smallest = solved ? space.d[low] : NAN;
    const double beta = space.beta[steps - 1], scale = fabs(largest);
    const bool found = beta * fabs(space.last[high]) <= kHighTolerance * scale &&
                       beta * fabs(space.last[low]) <= kLowTolerance * scale;
    space.last[0] = solved && found ? 1.0 : 0.0;
    space.d[0] = largest;
    space.d[1] = smallest;
  }
  team.sync();
  return space.last[0] != 0.0;
}

// Copies the Gram, made symmetric, scaled by a power of two to entries below 2 (so that neither a
// huge nor a tiny Gram leaves float64's range). Sets the exponent that undoes the scaling.
// Returns its largest entry before: 0 for a zero Gram, infinite where an entry is not finite.
template <class Team, class T>
LIGHTNING_MAT_INLINE double load_gram(Team& team, const T* gram, int64_t n,
                                      const LanczosSpace& space, int& exponent) {
  const int64_t stride = padded(n);
  double peak = 0.0;
  for (int64_t i = team.rank(); i < n * n; i += team.size()) {
    const double value = fabs(static_cast<double>(gram[i]));
    peak = fmax(peak, value <= DBL_MAX ? value : HUGE_VAL);  // a NaN compares false: infinite, too
  }
  peak = team.max(peak);
  if (peak == 0.0 || peak > DBL_MAX) return peak;
  exponent = ilogb(peak);
  for (int64_t k = team.rank(); k < n * stride; k += team.size()) {
    const int64_t i = k / stride, j = k % stride;
    space.matrix[k] = j >= n ? 0.0
                             : 0.5 * (scalbn(static_cast<double>(gram[i * n + j]), -exponent) +
                                      scalbn(static_cast<double>(gram[j * n + i]), -exponent));
  }
  team.sync();
  return peak;
}

// Writes the Gram's eigenvalues [n], descending, or, where eigenvalues is null, its extremes.
// A Gram with an entry that is not finite gives NaN.
template <class Team, class T>
LIGHTNING_MAT_INLINE void lanczos(Team& team, const T* gram, int64_t n, double* memory,
                                  double* eigenvalues, double* largest, double* smallest) {
  const LanczosSpace space(memory, n);
  const int64_t stride = padded(n);
  const bool extremes = eigenvalues == nullptr;
  int exponent = 0;
  const double peak = load_gram(team, gram, n, space, exponent);
  const bool finite = peak <= DBL_MAX;
  bool solved = finite;

  if (peak == 0.0 || !finite) {
    for (int64_t i = team.rank(); i < n; i += team.size()) space.d[i] = finite ? 0.0 : NAN;
    team.sync();
  } else {
    new_direction(team, space, n, 0);
    double size = 0.0;  // of T so far: what rounding errors are relative to
    int64_t check = 8;  // at which step to look at the extremes next
    for (int64_t k = 0; k < n; ++k) {
      const double* current = space.basis + k * stride;
      combine_rows(team, space.matrix, stride, n, current, 0.0, 1.0, space.next);
      double along = 0.0;
      double length = orthogonalize(team, space, n, k + 1, along);
      size = fmax(size, fmax(fabs(along), length));
      // What is left is rounding: the space spanned so far is invariant.
      const bool exhausted = k + 1 == n || length <= n * DBL_EPSILON * size;
      if (exhausted) length = 0.0;
      if (team.rank() == 0) {
        space.alpha[k] = along;
        space.beta[k] = length;
      }
      team.sync();
      if (extremes && (exhausted || k + 1 == check)) {
        check *= 2;
        if (extremes_converged(team, space, k + 1)) break;
      }
      if (k + 1 == n) break;
      if (exhausted) {
        new_direction(team, space, n, k + 1);
      } else {
        for (int64_t i = team.rank(); i < stride; i += team.size()) {
          space.basis[(k + 1) * stride + i] = space.next[i] / length;
        }
        team.sync();
      }
    }
    if (!extremes) solved = ritz_values(team, space, n);
  }

  if (extremes) {
    if (team.rank() == 0) {
      *largest = scalbn(space.d[0], exponent);
      *smallest = scalbn(space.d[n > 1 ? 1 : 0], exponent);
    }
  } else {
    for (int64_t i = team.rank(); i < n; i += team.size()) {
      // Each thread finds its values' places; equal ones keep their order.
      int64_t place = 0;
      for (int64_t j = 0; solved && j < n; ++j) {
        place += space.d[j] > space.d[i] || (space.d[j] == space.d[i] && j < i);
      }
      eigenvalues[solved ? place : i] = solved ? scalbn(space.d[i], exponent) : NAN;
    }
  }
  team.sync();
}

// Solves the Gram of the given index, in the team's own memory.
template <class T, class Team>
LIGHTNING_MAT_INLINE void solve_gram(Team& team, const SpectrumParams& p, int64_t index,
                                     double* memory) {
  const int64_t n = p.samples;
  const T* gram = static_cast<const T*>(p.grams) + index * n * n;
  if (p.eigenvalues != nullptr) {
    lanczos(team, gram, n, memory, p.eigenvalues + index * n, nullptr, nullptr);
  } else {
    lanczos(team, gram, n, memory, nullptr, p.largest + index, p.smallest + index);
  }
}

}  // namespace lightning_mat
