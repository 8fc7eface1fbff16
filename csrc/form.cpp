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

// What is copied (patches, other types, awkward strides) is copied for a few samples at a time.
constexpr int64_t kCopyBytes = 8 << 20;

int64_t product(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{1}, std::multiplies<>());
}

const char* name_of(Kind kind) {
  constexpr const char* kNames[kKinds] = {"linear", "conv", "bias", "scale", "embedding", "dense"};
  return kNames[static_cast<int64_t>(kind)];
}

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

void check_source(const LayerPlan& layer, const Source& s, const std::string& where) {
  const auto fits = [&](const Tensor& t, const char* name, int64_t dims, int64_t last,
                        const char* shape) {
    TORCH_CHECK_VALUE(t.dim() == dims && t.size(0) == s.samples && t.size(-1) == last, where, ": ",
                      name, " must be ", shape, " = [", s.samples, dims == 2 ? ", " : ", ..., ",
                      last, "] for a layer of kind ", name_of(s.kind), ", got shape ", t.sizes());
  };
  const auto floats = [&](const Tensor& t, const char* name) {
    TORCH_CHECK_VALUE(t.is_floating_point() && c10::elementSize(t.scalar_type()) > 1, where, ": ",
                      name, " has type ", t.scalar_type(),
                      ": pass float64, float32, bfloat16 or float16");
  };
  const auto same_tokens = [&] {
    TORCH_CHECK_VALUE(s.a.size(1) == s.b.size(1), where, ": a has ", s.a.size(1),
                      " tokens and b has ", s.b.size(1), ": one output gradient belongs to each");
  };
  floats(s.b, "b");
  switch (s.kind) {
    case Kind::kLinear:
      floats(s.a, "a");
      fits(s.a, "a", 3, layer.columns, "[samples, tokens, columns]");
      fits(s.b, "b", 3, layer.rows, "[samples, tokens, rows]");
      same_tokens();
      break;
    case Kind::kScale:
      floats(s.a, "a");
      fits(s.a, "a", 3, layer.rows, "[samples, tokens, rows]");
      fits(s.b, "b", 3, layer.rows, "[samples, tokens, rows]");
      same_tokens();
      [[fallthrough]];
    case Kind::kBias:
      fits(s.b, "b", 3, layer.rows, "[samples, tokens, rows]");
      TORCH_CHECK_VALUE(layer.columns == 1, where, ": a layer of kind ", name_of(s.kind),
                        " has one column, got ", layer.columns);
      break;
    case Kind::kEmbedding:
      TORCH_CHECK_VALUE(s.a.scalar_type() == at::kLong, where,
                        ": a must hold the int64 rows of an embedding, got type ",
                        s.a.scalar_type());
      fits(s.b, "b", 3, layer.columns, "[samples, tokens, columns]");
      fits(s.a, "a", 2, s.b.size(1), "[samples, tokens]");
      break;
    case Kind::kDense:
      fits(s.b, "b", 3, layer.columns, "[samples, rows, columns]");
      TORCH_CHECK_VALUE(s.b.size(1) == layer.rows, where, ": b must have ", layer.rows,
                        " rows, got shape ", s.b.sizes());
      break;
    case Kind::kConv: {
      floats(s.a, "a");
      const int64_t dims = static_cast<int64_t>(s.kernel.size());
      TORCH_CHECK_VALUE(dims >= 1 && s.a.dim() == dims + 3 && s.b.dim() == dims + 3 &&
                            s.a.size(0) == s.samples && s.b.size(0) == s.samples &&
                            s.a.size(1) == s.b.size(1),
                        where, ": a convolution in ", dims,
                        " dimensions takes a [samples, T, channels, *size] and b [samples, "
                        "T, rows, *out size] with ",
                        s.samples, " samples, got shapes ", s.a.sizes(), " and ", s.b.sizes());
      TORCH_CHECK_VALUE(s.b.size(2) == layer.rows && layer.rows % s.groups == 0 &&
                            s.a.size(2) % s.groups == 0 &&
                            s.a.size(2) / s.groups * s.kernel_size() == layer.columns,
                        where, ": ", s.a.size(2), " channels in ", s.groups, " groups with kernel ",
                        at::IntArrayRef(s.kernel), " and ", s.b.size(2),
                        " output channels do not make a weight of ", layer.rows, " rows and ",
                        layer.columns, " columns");
      for (int64_t d = 0; d < dims; ++d) {
        const int64_t reach =
            (s.b.size(d + 3) - 1) * s.stride[d] + (s.kernel[d] - 1) * s.dilation[d] + 1;
        // Padding after is that before, or one more where both make an uneven number.
        const int64_t most = s.padding[d] + 1;
        TORCH_CHECK_VALUE(s.b.size(d + 3) == 0 || reach <= s.a.size(d + 3) + s.padding[d] + most,
                          where, ": an output of size ", s.b.size(d + 3), " needs an input of ",
                          reach, " along dimension ", d, ", got ", s.a.size(d + 3),
                          " with a padding of ", s.padding[d]);
      }
      break;
    }
  }
}

}  // namespace

int64_t Source::tokens() const {
  if (kind == Kind::kDense) return 1;
  return kind == Kind::kConv ? b.size(1) * product(b.sizes().slice(3).vec()) : b.size(1);
}

int64_t Source::kernel_size() const { return product(kernel); }

int64_t Source::positions() const { return a.size(1) * product(a.sizes().slice(3).vec()); }

