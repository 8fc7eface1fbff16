#include "form.h"

#include <ATen/Parallel.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#ifdef LIGHTNING_MAT_WITH_CUDA
#include "cuda/backend.h"
#endif

namespace lightning_mat {
namespace {

using at::Tensor;

// Samples that are copied at a time, where one sample's copy has so many elements.
int64_t samples_each(int64_t elements, at::ScalarType type) {
  const int64_t bytes = std::max<int64_t>(elements, 1) * c10::elementSize(type);
  return std::max<int64_t>(kCopyBytes / bytes, 1);
}

// Whether a matrix product reads [samples, m, n] where it is.
bool readable(const Tensor& t) {
  const int64_t m = t.size(1), n = t.size(2), row = t.stride(1), column = t.stride(2);
  const bool rows = (column == 1 || n == 1) && (row >= std::max<int64_t>(n, 1) || m == 1);
  const bool columns = (row == 1 || m == 1) && (column >= std::max<int64_t>(m, 1) || n == 1);
  return rows || columns;
}

void put(const Tensor& out, const Tensor& values, bool adds) {
  if (adds) {
    out.add_(values);
  } else {
    out.copy_(values);
  }
}

// out (+)= left right, batches of matrices.
void multiply(Tensor out, const Tensor& left, const Tensor& right, bool adds) {
  if (adds) {
    out.baddbmm_(left, right);
  } else {
    at::bmm_out(out, left, right);
  }
}

// out (+)= b^T a for b [samples, tokens, rows] and a [samples, tokens, columns].
void add_outer_products(const Tensor& out, const Tensor& a, const Tensor& b, bool adds) {
  const at::ScalarType type = out.scalar_type();
  const Tensor left = b.transpose(1, 2);
  const bool copies_b = b.scalar_type() != type || !readable(left);
  const bool copies_a = a.scalar_type() != type || !readable(a);
  if (!copies_a && !copies_b) {
    multiply(out, left, a, adds);
    return;
  }
  const int64_t elements = b.size(1) * ((copies_b ? b.size(2) : 0) + (copies_a ? a.size(2) : 0));
  const int64_t each = samples_each(elements, type);
  const auto prepare = [&](const Tensor& t, bool copies) {
    return copies ? t.to(type, false, true, at::MemoryFormat::Contiguous) : t;
  };
  for (int64_t s = 0; s < out.size(0); s += each) {
    const int64_t n = std::min(each, out.size(0) - s);
    multiply(out.narrow(0, s, n), prepare(b.narrow(0, s, n), copies_b).transpose(1, 2),
             prepare(a.narrow(0, s, n), copies_a), adds);
  }
}

// Output gradients [samples, tokens, rows, *out size] as [samples, groups, rows, tokens].
Tensor conv_grads(const Source& source, int64_t first, int64_t last, int64_t row, int64_t rows,
                  int64_t groups, at::ScalarType type) {
  const Tensor part = source.b.narrow(0, first, last - first).narrow(2, row, rows);
  const Tensor flat = part.flatten(3).transpose(1, 2);  // [samples, rows, T, positions]
  return flat.reshape({last - first, groups, rows / groups, source.tokens()}).to(type);
}

void form_conv(const Tensor& out, const Source& source, const Chunk& chunk) {
  const int64_t rows = chunk.r1 - chunk.r0, columns = chunk.c1 - chunk.c0;
  const int64_t per_group = source.b.size(2) / source.groups;
  const int64_t g0 = chunk.r0 / per_group, g1 = (chunk.r1 + per_group - 1) / per_group;
  const int64_t groups = g1 - g0;
  const int64_t copied = source.tokens() * groups * columns;
  const int64_t each = samples_each(copied, out.scalar_type());
  for (int64_t s = 0; s < source.samples; s += each) {
    const int64_t last = std::min(s + each, source.samples), n = last - s;
    const Tensor patches =
        conv_patches(source, s, last, g0, g1, chunk.c0, chunk.c1, out.scalar_type());
    const Tensor grads = conv_grads(source, s, last, chunk.r0, rows, groups, out.scalar_type());
    const Tensor left = grads.reshape({n * groups, rows / groups, source.tokens()});
    const Tensor right = patches.view({n * groups, columns, source.tokens()}).transpose(1, 2);
    const Tensor target = out.narrow(0, s, n);
    if (groups == 1) {
      multiply(target, left, right, source.adds);
    } else {
      // Samples may lie apart in `out`, so that samples and groups are no one dimension there.
      put(target, at::bmm(left, right).view({n, rows, columns}), source.adds);
    }
  }
}

// Sums over tokens of vectors: biases (b) and scales (a * b).
void form_vector(const Tensor& out, const Source& source, const Chunk& chunk) {
  const Tensor b = source.b.narrow(2, chunk.r0, chunk.r1 - chunk.r0);
  const int64_t each = samples_each(b.size(1) * b.size(2), at::kFloat);
  const auto wide = at::promoteTypes(out.scalar_type(), at::kFloat);
  for (int64_t s = 0; s < source.samples; s += each) {
    const int64_t n = std::min(each, source.samples - s);
    Tensor values = b.narrow(0, s, n);
    if (source.kind == Kind::kScale) {
      const Tensor a = source.a.narrow(2, chunk.r0, chunk.r1 - chunk.r0).narrow(0, s, n);
      values = values.to(wide).mul(a.to(wide));
    }
    put(out.narrow(0, s, n), values.sum({1}, false, wide).unsqueeze(2), source.adds);
  }
}

// table [samples, rows, columns] += the vectors of tokens whose row of the whole table is `first`
// or one of those after it. Tokens come in their order, each sum in one thread: index_put_ would
// use atomics, and give other bits in every run.
template <class T>
void add_rows(const Tensor& table, const Tensor& index, const Tensor& values, int64_t first) {
  const int64_t rows = table.size(1), columns = table.size(2), tokens = index.size(1);
  T* to = table.mutable_data_ptr<T>();
  const T* from = values.const_data_ptr<T>();
  const int64_t* row = index.const_data_ptr<int64_t>();
  at::parallel_for(0, table.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t place = row[s * tokens + t] - first;
        if (place < 0 || place >= rows) continue;
        T* sum = to + (s * rows + place) * columns;
        const T* vector = from + (s * tokens + t) * columns;
        for (int64_t c = 0; c < columns; ++c) sum[c] += vector[c];
      }
    }
  });
}

