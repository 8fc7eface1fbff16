// One host thread as a team: its loops fill the vector registers.

#pragma once

#include "../lanczos.h"

namespace lightning_mat {

class ThreadTeam {
 public:
  using Layout = RowLayout;
  static constexpr int kLanes = 32;

  int rank() const { return 0; }
  void sync() const {}
  double sum(double x) const { return x; }
  void sum(double&, double&) const {}
  double max(double x) const { return x; }
  template <class T>
  T load(const T* p) const {
    return *p;
  }

  template <class Value, class Use>
  void entries(int n, Value value, Use use) const {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < Layout::width(n); ++j) use(i, j, value(i, j));
    }
  }
  template <class F>
  void each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }

  template <class Q>
  double dot(const Q* x, const Q* y, int n) const {
    double part[kPad] = {};
    int i = 0;
    for (; i + kPad <= n; i += kPad) {
      for (int w = 0; w < kPad; ++w) part[w] += x[i + w] * y[i + w];
    }
    for (int w = 0; i + w < n; ++w) part[w] += x[i + w] * y[i + w];
    return total(part);
  }

  template <class T, class Q>
  void symmetric_product(const T* matrix, int n, const Q* x, Q* y) const {
    const int width = Layout::width(n);
    add_rows(matrix, width, n, width, x, [&](int i, double sum) { y[i] = sum; });
  }

  template <class Q>
  void row_products(const Q* m, int stride, int rows, int width, const Q* x, Q* out) const {
    int r = 0;
    for (; r + kRows <= rows; r += kRows)
      products<kRows>(m + r * stride, stride, width, x, out + r);
    for (; r < rows; ++r) products<1>(m + r * stride, stride, width, x, out + r);
  }

  template <class Q>
  void subtract_rows(const Q* m, int stride, int rows, int width, const Q* x, Q* y) const {
    add_rows(m, stride, rows, width, x, [&](int i, double sum) { y[i] -= sum; });
  }

  template <class F>
  void share(int wanted, F f) const {
    for (int first = 0; first < wanted; first += kLanes) f(first, 0, 1);
  }
  int first_part(bool found, int, int) const { return found ? 0 : 1; }

 private:
  static constexpr int kPad = Layout::kPad;
  static constexpr int kRows = 4;   // rows that share the loads of a vector
  static constexpr int kWide = 32;  // columns whose sums stay in registers

  static double total(double (&part)[kPad]) {
    for (int half = kPad / 2; half > 0; half /= 2) {
      for (int w = 0; w < half; ++w) part[w] += part[w + half];
    }
    return part[0];
  }

  template <int kCount, class Q>
  static void products(const Q* m, int stride, int width, const Q* x, Q* out) {
    double part[kCount][kPad] = {};
    for (int i = 0; i < width; i += kPad) {
      for (int r = 0; r < kCount; ++r) {
        for (int w = 0; w < kPad; ++w) part[r][w] += m[r * stride + i + w] * x[i + w];
      }
    }
    for (int r = 0; r < kCount; ++r) out[r] = total(part[r]);
  }

  // write(i, sum over the rows of x[r] * m[r][i]) for i < width.
  template <class T, class Q, class Write>
  static void add_rows(const T* m, int stride, int rows, int width, const Q* x, Write write) {
    int i = 0;
    for (; i + kWide <= width; i += kWide) columns<kWide>(m + i, stride, rows, x, i, write);
    for (; i < width; i += kPad) columns<kPad>(m + i, stride, rows, x, i, write);
  }

  template <int kCount, class T, class Q, class Write>
  static void columns(const T* m, int stride, int rows, const Q* x, int first, Write write) {
    double part[kCount] = {};
    for (int r = 0; r < rows; ++r) {
      for (int w = 0; w < kCount; ++w) part[w] += x[r] * m[r * stride + w];
    }
    for (int w = 0; w < kCount; ++w) write(first + w, part[w]);
  }
};

}  // namespace lightning_mat