std::vector<Source> check_sources(const LayerPlan& layer, int64_t layer_index,
                                  const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                  int64_t samples) {
  std::vector<Source> sources;
  std::vector<bool> given(samples);
  for (int64_t k = 0; k < layer.source_count; ++k) {
    const SourceRecord& r = layer.sources[k];
    const std::string where =
        "layer " + std::to_string(layer_index) + ", tensors " + std::to_string(r.index);
    TORCH_CHECK_VALUE(r.index >= 0 && r.index < static_cast<int64_t>(a.size()), where,
                      ": there are ", a.size(), " pairs of tensors");
    Source s{};
    s.kind = static_cast<Kind>(r.kind);
    s.a = a[r.index];
    s.b = b[r.index];
    s.first = r.first;
    s.samples = r.samples;
    s.adds = r.adds != 0;
    s.groups = r.groups;
    s.kernel.assign(r.kernel, r.kernel + r.dims);
    s.stride.assign(r.stride, r.stride + r.dims);
    s.dilation.assign(r.dilation, r.dilation + r.dims);
    s.padding.assign(r.padding, r.padding + r.dims);
    if (r.swapped != 0) {
      TORCH_CHECK_VALUE(s.kind == Kind::kLinear, where, ": only a linear layer can be transposed");
      std::swap(s.a, s.b);
    }
    check_source(layer, s, where);
    for (int64_t i = s.first; i < s.first + s.samples; ++i) {
      TORCH_CHECK_VALUE(given[i] == s.adds, where, ": sample ", i,
                        s.adds ? " has no gradient yet to add to" : " has a gradient already");
      given[i] = true;
    }
    sources.push_back(std::move(s));
  }
  return sources;
}

std::vector<Chunk> cut_chunks(const LayerPlan& layer, const std::vector<Source>& sources,
                              int64_t elements) {
  // What a cut may not divide: a channel's kernel, and, across groups, a group's rows.
  int64_t row_grain = 1, column_grain = 1;
  bool by_columns = false;
  int64_t copied_tokens = 1;  // of what is copied for a chunk: patches, gradients
  for (const Source& s : sources) {
    if (s.kind != Kind::kConv) continue;
    copied_tokens = std::max(copied_tokens, s.tokens());
    column_grain = std::lcm(column_grain, s.kernel_size());
    // Patches are copied: cut so that no part of them is copied twice.
    by_columns = s.groups == 1;
    if (s.groups > 1) row_grain = std::lcm(row_grain, layer.rows / s.groups);
  }
  // The rows and columns that pieces cover, the rows in runs.
  std::vector<Chunk> runs;
  std::vector<std::pair<int64_t, int64_t>> spans;
  int64_t c0 = layer.columns, c1 = 0;
  for (int64_t k = 0; k < layer.piece_count; ++k) {
    const Piece& p = layer.pieces[k];
    if (p.r0 == p.r1 || p.c0 == p.c1) continue;
    spans.emplace_back(p.r0, p.r1);
    c0 = std::min(c0, p.c0);
    c1 = std::max(c1, p.c1);
  }
  if (spans.empty()) return {};
  c0 = c0 / column_grain * column_grain;
  c1 = std::min(layer.columns, (c1 + column_grain - 1) / column_grain * column_grain);
  std::sort(spans.begin(), spans.end());
  for (const auto& [first, last] : spans) {
    const int64_t r0 = first / row_grain * row_grain;
    const int64_t r1 = std::min(layer.rows, (last + row_grain - 1) / row_grain * row_grain);
    if (!runs.empty() && r0 <= runs.back().r1) {
      runs.back().r1 = std::max(runs.back().r1, r1);
    } else {
      runs.push_back({r0, r1, c0, c1});
    }
  }
  // Parts of about the same size, multiples of the grain.
  const auto even = [](int64_t total, int64_t most, int64_t grain) {
    const int64_t count = std::max<int64_t>((total + most - 1) / most, 1);
    return std::max<int64_t>(((total + count - 1) / count + grain - 1) / grain, 1) * grain;
  };
  // One sample's copies of a chunk stay within kCopyBytes, too.
  const int64_t copied = std::max<int64_t>(kCopyBytes / 4 / copied_tokens, 1);
  const auto whole = [](int64_t most, int64_t grain) {
    return std::max(most / grain * grain, grain);
  };
  std::vector<Chunk> chunks;
  for (const Chunk& run : runs) {
    const int64_t rows = run.r1 - run.r0, columns = run.c1 - run.c0;
    int64_t row_step = rows, column_step = columns;
    if (by_columns) {
      column_step =
          even(columns, whole(std::min(elements / rows, copied), column_grain), column_grain);
      row_step = even(rows, std::min(std::max<int64_t>(elements / column_step, 1), copied), 1);
    } else {
      const bool conv = copied_tokens > 1;
      const int64_t fitting = conv ? copied / columns * row_grain : elements;
      row_step = even(rows, whole(std::min(elements / columns, fitting), row_grain), row_grain);
      column_step = even(columns, whole(elements / row_step, column_grain), column_grain);
    }
    for (int64_t r = run.r0; r < run.r1; r += row_step) {
      for (int64_t c = run.c0; c < run.c1; c += column_step) {
        chunks.push_back({r, std::min(r + row_step, run.r1), c, std::min(c + column_step, run.c1)});
      }
    }
  }
  return chunks;
}

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
