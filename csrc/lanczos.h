// Eigenvalues of a symmetric positive semi-definite matrix by Lanczos with full
// reorthogonalisation, for one thread on the host or a block of threads on the device.
//
// A = Q T Q^T with Q orthogonal and T tridiagonal: n steps give all eigenvalues. Where the Krylov
// space is exhausted early (repeated eigenvalues, low rank) the recurrence restarts with a new
// direction, so that Q is complete in any case. All arithmetic is float64. With Q stored in float64
// the eigenvalues' errors are a small multiple of n * 2^-53 * lambda_max; with Q in float32, for
// Grams that have float32's errors themselves, they are about 2^-22 * lambda_max.
//
// Both sides compile this source: it sees its threads only through a `Team`, which has
//   Layout                     how the matrices lie in memory, RowLayout or PackedLayout
//   rank()                     which of the threads this is
//   sync()                     waits for the others and makes their writes visible
//   sum(x), sum(x, y), max(x)  over the team's threads, the same bits in every thread; they sync
//   load(p)                    *p, of a Gram
//   entries(n, value, use)     use(i, j, value(i, j)) for the stored entries, shared by the threads
//   each(n, f)                 f(i) for i < n, likewise
//   dot(x, y, n)               this thread's part of <x, y>: of the elements that each() gives it
//   symmetric_product, row_products, subtract_rows: below, where they are used
//   kLanes, share(), first_part()   for sturm.h
// cpu/thread_team.h and cuda/block_team.h are the teams.
//
// Source: Lanczos (1950); Golub & Van Loan, Matrix Computations, sections 8.4 and 10.1-10.3;
// Daniel, Gragg, Kaufman & Stewart (1976) for the repeated reorthogonalisation.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "mntk.h"
#include "sturm.h"

namespace lightning_mat {

// Whole rows, padded with zeros so that no loop over kPad elements needs a remainder.
struct RowLayout {
  static constexpr int kPad = 8;
  LIGHTNING_MAT_INLINE static int width(int n) { return (n + kPad - 1) / kPad * kPad; }
  LIGHTNING_MAT_INLINE static int stride(int n) { return width(n); }
  LIGHTNING_MAT_INLINE static int entries(int n) { return n * width(n); }
  LIGHTNING_MAT_INLINE static int entry(int n, int i, int j) { return i * width(n) + j; }
};

// The lower triangle, and rows of the basis an odd number of elements apart: threads that read one
// column of neighbouring rows hit different banks of shared memory.
struct PackedLayout {
  LIGHTNING_MAT_INLINE static int width(int n) { return n; }
  LIGHTNING_MAT_INLINE static int stride(int n) { return n | 1; }
  LIGHTNING_MAT_INLINE static int entries(int n) { return n * (n + 1) / 2; }
  LIGHTNING_MAT_INLINE static int entry(int, int i, int j) { return i * (i + 1) / 2 + j; }
};

// One team's scratch memory for a Gram of type T and a basis of type Q.
template <class T, class Q, class Layout>
struct LanczosSpace {
  static constexpr int64_t kAlign = 64;

  double* beta;    // [n] beta[k] couples steps k and k + 1
  Q* basis;        // [n, stride] orthonormal vectors, one per row
  Q* dots;         // [width] products of a vector with the rows so far
  T* matrix;       // the scaled Gram
  SturmRow* rows;  // [n] T; takes the basis' place when T is complete

  LIGHTNING_MAT_INLINE static int64_t aligned(int64_t bytes) {
    return (bytes + kAlign - 1) / kAlign * kAlign;
  }
  LIGHTNING_MAT_INLINE static int64_t beta_bytes(int n) { return aligned(n * sizeof(double)); }
  LIGHTNING_MAT_INLINE static int64_t basis_bytes(int n) {
    const int64_t basis = int64_t{n} * Layout::stride(n) * sizeof(Q), rows = n * sizeof(SturmRow);
    return aligned(basis > rows ? basis : rows);
  }
  LIGHTNING_MAT_INLINE static int64_t dots_bytes(int n) {
    return aligned(Layout::width(n) * sizeof(Q));
  }
  LIGHTNING_MAT_INLINE static int64_t bytes(int n) {
    return beta_bytes(n) + basis_bytes(n) + dots_bytes(n) + aligned(Layout::entries(n) * sizeof(T));
  }

