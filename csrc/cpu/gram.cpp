// Gram accumulation on the CPU: pieces that lie at even distances are one batched product.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "backend.h"

namespace lightning_mat {
namespace {

// Pieces of at most this many elements (biases, scales) are not worth a matrix product each.
constexpr int64_t kNarrow = 8;

// Elements of a piece that are copied, or widened, at a time (8 MiB in float32).
constexpr int64_t kCopyElements = 2 << 20;

// `count` pieces of the same shape, each a fixed step after the one before.
struct Run {
  Piece first;
  int64_t count, unit_step, row_step, column_step;
  int64_t rows() const { return first.r1 - first.r0; }
  int64_t columns() const { return first.c1 - first.c0; }
};

Run longest_run(const Piece* pieces, int64_t left) {
  const Piece& a = pieces[0];
  Run run{a, 1, 1, 0, 0};
  if (left == 1 || pieces[1].unit <= a.unit) return run;  // one unit's pieces add up in order
  const Piece& b = pieces[1];
  if (b.r0 < a.r0 || b.c0 < a.c0) return run;  // a view's strides cannot be negative
  run.unit_step = b.unit - a.unit;
  run.row_step = b.r0 - a.r0;
  run.column_step = b.c0 - a.c0;
  for (; run.count < left; ++run.count) {
    const Piece& p = pieces[run.count];
    const bool fits = p.unit == a.unit + run.count * run.unit_step &&
                      p.r0 == a.r0 + run.count * run.row_step &&
                      p.c0 == a.c0 + run.count * run.column_step && p.r1 - p.r0 == run.rows() &&
                      p.c1 - p.c0 == run.columns();
    if (!fits) break;
  }
  return run;
}

// gram += V V^T for V [count, samples, width].
void add_products(const at::Tensor& gram, const at::Tensor& v) {
  if (v.size(0) == 1) {
    const at::Tensor matrix = v.select(0, 0);
    gram.select(0, 0).addmm_(matrix, matrix.t());
  } else {
    gram.baddbmm_(v, v.transpose(1, 2));
  }
}

// gram += V V^T for V^T [count, width, samples], contiguous, of few rows: outer products.
template <class T>
void add_outer_products(const at::Tensor& gram, const at::Tensor& v) {
  const int64_t width = v.size(1), samples = v.size(2), step = gram.stride(0);
  T* grams = gram.mutable_data_ptr<T>();
  const T* values = v.const_data_ptr<T>();
  at::parallel_for(0, v.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t e = 0; e < width; ++e) {
        const T* row = values + (k * width + e) * samples;
        for (int64_t i = 0; i < samples; ++i) {
          T* to = grams + k * step + i * samples;
          for (int64_t j = 0; j < samples; ++j) to[j] += row[i] * row[j];
        }
      }
    }
  });
}

void accumulate_run(const at::Tensor& grams, const at::Tensor& grad, const Run& run) {
  const int64_t samples = grad.size(0), rows = run.rows(), columns = run.columns();
  const int64_t rs = grad.stride(1), cs = grad.stride(2), ss = grad.stride(0);
  const int64_t width = rows * columns;
  if (width == 0) return;
  const at::Tensor gram = grams.as_strided(
      {run.count, samples, samples}, {run.unit_step * samples * samples, samples, 1},
      grams.storage_offset() + run.first.unit * samples * samples);
  const at::Tensor block = grad.as_strided(
      {run.count, samples, rows, columns}, {run.row_step * rs + run.column_step * cs, ss, rs, cs},
      grad.storage_offset() + run.first.r0 * rs + run.first.c0 * cs);

  if (width <= kNarrow) {
    const at::Tensor v = block.permute({0, 2, 3, 1})
                             .to(grams.scalar_type(), false, true, at::MemoryFormat::Contiguous)
                             .view({run.count, width, samples});
    if (grams.scalar_type() == at::kDouble) {
      add_outer_products<double>(gram, v);
    } else {
      add_outer_products<float>(gram, v);
    }
    return;
  }
  // A matrix [samples, width] that BLAS can read where it is.
  const int64_t inner = columns > 1 ? cs : rs;
  const bool flat = rows == 1 || columns == 1 || rs == columns * cs;
  if (flat && (inner == 1 || width == 1) && ss >= width && grad.dtype() == grams.dtype()) {
    add_products(gram, block.as_strided({run.count, samples, width}, {block.stride(0), ss, 1},
                                        block.storage_offset()));
    return;
  }
  // Otherwise bounded parts of it are copied: many pieces, or some rows (or columns) of one.
  const int64_t row_cost = samples * columns;
  const int64_t rows_each = std::clamp<int64_t>(kCopyElements / row_cost, 1, rows);
  const int64_t columns_each = std::clamp<int64_t>(kCopyElements / samples, 1, columns);
  const int64_t pieces_each = rows_each < rows || columns_each < columns
                                  ? 1
                                  : std::max<int64_t>(kCopyElements / (rows * row_cost), 1);
  for (int64_t k = 0; k < run.count; k += pieces_each) {
    const int64_t n = std::min(pieces_each, run.count - k);
    const at::Tensor target = gram.narrow(0, k, n);
    for (int64_t r = 0; r < rows; r += rows_each) {
      for (int64_t c = 0; c < columns; c += columns_each) {
        const at::Tensor part = block.narrow(0, k, n)
                                    .narrow(2, r, std::min(rows_each, rows - r))
                                    .narrow(3, c, std::min(columns_each, columns - c));
        add_products(target, part.to(grams.scalar_type(), false, true, at::MemoryFormat::Contiguous)
                                 .view({n, samples, -1}));
      }
    }
  }
}

}  // namespace

void cpu_gram_accumulate(const at::Tensor& grams, const at::Tensor& grad, const Piece* pieces,
                         int64_t count) {
  for (int64_t k = 0; k < count;) {
    const Run run = longest_run(pieces + k, count - k);
    accumulate_run(grams, grad, run);
    k += run.count;
  }
}

}  // namespace lightning_mat
