// Eigenvalues of Grams on the CPU: each thread takes whole Grams.

#include <ATen/Parallel.h>

#include <vector>

#include "../lanczos.h"
#include "../mntk.h"

// The loops of lanczos.h are compiled for wider registers as well, and the machine's are chosen
// when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define LIGHTNING_MAT_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define LIGHTNING_MAT_CLONES
#endif

namespace lightning_mat {
namespace {

struct OneThread {
  static constexpr int64_t kWidth = kPad;
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  double sum(double x) const { return x; }
  double max(double x) const { return x; }
  void sync() const {}
};

LIGHTNING_MAT_CLONES
void solve_one(const SpectrumParams& p, int64_t index, double* memory) {
  OneThread team;
  if (p.gram_type == Scalar::kFloat64) {
    solve_gram<double>(team, p, index, memory);
  } else {
    solve_gram<float>(team, p, index, memory);
  }
}

}  // namespace

void cpu_spectrum(const SpectrumParams& p) {
  at::parallel_for(0, p.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> memory(lanczos_workspace(p.samples));
    for (int64_t index = begin; index < end; ++index) solve_one(p, index, memory.data());
  });
}

}  // namespace lightning_mat
