// The small matrix of a block, kept by the caller from one call of joint_step or group_saliency to the next, with the
// same gradients, damping and blocks. With H the columns that it holds and S those in use now, a subset of H,
//
//   Fisher side        A = mλ I + GᵀG      A_S is a submatrix: no product is needed
//   capacitance side   A = mλ I + G Gᵀ     A_S = A_H - G_Q G_Qᵀ, Q = H \ S: m² flops per column of Q instead of S
//
// A difference keeps the rounding errors of its terms while the trace falls: they are accumulated (rounding_of), and
// the smallest eigenvalue is compared with them. Products are subtracted from products of the same precision, so that
// what bfloat16 terms leave out of a column is removed with it. If the comparison fails, A is computed anew from S.
#pragma once

#include "kernels.h"

namespace mfac::cpu {

class HeldGram {
 public:
  // For one block. held.gram[index] has: Products (0: there is no A), rounding errors, lower triangle row by row.
  template <typename G>
  HeldGram(const Held& held, const Gradients<G>& grads, int64_t index) {
    if (!held.gram) return;
    const int64_t begin = index * grads.block_size;
    values_ = held.gram + index * held.stride;
    capacity_ = held.stride - kHeader;
    held_ = held.columns + begin;
    width_ = std::min(grads.block_size, grads.d - begin);
    if (products() == Products::none) return;
    for (int64_t c = 0; c < width_; ++c)
      if (held_[c]) columns_.push_back(static_cast<int32_t>(c));
    capacitance_ = grads.fisher_columns < size();
    if (!fits(capacitance_ ? grads.m : size())) columns_.clear();
  }
  int64_t size() const { return static_cast<int64_t>(columns_.size()); }
  const std::vector<int32_t>& columns() const { return columns_; }
  Products products() const { return static_cast<Products>(static_cast<int>(values_[0])); }
  double rounding() const { return values_[1]; }

  // Whether A is of the block's side and holds all of the block's columns in use, and using it takes fewer products
  // than computing it anew. `where` becomes their positions among the held columns.
  template <typename G>
  bool find(const Block<G>& block, std::vector<int32_t>& where) const {
    if (columns_.empty() || capacitance_ != block.capacitance()) return false;
    where.clear();
    for (int64_t i = 0, next = 0; i < size() && next < block.size(); ++i)
      if (columns_[i] == block.column(next)) {
        where.push_back(static_cast<int32_t>(i));
        ++next;
      }
    return static_cast<int64_t>(where.size()) == block.size() && (!capacitance_ || size() < 2 * block.size());
  }

  // The columns that are not at `where`.
  std::vector<int32_t> others(const std::vector<int32_t>& where) const {
    std::vector<int32_t> out;
    auto next = where.begin();
    for (int64_t i = 0; i < size(); ++i)
      if (next < where.end() && *next == i)
        ++next;
      else
        out.push_back(columns_[i]);
    return out;
  }

  // Fisher side: lower triangle of a[n, n] = the rows and columns `where` of A. Returns its trace.
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

  // Capacitance side: subtracts G Gᵀ of the columns `removed`, a block on that side, from A, which then holds those of
  // `block`. Lower triangle of a[m, m] = A. Returns its trace.
  template <typename G>
  double subtract(const Block<G>& block, const Block<G>& removed, double* a) {
    const int64_t m = block.grads.m;
    if (removed.size() == 0) {
      std::fill_n(a, m * m, 0.0);
    } else {
      const double gone = products() == Products::exact   ? gram_block<double>(removed, 0, a)
                          : products() == Products::terms ? gram_block<float>(removed, 0, a, product_terms(removed))
                                                          : gram_block<float>(removed, 0, a);
      values_[1] += rounding_of(removed, gone);
      hold(block);
    }
    double trace = 0;
    for (int64_t i = 0; i < m; ++i) {
      double *own = row(i), *out = a + i * m;
      for (int64_t j = 0; j <= i; ++j) out[j] = own[j] -= out[j];
      trace += out[i];
    }
    return trace;
  }

  // Fisher side: y = A x
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

  // Fisher side: keeps only the rows and columns `where`.
  void shrink(const std::vector<int32_t>& where) {
    const int64_t n = static_cast<int64_t>(where.size());
    double* out = values_ + kHeader;  // in place: it never overtakes the elements still to be read
    for (int64_t i = 0; i < n; ++i) {
      const double* source = row(where[i]);
      for (int64_t j = 0; j <= i; ++j) *out++ = source[where[j]];
    }
    std::fill_n(held_, width_, false);
    for (const int32_t i : where) held_[columns_[i]] = true;
  }

  // Stores A of a block's columns in use if there is room, else none.
  template <typename G>
  void store(const Block<G>& block, const double* a, Products products, double rounding) {
    const int64_t n = block.order();
    if (!values_) return;
    values_[0] = static_cast<double>(Products::none);
    std::fill_n(held_, width_, false);
    if (!fits(n)) return;
    double* out = values_ + kHeader;
    for (int64_t i = 0; i < n; ++i) out = std::copy_n(a + i * n, i + 1, out);
    hold(block);
    values_[0] = static_cast<double>(products);
    values_[1] = rounding;
  }

 private:
  static constexpr int64_t kHeader = 2;  // Products and rounding errors
  bool fits(int64_t n) const { return n * (n + 1) / 2 <= capacity_; }
  double* row(int64_t i) const { return values_ + kHeader + i * (i + 1) / 2; }
  template <typename G>
  void hold(const Block<G>& block) {
    std::fill_n(held_, width_, false);
    for (int64_t c = 0; c < block.size(); ++c) held_[block.column(c)] = true;
  }

  double* values_ = nullptr;
  int64_t capacity_ = 0;
  bool* held_ = nullptr;
  int64_t width_ = 0;
  std::vector<int32_t> columns_;
  bool capacitance_ = false;
};

// A Fisher of the same gradients, with every block on the capacitance side.
template <typename G>
Gradients<G> capacitance_only(Gradients<G> grads) {
  grads.fisher_columns = 0;
  return grads;
}

// Factor of A of the columns in use of a block into l[n, n], from the held A, in which they are at `where` and which
// holds the columns of `removed` besides (of capacitance_only gradients; unused on the Fisher side). False if that is
// not precise enough. On the capacitance side the A of the block is held afterwards.
template <typename G>
bool factor_held(const Block<G>& block, const std::vector<int32_t>& where, const Block<G>& removed, HeldGram& gram,
                 double* l, Precision& precision) {
  const Products products = gram.products();
  if (products == Products::terms && product_terms(block) == 0) return false;
  double smallest = 0;
  const double trace = block.capacitance() ? gram.subtract(block, removed, l) : gram.extract(where, l);
  const double rounding = block.capacitance() ? gram.rounding() : rounding_of(block, trace);
  if (products == Products::terms && !products_are_normal(block, trace)) return false;
  if (!factor_products(block, products, rounding, l, smallest)) return false;
  precision = precision_of(block, products, smallest, trace, rounding);
  return true;
}

}  // namespace mfac::cpu
