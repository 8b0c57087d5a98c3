// One block of the Fisher, and what all ops do with it.
//
//   capacitance side   A = mλ I + G Gᵀ, [m, m]      F⁻¹ x = (x - Gᵀ A⁻¹ G x) / λ
//   Fisher side        A = mλ I + GᵀG,  [n, n]      F⁻¹ x = m A⁻¹ x
//
// with n the number of columns in use. The Fisher side is taken for n <= m. (At m = n the rows may span all directions,
// and the difference in the first line cancels in each of them.) Where the diagonal of F⁻¹ is needed, it is taken for
// more (prefer_fisher_side). A = L Lᵀ is float64 whatever the gradients are.
#pragma once

#include <cstdio>
#include <limits>
#include <stdexcept>

#include "../numerics.h"
#include "bf16_products.h"
#include "cholesky.h"

namespace mfac::cpu {

// Lower triangle of a[n, n] += Gram matrix of the smaller side over [begin, end) of the longer one; products in T, sums
// over more than kDepth of them in float64.
template <typename T, typename G>
void add_gram(const Block<G>& block, int64_t begin, int64_t end, double* a) {
  const bool capacitance = block.capacitance();
  const int64_t n = block.order(), panels = ceil_div(n, kPanel<T>);
  Buffer<T> packed(panels * kPanel<T> * std::min(kDepth, end - begin));
  for (int64_t k = begin; k < end; k += kDepth) {
    const int64_t depth = std::min(kDepth, end - k);
    if (capacitance)
      parallel_for(panels, depth * kPanel<T>, [&](int64_t j) {
        pack_columns<T>(block, j * kPanel<T>, k, depth, panel_width<T>(n, j), packed + j * depth * kPanel<T>);
      });
    else
      parallel_for(panels, depth * kPanel<T>, [&](int64_t j) {
        pack_rows<T>(block, k, depth, j * kPanel<T>, panel_width<T>(n, j), block.last() ? 0 : block.width,
                     packed + j * depth * kPanel<T>);
      });
    gram<T>(packed, n, depth, 1.0, a, n, panel_width<T>(n, panels - 1));
  }
}

// Lower triangle of a[n, n] = ridge I + Gram matrix of the smaller side. A long side is cut into up to kMaxSlices
// slices, which run in parallel, each with a sum of its own. Products in T, or in `bf16_terms`. Returns the trace, an
// upper bound of the largest eigenvalue.
template <typename T, typename G>
double gram_block(const Block<G>& block, double ridge, double* a, int bf16_terms = 0) {
  constexpr int64_t kMaxSlices = 8;         // their sums take 16 MiB at most
  constexpr int64_t kMinSlice = 1 << 14;    // terms: adding the sums of the slices then costs little
  constexpr int64_t kMaxSlicedOrder = 512;  // a larger matrix has enough work for the threads without slices
  const int64_t n = block.order(), terms = block.terms();
  const int64_t slices = n <= kMaxSlicedOrder ? std::clamp<int64_t>(terms / kMinSlice, 1, kMaxSlices) : 1;
  const auto add = [&](int64_t begin, int64_t end, double* sum) {
    if (bf16_terms > 0)
      add_gram_terms(block, begin, end, bf16_terms, sum);
    else
      add_gram<T>(block, begin, end, sum);
  };
  std::fill_n(a, n * n, 0.0);
  if (slices == 1) {
    add(0, terms, a);
  } else {
    const int64_t length = round_up(ceil_div(terms, slices), bf16_terms > 0 ? kTileDepth * kTileTerms : kDepth);
    Buffer<double> sums(slices * n * n);
    parallel_for(slices, n * n * length, [&](int64_t s) {
      std::fill_n(sums + s * n * n, n * n, 0.0);
      add(s * length, std::min(terms, (s + 1) * length), sums + s * n * n);
    });
    for (int64_t s = 0; s < slices; ++s)
      for (int64_t i = 0; i < n * n; ++i) a[i] += sums[s * n * n + i];
  }
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += a[i * n + i] += ridge;
  return trace;
}

// λ [F⁻¹]_ii = 1 - ‖L⁻¹ g_i‖² is small for a weight that the data constrain far more than λ does: below this, float32
// leaves too few digits of the difference.
constexpr double kCancellation = 0.2;

// The gradients for ops that need the diagonal of F⁻¹, with blocks of up to m / (1 - kCancellation) columns in use on
// the Fisher side. The mean of λ [F⁻¹]_ii is 1 - m/n where λ is small: up to that n it is below kCancellation, and most
// columns would be solved twice on the capacitance side, in float32 and in float64.
template <typename G>
Gradients<G> prefer_fisher_side(Gradients<G> grads) {
  grads.fisher_columns = static_cast<int64_t>(static_cast<double>(grads.m) / (1 - kCancellation));
  return grads;
}

// The largest condition numbers at which float32 leaves four digits. Rounding errors of the float32 products of
// gram_block are some 2e-8 of A's mean diagonal in each element where sums are long, kLongSum and more terms, and
// independent of each other, hence 2e-8 trace(A)/√n in norm, and change ‖L⁻¹ g‖² by up to that norm over the smallest
// eigenvalue μ. Those of a float32 substitution change it by 6e-8 √(trace(A)/μ). Both bounds, over kCancellation, are
// 1e-4. Those of float64 products are 2⁻²⁹ of float32 ones.
constexpr double kProductRange = 1000, kExactFactor = 0x1p29, kSolveRange = 1e5, kLongSum = 512;

// On the capacitance side ‖L⁻¹ g‖² = gᵀA⁻¹g changes by vᵀEv, v = A⁻¹g, for which errors E that are independent of each
// other are √n smaller than their norm: the condition number may go up to kRandomRange n. Measured at that limit
// against float64 on random, positive, sparse, scaled, nearly parallel and low-rank gradients and on those of a ResNet,
// m from 33 to 512: what is left of 1 - ‖L⁻¹ g‖² above kCancellation is wrong by 5e-5 at most. A joint update may be
// wrong by 6e-4 of its norm, where few columns dominate all sums, and is therefore refined (joint.h). Gradients of a
// trained network have a μ hardly above the ridge: with the default damping and block size nearly all blocks are within
// this range, and a third of them outside of the one above.
constexpr double kRandomRange = 200;

// The same for bfloat16 products, whose float32 sums are up to 256 terms long, and a factor of float32 columns:
// kTermsRange n on the capacitance side and kTermsRange n / 3 on the other. Measured in the same way with AMX:
// 1 - ‖L⁻¹ g‖² is then wrong by 4e-5 at most, and ‖L⁻¹ e_i‖² by 7e-5. (With e_i for g, vᵀEv is the largest of n errors,
// those of the diagonal.)
constexpr double kTermsRange = 300;

// bfloat16 products flush numbers below 2⁻¹²⁶ to zero: mean squares of gradients below this, 2²⁶ times as large, are
// left to float32.
constexpr double kMinMeanSquare = 0x1p-100;

// The products that an A was computed with: float32, float64, or bfloat16 terms.
enum class Products { none, single, exact, terms };

// The default of `observe`, below.
struct NoObserver {
  void operator()(const double*, Products, double) const {}
};

// The size of the rounding errors of A, as the trace of a matrix of long sums that would have the same errors. In sums
// of fewer terms the elements off the diagonal, and so their errors, are larger relative to the trace.
template <typename G>
double rounding_of(const Block<G>& block, double trace) {
  return trace / std::sqrt(std::min(1.0, static_cast<double>(block.terms()) / kLongSum));
}

// Thrown for a block; for_each_block says which.
struct NoFactor {};

// Factor by float64 products. If rounding makes A indefinite (a condition number past 1e15), a jitter is added to the
// ridge: the rounding error of A, the least change that is not lost, then ten times as much at each further attempt.
// Calls observe(A, Products::exact, rounding_of A) before A becomes L, if there is no jitter. Returns the trace of A.
template <typename G, typename F = NoObserver>
double factor_double(const Block<G>& block, double* l, const F& observe = {}) {
  double jitter = 0;
  for (int attempt = 0; attempt < kFactorAttempts; ++attempt) {
    const double trace = gram_block<double>(block, block.ridge() + jitter, l);
    if (jitter == 0) observe(l, Products::exact, rounding_of(block, trace));
    if (cholesky(l, block.order(), block.order()) > 0) return trace;
    jitter = std::max(jitter * 10, std::numeric_limits<double>::epsilon() * trace);
  }
  throw NoFactor();
}

// Whether bfloat16 products of the gradients, given the trace of A, are normal numbers.
template <typename G>
bool products_are_normal(const Block<G>& block, double trace) {
  const double elements = static_cast<double>(block.grads.m) * static_cast<double>(block.size());
  return trace - static_cast<double>(block.order()) * block.ridge() >= kMinMeanSquare * elements;
}

// The largest condition number of A that such products allow, with long sums.
template <typename G>
double product_range(const Block<G>& block, Products products) {
  const double n = static_cast<double>(block.order());
  if (products == Products::terms) return (block.capacitance() ? 1 : 1.0 / 3) * kTermsRange * n;
  const double range = std::max(kProductRange * std::sqrt(n), block.capacitance() ? kRandomRange * n : 0);
  return products == Products::exact ? kExactFactor * range : range;
}

// Factors A, computed with these products and rounding errors (rounding_of), in place. False if the products are not
// precise enough. `smallest` becomes an estimate of the smallest eigenvalue, or 0. The ridge is a lower bound of it,
// which for float32 and bfloat16 is mostly sufficient.
template <typename G>
bool factor_products(const Block<G>& block, Products products, double rounding, double* l, double& smallest) {
  const int64_t n = block.order();
  const double range = product_range(block, products), ridge = block.ridge();
  smallest = 0;
  const double pivot = products == Products::terms ? cholesky<float>(l, n, n) : cholesky(l, n, n);
  if (pivot > 0)
    smallest = products != Products::exact && ridge * range >= rounding ? ridge : smallest_eigenvalue(l, n);
  return smallest * range >= rounding;
}

struct Precision {
  bool exact_factor;  // from float64 products
  bool float_solve;   // float32 is precise enough for substitutions with it
  bool refine;        // A⁻¹ x is to be refined by a residual: errors of A that few columns dominate are not independent
  int terms;          // bfloat16 terms of G in the products; 0: not from bfloat16
  double smallest;    // estimate of the smallest eigenvalue of A
};

template <typename G>
Precision precision_of(const Block<G>& block, Products products, double smallest, double trace, double rounding) {
  const int terms = products == Products::terms ? product_terms(block) : 0;
  const double range = kProductRange * std::sqrt(static_cast<double>(block.order()));
  const bool refine = products == Products::terms || (products == Products::single && smallest * range < rounding);
  return {products == Products::exact, smallest * kSolveRange >= trace, refine, terms, smallest};
}

// Cholesky factor of A into l[n, n] (row-major, lower triangle; above it zero), from bfloat16 products if the precision
// permits them and they are good enough, else from float32 ones, else from float64 ones. Calls observe(A, its products,
// its rounding errors) before each A becomes L: the last one is the A that is used.
template <typename G, typename F = NoObserver>
Precision factor_block(const Block<G>& block, double* l, const F& observe = {}) {
  double smallest = 0;
  bool single = true;  // whether float32 products may be good enough
  if (const int terms = product_terms(block)) {
    const double trace = gram_block<float>(block, block.ridge(), l, terms), rounding = rounding_of(block, trace);
    if (products_are_normal(block, trace)) {
      observe(l, Products::terms, rounding);
      if (factor_products(block, Products::terms, rounding, l, smallest))
        return precision_of(block, Products::terms, smallest, trace, rounding);
      single = smallest * product_range(block, Products::single) >= rounding;
    }
  }
  if (single) {
    const double trace = gram_block<float>(block, block.ridge(), l), rounding = rounding_of(block, trace);
    observe(l, Products::single, rounding);
    if (factor_products(block, Products::single, rounding, l, smallest))
      return precision_of(block, Products::single, smallest, trace, rounding);
  }
  const double trace = factor_double(block, l, observe);
  return precision_of(block, Products::exact, smallest_eigenvalue(l, block.order()), trace, 0);
}

// The two passes over a block, G x and Gᵀ t, are bound by the memory: the first prefetches the rows that it comes to
// next, the second finds the block in the cache, if it fits. Both take kRowsAtOnce rows at a time, so that a vector is
// read, or written, once for all of them, kStrip columns each, which with a vector's 4 KiB stay in L1.
constexpr int64_t kStrip = 512;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kStepColumns = 2 * kLanes<double>;  // with AVX-512 a cache line of float32 of each row

// out[i] += sum_c G[r + i, c0 + c] x[c] for i < rows, c < columns. `ahead`: prefetch the rows that far below these.
template <int rows, typename G>
void dot_rows(const Block<G>& block, int64_t r, int64_t c0, int64_t columns, const double* x, int64_t ahead,
              double* out) {
  constexpr int64_t lanes = kLanes<double>;
  const G* source[rows];
  for (int i = 0; i < rows; ++i) source[i] = block.row(r + i) + c0;
  const int64_t next = ahead * block.grads.stride;
  Vector<double> sums[rows][2] = {};  // independent sums hide the latency of additions
  int64_t c = 0;
  for (; c + kStepColumns <= columns; c += kStepColumns) {
    if (ahead)
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) __builtin_prefetch(source[i] + next + c, 0, 2);
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const Vector<double> values = load<double>(x + c + u * lanes);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) sums[i][u] += load<double>(source[i] + c + u * lanes) * values;
    }
  }
  for (int i = 0; i < rows; ++i) {
    const Vector<double> sum = sums[i][0] + sums[i][1];
    double total = 0;
    for (int64_t v = 0; v < lanes; ++v) total += sum[v];
    for (int64_t k = c; k < columns; ++k) total += convert<double>(source[i][k]) * x[k];
    out[i] += total;
  }
}