  LIGHTNING_MAT_INLINE LanczosSpace(unsigned char* memory, int n) {
    beta = reinterpret_cast<double*>(memory);
    memory += beta_bytes(n);
    basis = reinterpret_cast<Q*>(memory);
    rows = reinterpret_cast<SturmRow*>(memory);
    memory += basis_bytes(n);
    dots = reinterpret_cast<Q*>(memory);
    memory += dots_bytes(n);
    matrix = reinterpret_cast<T*>(memory);
  }
};

// In what the basis of a solution in a block's shared memory is stored; kNone: it does not fit.
enum class Basis { kFloat64, kFloat32, kNone };

constexpr int64_t kMaxOnChip = 128;  // samples of a Gram that is solved in shared memory
constexpr int64_t kTeamBytes = 512;  // that a block's threads need to form sums

// Shared memory that a solution takes.
LIGHTNING_MAT_INLINE int64_t chip_bytes(Scalar gram_type, int64_t samples, Basis basis) {
  const int n = static_cast<int>(samples);
  if (basis == Basis::kNone) return 0;
  if (gram_type == Scalar::kFloat64) {
    return kTeamBytes + LanczosSpace<double, double, PackedLayout>::bytes(n);
  }
  return kTeamBytes + (basis == Basis::kFloat64
                           ? LanczosSpace<float, double, PackedLayout>::bytes(n)
                           : LanczosSpace<float, float, PackedLayout>::bytes(n));
}

// What fits into `bytes` of shared memory. Only Grams in float32 take a basis in float32.
LIGHTNING_MAT_INLINE Basis chip_basis(Scalar gram_type, int64_t samples, int64_t bytes) {
  if (samples > kMaxOnChip) return Basis::kNone;
  if (chip_bytes(gram_type, samples, Basis::kFloat64) <= bytes) return Basis::kFloat64;
  if (gram_type == Scalar::kFloat64) return Basis::kNone;
  return chip_bytes(gram_type, samples, Basis::kFloat32) <= bytes ? Basis::kFloat32 : Basis::kNone;
}

// Doubles of global memory that one worker of cuda_spectrum needs for Grams of n samples: its space
// and a diagonal.
LIGHTNING_MAT_INLINE int64_t lanczos_workspace(int64_t n) {
  const int size = static_cast<int>(n);
  return LanczosSpace<double, double, RowLayout>::bytes(size) / int64_t{sizeof(double)} +
         RowLayout::width(size);
}

// Where the results of a Gram go.
struct Results {
  double* eigenvalues;         // [n] descending, or null where only the extremes are wanted
  double *largest, *smallest;  // where only the extremes are wanted

  LIGHTNING_MAT_INLINE int count(int n) const { return eigenvalues != nullptr ? n : 2; }
  LIGHTNING_MAT_INLINE void write(int i, double value) const {
    *(eigenvalues != nullptr ? eigenvalues + i : i == 0 ? largest : smallest) = value;
  }
};

// Those of the row that belongs to a Gram of SpectrumParams.
LIGHTNING_MAT_INLINE Results results_of(const SpectrumParams& p, int64_t row) {
  if (p.eigenvalues != nullptr) return {p.eigenvalues + row * p.samples, nullptr, nullptr};
  return {nullptr, p.largest + row, p.smallest + row};
}

// A pseudo-random number in [-1, 1) for each (stream, index): the same on every machine
// (SplitMix64).
LIGHTNING_MAT_INLINE double hashed_uniform(uint64_t stream, uint64_t index) {
  uint64_t z = (stream << 32) + index + 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-52 - 1.0;
}

// Copies the Gram, made symmetric, scaled by a power of two to entries below 2 (so that neither a
// huge nor a tiny Gram leaves the range). Sets the exponent that undoes the scaling. Returns its
// largest entry before: 0 for a zero Gram, infinite where an entry is not finite.
template <class Team, class T>
LIGHTNING_MAT_INLINE double load_gram(Team& team, const T* gram, int n, T* matrix, int& exponent) {
  using Layout = typename Team::Layout;
  double peak = 0.0;
  const auto symmetric = [&](int i, int j) {
    if (j >= n) return 0.0;
    return 0.5 * static_cast<double>(team.load(gram + i * n + j)) +
           0.5 * static_cast<double>(team.load(gram + j * n + i));
  };
  team.entries(n, symmetric, [&](int i, int j, double value) {
    matrix[Layout::entry(n, i, j)] = static_cast<T>(value);
    // A NaN compares false: infinite, too.
    const double magnitude = fabs(value) <= DBL_MAX ? fabs(value) : HUGE_VAL;
    peak = peak > magnitude ? peak : magnitude;
  });
  peak = team.max(peak);
  if (peak == 0.0 || peak > DBL_MAX) return peak;
  exponent = ilogb(peak);
  // Two factors: one alone would leave float64's range for the tiniest and the hugest Grams.
  const double half = scalbn(1.0, -(exponent / 2)), rest = scalbn(1.0, exponent / 2 - exponent);
  const auto stored = [&](int i, int j) {
    return static_cast<double>(matrix[Layout::entry(n, i, j)]);
  };
  team.entries(n, stored, [&](int i, int j, double value) {
    matrix[Layout::entry(n, i, j)] = static_cast<T>(value * half * rest);
  });
  team.sync();
  return peak;
}

// Makes w orthogonal to the first `rows` rows of the basis; returns its norm after. A norm of at
// most `least` tells that w lies in their span.
template <class Team, class Space, class Q>
LIGHTNING_MAT_INLINE double orthogonalize(Team& team, const Space& space, int n, int rows,
                                          double least, Q* w) {
  constexpr int kMaxPasses = 4;
  const int width = Team::Layout::width(n), stride = Team::Layout::stride(n);
  double length = 0.0;
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    team.row_products(space.basis, stride, rows, width, w, space.dots);  // dots[r] = <row r, w>
    team.sync();
    team.subtract_rows(space.basis, stride, rows, width, space.dots, w);  // w -= dots[r] * row r
    double left = team.dot(w, w, width), removed = team.dot(space.dots, space.dots, rows);
    team.sum(left, removed);
    length = sqrt(left);
    // Once is enough unless the pass cancelled most of w, and with it w's digits.
    if (removed <= left || length <= least) break;
  }
  return length;
}