void add_token_rows(const Tensor& table, const Tensor& index, const Tensor& values, int64_t first) {
#ifdef LIGHTNING_MAT_WITH_CUDA
  if (table.is_cuda()) return cuda_add_token_rows(table, index, values, first);
#endif
  if (table.scalar_type() == at::kDouble) {
    add_rows<double>(table, index, values, first);
  } else {
    add_rows<float>(table, index, values, first);
  }
}

// Adds tokens' vectors to the rows of the table that they name.
void form_embedding(const Tensor& out, const Source& source, const Chunk& chunk) {
  const int64_t rows = chunk.r1 - chunk.r0, columns = chunk.c1 - chunk.c0;
  const auto wide = at::promoteTypes(out.scalar_type(), at::kFloat);
  const int64_t each = samples_each((source.a.size(1) + rows) * columns, wide);
  for (int64_t s = 0; s < source.samples; s += each) {
    const int64_t n = std::min(each, source.samples - s);
    const Tensor index = source.a.narrow(0, s, n).contiguous();
    const Tensor values =
        source.b.narrow(0, s, n).narrow(2, chunk.c0, columns).to(wide).contiguous();
    const Tensor table = at::zeros({n, rows, columns}, values.options());
    add_token_rows(table, index, values, chunk.r0);
    put(out.narrow(0, s, n), table, source.adds);
  }
}

void form_source(const Tensor& out, const Source& source, const Chunk& chunk) {
  const int64_t rows = chunk.r1 - chunk.r0, columns = chunk.c1 - chunk.c0;
  switch (source.kind) {
    case Kind::kLinear:
      return add_outer_products(out, source.a.narrow(2, chunk.c0, columns),
                                source.b.narrow(2, chunk.r0, rows), source.adds);
    case Kind::kConv:
      return form_conv(out, source, chunk);
    case Kind::kBias:
    case Kind::kScale:
      return form_vector(out, source, chunk);
    case Kind::kEmbedding:
      return form_embedding(out, source, chunk);
    case Kind::kDense:
      return put(out, source.b.narrow(1, chunk.r0, rows).narrow(2, chunk.c0, columns), source.adds);
  }
}

}  // namespace

void form_chunk(const Tensor& out, const std::vector<Source>& sources, const Chunk& chunk) {
  int64_t covered = 0;
  for (const Source& s : sources) covered += s.adds ? 0 : s.samples;
  if (covered < out.size(0)) out.zero_();  // samples that did not use the layer
  for (const Source& s : sources) form_source(out.narrow(0, s.first, s.samples), s, chunk);
}

Tensor conv_patches(const Source& source, int64_t first, int64_t last, int64_t g0, int64_t g1,
                    int64_t c0, int64_t c1, at::ScalarType type) {
  const int64_t kernel = source.kernel_size();
  const int64_t per_group = source.a.size(2) / source.groups;
  const int64_t dims = static_cast<int64_t>(source.kernel.size());
  const int64_t channels = (c1 - c0) / kernel;
  // The channels in question, with zeros around them.
  Tensor a = source.a.narrow(0, first, last - first);
  int64_t skipped = c0 / kernel;  // channels of each group
  if (g1 - g0 == 1) {
    a = a.narrow(2, g0 * per_group + skipped, channels);
    skipped = 0;
  } else {
    a = a.narrow(2, g0 * per_group, (g1 - g0) * per_group);
  }
  std::vector<int64_t> pads;  // of the last dimension first: before, after
  for (int64_t d = dims - 1; d >= 0; --d) {
    const int64_t reach = (source.b.size(d + 3) - 1) * source.stride[d] +
                          (source.kernel[d] - 1) * source.dilation[d] + 1;
    pads.push_back(source.padding[d]);
    pads.push_back(std::max<int64_t>(reach - source.padding[d] - a.size(d + 3), 0));
  }
  if (std::any_of(pads.begin(), pads.end(), [](int64_t p) { return p > 0; })) {
    a = at::constant_pad_nd(a, pads, 0);
  }
  // [samples, groups, channels, *kernel, T, *out size], a view
  std::vector<int64_t> sizes{last - first, g1 - g0, channels};
  std::vector<int64_t> strides{a.stride(0), per_group * a.stride(2), a.stride(2)};
  for (int64_t d = 0; d < dims; ++d) {
    sizes.push_back(source.kernel[d]);
    strides.push_back(source.dilation[d] * a.stride(3 + d));
  }
  sizes.push_back(a.size(1));
  strides.push_back(a.stride(1));
  for (int64_t d = 0; d < dims; ++d) {
    sizes.push_back(source.b.size(3 + d));
    strides.push_back(source.stride[d] * a.stride(3 + d));
  }
  const int64_t offset = a.storage_offset() + skipped * a.stride(2);
  const Tensor copy =
      a.as_strided(sizes, strides, offset).to(type, false, true, at::MemoryFormat::Contiguous);
  return copy.view({last - first, g1 - g0, c1 - c0, source.tokens()});
}

}  // namespace lightning_mat