// t[v][r] = sum_c G[r, c] x[v][c] for `count` vectors x[count, width], over all columns of the block, in float64. One
// read of G.
template <typename G>
void multiply_rows(const Block<G>& block, const double* x, int64_t count, double* t) {
  const int64_t m = block.grads.m, width = block.width;
  parallel_for(ceil_div(m, kRowsAtOnce), kRowsAtOnce * width * count, [&](int64_t task) {
    const int64_t r = task * kRowsAtOnce, rows = std::min<int64_t>(kRowsAtOnce, m - r);
    const int64_t ahead = r + 2 * kRowsAtOnce <= m ? kRowsAtOnce : 0;
    for (int64_t v = 0; v < count; ++v) std::fill_n(t + v * m + r, rows, 0.0);
    for (int64_t c = 0; c < width; c += kStrip)
      for (int64_t v = 0; v < count; ++v) {
        const int64_t columns = std::min(kStrip, width - c);
        const double* part = x + v * width + c;
        double* sums = t + v * m + r;
        if (rows == kRowsAtOnce)
          dot_rows<kRowsAtOnce>(block, r, c, columns, part, v == 0 ? ahead : 0, sums);
        else
          for (int64_t i = 0; i < rows; ++i) dot_rows<1>(block, r + i, c, columns, part, 0, sums + i);
      }
  });
}

