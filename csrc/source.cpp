#include "source.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <utility>

namespace lightning_mat {
namespace {

using at::Tensor;

int64_t product(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{1}, std::multiplies<>());
}

const char* name_of(Kind kind) {
  constexpr const char* kNames[kKinds] = {"linear", "conv", "bias", "scale", "embedding", "dense"};
  return kNames[static_cast<int64_t>(kind)];
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
        if (s.b.size(d + 3) == 0) continue;
        // Padding after is that before, or one more where both make an uneven number.
        const int64_t reach = (s.kernel[d] - 1) * s.dilation[d] + 1;
        const int64_t least = s.a.size(d + 3) + 2 * s.padding[d] - reach;
        const bool fits = least + 1 >= 0 && (least / s.stride[d] + 1 == s.b.size(d + 3) ||
                                             (least + 1) / s.stride[d] + 1 == s.b.size(d + 3));
        TORCH_CHECK_VALUE(fits, where, ": an input of ", s.a.size(d + 3), " along dimension ", d,
                          " does not give an output of ", s.b.size(d + 3), " with kernel ",
                          s.kernel[d], ", stride ", s.stride[d], ", dilation ", s.dilation[d],
                          " and padding ", s.padding[d]);
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

}  // namespace lightning_mat