// Makes T of space.matrix: its diagonal into `diagonal`, the rest into space.beta.
template <class Q, class Team, class Space>
LIGHTNING_MAT_INLINE void lanczos(Team& team, const Space& space, int n, double* diagonal) {
  // A vector below this share of |T| is rounding: the space spanned so far is invariant.
  constexpr double kRounding = 2.0 * (sizeof(Q) == sizeof(double) ? DBL_EPSILON : FLT_EPSILON);
  const int width = Team::Layout::width(n), stride = Team::Layout::stride(n);
  double size = 0.0;      // of T so far
  double coupling = 0.0;  // beta of the step before
  bool fresh = true;      // the next row of the basis is a new direction
  for (int rows = 0;;) {
    Q* w = rows < n ? space.basis + rows * stride : space.dots;
    if (fresh) {
      team.each(width,
                [&](int i) { w[i] = i < n ? static_cast<Q>(hashed_uniform(rows + 1, i)) : Q(0); });
    } else {
      const Q* q = space.basis + (rows - 1) * stride;
      const Q* before = rows > 1 ? q - stride : q;
      team.symmetric_product(space.matrix, n, q, w);  // w = A q
      const double alpha = team.sum(team.dot(q, w, width));
      if (team.rank() == 0) diagonal[rows - 1] = alpha;
      if (rows == n) break;
      size = fmax(size, fabs(alpha));
      team.each(width,
                [&](int i) { w[i] = static_cast<Q>(w[i] - alpha * q[i] - coupling * before[i]); });
    }
    team.sync();
    const double least = fresh ? 0.0 : kRounding * size;
    const double length = orthogonalize(team, space, n, rows, least, w);
    if (fresh) {
      coupling = 0.0;
    } else if (length > least) {
      coupling = length;
      size = fmax(size, length);
    } else {
      fresh = true;  // makes this row again
      continue;
    }
    if (team.rank() == 0 && rows > 0) space.beta[rows - 1] = coupling;
    const double scale = 1.0 / length;
    team.each(width, [&](int i) { w[i] = static_cast<Q>(w[i] * scale); });
    team.sync();
    fresh = false;
    ++rows;
  }
  team.sync();
}

// Writes the wanted eigenvalues of T, times 2^exponent. T's rows take the basis' place.
template <class Team, class Space>
LIGHTNING_MAT_INLINE void solve_tridiagonal(Team& team, const Space& space, int n,
                                            const double* diagonal, int exponent,
                                            const Results& results) {
  // Gershgorin's discs hold all eigenvalues, up to rounding.
  double low = HUGE_VAL, high = -HUGE_VAL;
  team.each(n, [&](int i) {
    const double radius = (i > 0 ? space.beta[i - 1] : 0.0) + (i + 1 < n ? space.beta[i] : 0.0);
    low = fmin(low, diagonal[i] - radius);
    high = fmax(high, diagonal[i] + radius);
  });
  low = -team.max(-low);
  high = team.max(high);
  const double bound = fmax(fabs(low), fabs(high));
  low -= 4.0 * DBL_EPSILON * bound;
  high += 4.0 * DBL_EPSILON * bound;
  // A coupling of rounding's size in place of none: the minors never vanish two times in a row.
  const double least = 0.25 * DBL_EPSILON * bound;
  team.each(n, [&](int i) {
    const double beta = i > 0 ? fmax(space.beta[i - 1], least) : 0.0;
    space.rows[i] = {diagonal[i], beta * beta};
  });
  team.sync();
  const int wanted = results.count(n), step = wanted == n ? 1 : n - 1;
  tridiagonal_eigenvalues(team, space.rows, n, low, high, wanted, step,
                          [&](int i, double value) { results.write(i, scalbn(value, exponent)); });
}

// Solves the Gram [n, n], both of whose triangles count. `diagonal` is scratch for n doubles and
// may be where the eigenvalues go. A Gram with an entry that is not finite gives NaN.
template <class Q, class T, class Team>
LIGHTNING_MAT_INLINE void solve_gram(Team& team, const T* gram, int n, unsigned char* memory,
                                     double* diagonal, const Results& results) {
  const LanczosSpace<T, Q, typename Team::Layout> space(memory, n);
  int exponent = 0;
  const double peak = load_gram(team, gram, n, space.matrix, exponent);
  if (peak == 0.0 || peak > DBL_MAX) {
    team.each(results.count(n), [&](int i) { results.write(i, peak == 0.0 ? 0.0 : NAN); });
  } else {
    lanczos<Q>(team, space, n, diagonal);
    solve_tridiagonal(team, space, n, diagonal, exponent, results);
  }
  team.sync();
}

}  // namespace lightning_mat