// out[c] += sum_i scale[i] * G[r + i, c0 + c], i < rows, c < columns.
template <int rows, typename G>
void add_rows(const Block<G>& block, int64_t r, int64_t c0, int64_t columns, const double* scale, double* out) {
  constexpr int64_t lanes = kLanes<double>;
  const G* source[rows];
  Vector<double> factor[rows];
  for (int i = 0; i < rows; ++i) {
    source[i] = block.row(r + i) + c0;
    factor[i] = Vector<double>{} + scale[i];
  }
  int64_t c = 0;
  for (; c + kStepColumns <= columns; c += kStepColumns) {
#pragma GCC unroll 2
    for (int64_t u = c; u < c + kStepColumns; u += lanes) {
      Vector<double> sum = load<double>(out + u);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) sum += factor[i] * load<double>(source[i] + u);
      std::memcpy(out + u, &sum, sizeof sum);
    }
  }
  for (; c < columns; ++c)
    for (int i = 0; i < rows; ++i) out[c] += factor[i][0] * convert<double>(source[i][c]);
}

// x[v][c] = sum_r G[r, c] t[v][r] for `count` vectors t[count, m], for all columns of the block, in float64. One read
// of G.
template <typename G>
void multiply_columns(const Block<G>& block, const double* t, int64_t count, double* x) {
  const int64_t m = block.grads.m, width = block.width;
  parallel_for(ceil_div(width, kStrip), kStrip * m * count, [&](int64_t s) {
    const int64_t c0 = s * kStrip, columns = std::min(kStrip, width - c0);
    for (int64_t v = 0; v < count; ++v) std::fill_n(x + v * width + c0, columns, 0.0);
    int64_t r = 0;
    for (; r + kRowsAtOnce <= m; r += kRowsAtOnce)
      for (int64_t v = 0; v < count; ++v)
        add_rows<kRowsAtOnce>(block, r, c0, columns, t + v * m + r, x + v * width + c0);
    for (; r < m; ++r)
      for (int64_t v = 0; v < count; ++v) add_rows<1>(block, r, c0, columns, t + v * m + r, x + v * width + c0);
  });
}

