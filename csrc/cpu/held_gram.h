// The small matrix of a block, kept by the caller of joint_step from one call to the next: of columns that are kept now, all
// of which were in it, it is a submatrix. Fisher side only, A = mλ I + GᵀG: there it takes no product to make it smaller.
#pragma once

#include "block.h"

namespace mfac::cpu {

class HeldGram {
 public:
  // values[1 + capacity]: its products (0: there is none), then its lower triangle, row after row; held[width]: its columns.
  HeldGram(double* values, int64_t capacity, bool* held, int64_t width)
      : values_(values), capacity_(capacity), held_(held), width_(width) {
    if (products() == Products::none) return;
    for (int64_t c = 0; c < width; ++c)
      if (held[c]) columns_.push_back(static_cast<int32_t>(c));
    if (!fits(size())) columns_.clear();
  }
  HeldGram() = default;  // has no room
  int64_t size() const { return static_cast<int64_t>(columns_.size()); }
  const std::vector<int32_t>& columns() const { return columns_; }
  Products products() const { return static_cast<Products>(static_cast<int>(values_[0])); }

  // Whether A holds all these columns; `where` becomes their positions in it.
  bool find(const bool* kept, std::vector<int32_t>& where) const {
    if (columns_.empty()) return false;
    where.clear();
    for (int64_t i = 0; i < size(); ++i)
      if (kept[columns_[i]]) where.push_back(static_cast<int32_t>(i));
    return static_cast<int64_t>(where.size()) == std::count(kept, kept + width_, true);
  }

  // Lower triangle of a[n, n] = the rows and columns `where` of A. Returns its trace.
  double extract(const std::vector<int32_t>& where, double* a) const {
    const int64_t n = static_cast<int64_t>(where.size());
    double trace = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double* source = row(where[i]);
      for (int64_t j = 0; j <= i; ++j) a[i * n + j] = source[where[j]];
      trace += a[i * n + i];
    }
    return trace;
  }

  // y = A x
  void multiply(const double* x, double* y) const {
    constexpr int64_t lanes = kLanes<double>;
    for (int64_t i = 0; i < size(); ++i) {
      const double *a = row(i), scale = x[i];
      Vector<double> sums = {};
      int64_t j = 0;
      for (; j + lanes <= i; j += lanes) {
        const Vector<double> part = load<double>(a + j), below = load<double>(y + j) + scale * part;
        sums += part * load<double>(x + j);
        std::memcpy(y + j, &below, sizeof below);
      }
      double total = a[i] * scale;
      for (int64_t v = 0; v < lanes; ++v) total += sums[v];
      for (; j < i; ++j) {
        total += a[j] * x[j];
        y[j] += a[j] * scale;
      }
      y[i] = total;
    }
  }

  // Only the rows and columns `where` stay.
  void shrink(const std::vector<int32_t>& where) {
    const int64_t n = static_cast<int64_t>(where.size());
    double* out = values_ + 1;  // never past what is still to be read
    for (int64_t i = 0; i < n; ++i) {
      const double* source = row(where[i]);
      for (int64_t j = 0; j <= i; ++j) *out++ = source[where[j]];
    }
    std::fill_n(held_, width_, false);
    for (const int32_t i : where) held_[columns_[i]] = true;
  }

  // A of a block's columns in use, if there is room and it is of the Fisher side; else none.
  template <typename G>
  void store(const Block<G>& block, const double* a, Products products) {
    const int64_t n = block.size();
    if (!values_) return;
    std::fill_n(held_, width_, false);
    values_[0] = static_cast<double>(Products::none);
    if (block.capacitance() || !fits(n)) return;
    double* out = values_ + 1;
    for (int64_t i = 0; i < n; ++i) out = std::copy_n(a + i * n, i + 1, out);
    for (int64_t c = 0; c < n; ++c) held_[block.column(c)] = true;
    values_[0] = static_cast<double>(products);
  }

 private:
  bool fits(int64_t n) const { return n * (n + 1) / 2 <= capacity_; }
  const double* row(int64_t i) const { return values_ + 1 + i * (i + 1) / 2; }

  double* values_ = nullptr;
  int64_t capacity_ = 0;
  bool* held_ = nullptr;
  int64_t width_ = 0;
  std::vector<int32_t> columns_;
};

}  // namespace mfac::cpu
