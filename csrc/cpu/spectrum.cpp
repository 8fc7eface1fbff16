// Eigenvalues of Grams on the CPU: each thread takes whole Grams.

#include <ATen/Parallel.h>

#include <memory>
#include <new>

#include "../lanczos.h"
#include "../mntk.h"
#include "thread_team.h"

// The loops are compiled for wider registers as well, and the machine's are chosen when the library
// is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define LIGHTNING_MAT_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define LIGHTNING_MAT_CLONES
#endif

namespace lightning_mat {
namespace {

template <class T>
using Space = LanczosSpace<T, double, RowLayout>;

LIGHTNING_MAT_CLONES
void solve_float(const float* gram, int n, unsigned char* memory, double* diagonal,
                 const Results& results) {
  ThreadTeam team;
  solve_gram<double>(team, gram, n, memory, diagonal, results);
}

LIGHTNING_MAT_CLONES
void solve_double(const double* gram, int n, unsigned char* memory, double* diagonal,
                  const Results& results) {
  ThreadTeam team;
  solve_gram<double>(team, gram, n, memory, diagonal, results);
}

struct Release {
  void operator()(unsigned char* memory) const {
    ::operator delete(memory, std::align_val_t{Space<double>::kAlign});
  }
};

}  // namespace

void cpu_spectrum(const SpectrumParams& p) {
  const int n = static_cast<int>(p.samples);
  at::parallel_for(0, p.count, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<unsigned char, Release> memory(static_cast<unsigned char*>(::operator new(
        lanczos_workspace(n) * sizeof(double), std::align_val_t{Space<double>::kAlign})));
    double* scratch = reinterpret_cast<double*>(memory.get() + Space<double>::bytes(n));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t gram = p.which != nullptr ? p.which[2 * index] : index;
      const int64_t row = p.which != nullptr ? p.which[2 * index + 1] : index;
      const Results results = results_of(p, row);
      double* diagonal = results.eigenvalues != nullptr ? results.eigenvalues : scratch;
      if (p.gram_type == Scalar::kFloat64) {
        solve_double(static_cast<const double*>(p.grams) + gram * n * n, n, memory.get(), diagonal,
                     results);
      } else {
        solve_float(static_cast<const float*>(p.grams) + gram * n * n, n, memory.get(), diagonal,
                    results);
      }
    }
  });
}

}  // namespace lightning_mat