// out = F⁻¹ x for `count` vectors x and out [count, width], with L of the block's A in l (row stride ldl). Columns not
// in use are those of F = λ I. Two passes over G on the capacitance side, of which the second finds it in the cache;
// none on the Fisher side.
template <typename G>
void apply_inverse(const Block<G>& block, const double* l, int64_t ldl, const double* x, int64_t count, double* out) {
  const double damping = block.grads.damping;
  const int64_t m = block.grads.m, n = block.order(), size = block.size(), width = block.width;
  for (int64_t i = 0; i < count * width; ++i) out[i] = x[i] / damping;
  if (n == 0) return;
  if (block.capacitance()) {
    Buffer<double> used(count * width), t(count * m);
    std::fill_n(static_cast<double*>(used), count * width, 0.0);
    for (int64_t v = 0; v < count; ++v)
      for (int64_t c = 0; c < size; ++c) used[v * width + block.column(c)] = x[v * width + block.column(c)];
    multiply_rows(block, used, count, t);
    for (int64_t v = 0; v < count; ++v) cholesky_solve(l, n, ldl, t + v * m);
    multiply_columns(block, t, count, used);
    for (int64_t v = 0; v < count; ++v)
      for (int64_t c = 0; c < size; ++c)
        out[v * width + block.column(c)] -= used[v * width + block.column(c)] / damping;
  } else {
    Buffer<double> t(n);
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t c = 0; c < size; ++c) t[c] = x[v * width + block.column(c)];
      cholesky_solve(l, n, ldl, t);
      for (int64_t c = 0; c < size; ++c) out[v * width + block.column(c)] = t[c] * static_cast<double>(m);
    }
  }
}

// Runs f(block index) for every block: blocks in parallel when there are enough of them to keep the threads busy, else
// one after another with the threads inside. Either way the arithmetic of a block has the same order.
template <typename G, typename F>
void for_each_block(const Gradients<G>& grads, const F& f) {
  const int64_t count = grads.blocks();
  const auto checked = [&](int64_t index) {
    try {
      f(index);
    } catch (const NoFactor&) {
      char text[200];
      std::snprintf(
          text, sizeof text,
          "grads: expected rows whose block %lld (m=%lld gradients, damping %g) has a Cholesky factor, got NaN or "
          "infinity in it",
          static_cast<long long>(index), static_cast<long long>(grads.m), grads.damping);
      throw std::runtime_error(text);
    }
  };
  if (count >= 4 * num_threads())
    parallel_for(count, grads.m * grads.block_size * std::min(grads.m, grads.block_size), checked);
  else
    for (int64_t b = 0; b < count; ++b) checked(b);
}

}  // namespace mfac::cpu
