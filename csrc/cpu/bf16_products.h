// The two large products of a block by bfloat16 instructions (bf16.h): the Gram matrix, and L⁻¹ G for the diagonal.
//
// A number enters as a sum of bfloat16 terms, each the rounding of what the terms before leave: gradients of bfloat16
// are one term, exactly. Products of terms whose size is below the rounding of the last term are left out.
#pragma once

#include "bf16.h"
#include "gradients.h"

namespace mfac::cpu {

constexpr int kMaxTerms = 3;  // of 8 bits each: the 24 bits of a float32

using Words = VectorN<uint32_t, kTile>;  // a row of a tile
using Floats = VectorN<float, kTile>;

// Terms per gradient in bfloat16 products, 0 where they would not be faster than float32 ones: small matrices, which do
// not fill the tiles, and float32 gradients where splitting them costs more than the products save (measured with AMX).
template <typename G>
int product_terms(const Block<G>& block) {
  constexpr bool exact = std::is_same_v<G, BFloat16>;
  const int terms = exact ? 1 : block.grads.terms;
  if (bf16_path() == BFloat16Path::none || block.order() < (exact ? 32 : 64 * terms)) return 0;
  if (terms > 1 && (bf16_path() == BFloat16Path::avx512 || !block.capacitance())) return 0;
  return terms;
}

// Whether L⁻¹ G is a bfloat16 product too: with two or three terms of L⁻¹, and as many times the work, only AMX is
// faster than a float32 substitution.
template <typename G>
bool inverse_by_products(const Block<G>& block) {
  return block.capacitance() && bf16_path() != BFloat16Path::avx512;
}

// out[t][i], i < kTileTerms: term t of x[i], rounded to nearest even; terms are `stride` elements apart.
inline void split(const float* x, int terms, uint16_t* out, int64_t stride) {
  for (int64_t i = 0; i < kTileTerms; i += kTile) {
    Floats rest;
    std::memcpy(&rest, x + i, sizeof rest);
    for (int t = 0; t < terms; ++t) {
      const Words bits = (Words)rest, term = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      const auto half = __builtin_convertvector(term, VectorN<uint16_t, kTile>);
      std::memcpy(out + t * stride + i, &half, sizeof half);
      rest -= (Floats)(term << 16);
    }
  }
}

template <typename G>
[[gnu::noinline]] void gather(const Block<G>& block, int64_t r, int64_t c0, G (&out)[kTileTerms]) {
  std::memset(out, 0, sizeof out);
  if (r < block.grads.m)
    for (int64_t c = 0; c < std::min(block.size() - c0, kTileTerms); ++c) out[c] = block.row(r)[block.column(c0 + c)];
}

// Terms of G[r, column c0 + i], i < kTileTerms, 0 outside of the block. Term t is at t * kTileTerms of the pointer
// returned, which points into G itself or to `scratch`.
template <typename G>
[[gnu::always_inline]] inline const uint16_t* load_terms(const Block<G>& block, int64_t r, int64_t c0, int terms,
                                                         uint16_t* scratch) {
  const bool inside = block.dense && r < block.grads.m && c0 + kTileTerms <= block.width;
  if constexpr (std::is_same_v<G, BFloat16>) {
    if (inside) return &block.row(r)[c0].bits;
    gather(block, r, c0, reinterpret_cast<G(&)[kTileTerms]>(*scratch));
  } else if (inside) {
    split(block.row(r) + c0, terms, scratch, kTileTerms);
  } else {
    G gathered[kTileTerms];
    gather(block, r, c0, gathered);
    split(gathered, terms, scratch, kTileTerms);
  }
  return scratch;
}

inline void transpose_tile(const uint32_t* in, uint32_t* out) {
  transpose_copy<float>(reinterpret_cast<const float*>(in), kTile, kTile, kTile, reinterpret_cast<float*>(out), kTile);
}

// Left tiles of rows r0 .. r0 + kTile of G, columns c0 on, for each term: out[t * stride + tile * kTileWords].
template <typename G>
void pack_left(const Block<G>& block, int64_t r0, int64_t c0, int64_t tiles, int terms, uint32_t* out, int64_t stride) {
  uint16_t scratch[kMaxTerms * kTileTerms];
  for (int64_t r = 0; r < kTile; ++r) {
    if (block.dense && r0 + r < block.grads.m && (c0 + tiles * kTileTerms < block.width || !block.last()))
      prefetch(block.row(r0 + r) + c0 + tiles * kTileTerms, tiles * kTileTerms);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint16_t* source = load_terms(block, r0 + r, c0 + tile * kTileTerms, terms, scratch);
      for (int t = 0; t < terms; ++t)
        std::memcpy(out + t * stride + tile * kTileWords + r * kTile, source + t * kTileTerms, 64);
    }
  }
}

// Right tiles of two strips, columns c0 .. c0 + kSquare of G, rows r0 on: term t, strip s and tile are at
// out[t * stride + s * next + tile * kTileWords].
template <typename G>
void pack_right(const Block<G>& block, int64_t r0, int64_t c0, int64_t tiles, int terms, uint32_t* out, int64_t stride,
                int64_t next) {
  uint16_t scratch[2][kMaxTerms * kTileTerms];
  for (int64_t p = 0; p < tiles * kTile; ++p) {
    const uint16_t* first = load_terms(block, r0 + 2 * p, c0, terms, scratch[0]);
    const uint16_t* second = load_terms(block, r0 + 2 * p + 1, c0, terms, scratch[1]);
    for (int t = 0; t < terms; ++t)
      for (int64_t s = 0; s < 2; ++s, first += kTile, second += kTile) {
        uint32_t* pairs = out + t * stride + s * next + p * kTile;
        VectorN<uint16_t, kTile> low, high;
        std::memcpy(&low, first, sizeof low);
        std::memcpy(&high, second, sizeof high);
        const Words words = __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
        std::memcpy(pairs, &words, sizeof words);
      }
  }
}

// The products of left terms a and right terms b with a + b < orders, as operands at `left` and `right`, term by term.
inline int term_products(const uint32_t* left, int64_t left_stride, int left_terms, const uint32_t* right,
                         int64_t right_stride, int right_terms, TileOperands* out) {
  const int orders = std::max(left_terms, right_terms);
  int count = 0;
  for (int a = 0; a < left_terms; ++a)
    for (int b = 0; b < right_terms && a + b < orders; ++b)
      out[count++] = {left + a * left_stride, right + b * right_stride};
  return count;
}

// Tiles along the depth of a product, 256 terms, before its float32 sums are added in float64: enough that the addition
// costs less than the product, and few enough for the error bound kTermsRange of block.h.
constexpr int64_t kTileDepth = 8;

// Lower triangle of a[n, n] += Gram matrix of the smaller side over [begin, end) of the longer one (as add_gram of
// block.h).
template <typename G>
void add_gram_terms(const Block<G>& block, int64_t begin, int64_t end, int terms, double* a) {
  const bool capacitance = block.capacitance();
  const int64_t n = block.order(), squares = ceil_div(n, kSquare), next = kTileDepth * kTileWords;
  const int64_t stride = squares * 2 * next;  // from term to term
  Buffer<uint32_t> left(terms * stride), right(terms * stride);
  for (int64_t k = begin; k < end; k += kTileDepth * kTileTerms) {
    const int64_t tiles = std::min(kTileDepth, ceil_div(end - k, kTileTerms));
    parallel_for(squares, tiles * kTileTerms * kSquare, [&](int64_t i) {
      uint32_t *own_left = left + i * 2 * next, *own_right = right + i * 2 * next;
      if (capacitance)
        for (int64_t s = 0; s < 2; ++s)
          pack_left(block, i * kSquare + s * kTile, k, tiles, terms, own_left + s * next, stride);
      else
        pack_right(block, k, i * kSquare, tiles, terms, own_right, stride, next);
      for (int t = 0; t < terms; ++t)
        for (int64_t s = 0; s < 2; ++s)
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t at = t * stride + s * next + tile * kTileWords;
            if (capacitance)
              transpose_tile(own_left + at, own_right + at);
            else
              transpose_tile(own_right + at, own_left + at);
          }
    });
    const auto row_of_squares = [&](int64_t i) {
      const TileRegisters registers;
      alignas(64) float sums[kSquare * kSquare];
      for (int64_t j = 0; j <= i; ++j) {
        TileOperands operands[kMaxTerms * kMaxTerms];
        const int count =
            term_products(left + i * 2 * next, stride, terms, right + j * 2 * next, stride, terms, operands);
        const int64_t rows = std::min(kSquare, n - i * kSquare);
        double* out = a + i * kSquare * n + j * kSquare;
        for (int64_t r = 0; r < rows; ++r) prefetch(out + r * n, kSquare);
        multiply_tiles(operands, count, next, next, tiles, sums);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t columns = j < i ? kSquare : r + 1;
          if (columns == kSquare)
            for (int64_t c = 0; c < kSquare; c += kLanes<double>) {
              const Vector<double> sum = load<double>(out + r * n + c) + load<double>(sums + r * kSquare + c);
              std::memcpy(out + r * n + c, &sum, sizeof sum);
            }
          else
            for (int64_t c = 0; c < columns; ++c) out[r * n + c] += static_cast<double>(sums[r * kSquare + c]);
        }
      }
    };
    parallel_for(ceil_div(squares, 2), n * kSquare * tiles * kTile, [&](int64_t task) {
      row_of_squares(task);
      if (squares - 1 - task != task) row_of_squares(squares - 1 - task);
    });
  }
}

// Two terms of L⁻¹ have rounding errors of 1.6e-6 of each element (RMS), independent of each other. They change
// ‖y‖², y = L⁻¹ g, ‖y‖ < 1, by 2 · 1.6e-6 √(Σ_r y_r² Σ_j (L⁻¹)²_rj g_j²) <= 3.2e-6 max|g_j| / √μ, μ the smallest
// eigenvalue of L Lᵀ: by 2e-5 at most, 1e-4 of what is left of 1 - ‖y‖² above kCancellation, where max g_j² is below
// kTwoTerms μ.
constexpr double kTwoTerms = 40;

// L⁻¹ of a lower triangular L[n, n], in `terms` bfloat16 terms, as left tiles: two strips for each kSquare rows, up to
// the diagonal.
class InverseTiles {
 public:
  // `smallest`: eigenvalue of L Lᵀ.
  InverseTiles(const Triangle<float>& l, int64_t n, int terms, double smallest)
      : n_(n),
        terms_(terms),
        two_terms_(kTwoTerms * smallest),
        squares_(ceil_div(n, kSquare)),
        data_(terms * term_words()) {
    constexpr int64_t width = kPanel<float>;
    const int64_t padded = round_up(n, kRows), ld = squares_ * kSquare;
    Buffer<float> inverse(ld * ld);
    std::fill_n(inverse + n * ld, (ld - n) * ld, 0.0f);
    for (int64_t r = ld - kSquare; r < n; ++r) std::fill_n(inverse + r * ld + n, ld - n, 0.0f);
    parallel_for(ceil_div(n, width), n * n * width / 3, [&](int64_t j) {
      Buffer<float> panel(padded * width);
      const int64_t c0 = j * width, columns = std::min(width, n - c0), first = c0 / kSquare * kSquare;
      std::fill(panel + first * width, panel + padded * width, 0.0f);
      for (int64_t c = 0; c < columns; ++c) panel[(c0 + c) * width + c] = 1;
      solve<float>(l, panel, nullptr, c0 / kRows);
      for (int64_t r = first; r < n; ++r) std::copy_n(panel + r * width, columns, inverse + r * ld + c0);
    });
    parallel_for(squares_, n * kSquare * terms, [&](int64_t i) {
      for (int64_t r = 0; r < kSquare; ++r)
        for (int64_t tile = 0; tile <= i; ++tile)
          split(inverse + (i * kSquare + r) * ld + tile * kTileTerms, terms,
                reinterpret_cast<uint16_t*>(data_ + square(i) + r / kTile * next(i) + tile * kTileWords +
                                            r % kTile * kTile),
                2 * term_words());
    });
  }
  int64_t order() const { return n_; }
  int64_t squares() const { return squares_; }
  int64_t next(int64_t i) const { return (i + 1) * kTileWords; }  // from strip to strip of square i, and its depth
  const uint32_t* at(int64_t i) const { return data_ + square(i); }
  int terms() const { return terms_; }
  // Two terms of L⁻¹ are enough for columns whose largest element has a square up to this.
  double two_terms() const { return two_terms_; }
  int64_t term_words() const { return square(squares_); }

 private:
  static int64_t square(int64_t i) { return i * (i + 1) * kTileWords; }
  int64_t n_;
  int terms_;
  double two_terms_;
  int64_t squares_;
  Buffer<uint32_t> data_;
};

// Columns of a product L⁻¹ G at a time: a multiple of the panel width of every instruction set, and enough of them that
// a tile of L⁻¹, once loaded from L2, is used several times.
constexpr int64_t kSolveColumns = 96;
static_assert(kSolveColumns % kPanel<float> == 0 && kSolveColumns % kSquare == 0);

// norms[c] = ‖L⁻¹ g_c‖² for the columns c0 .. c0 + kSolveColumns of a block.
template <typename G>
void solve_terms(const Block<G>& block, const InverseTiles& l, int64_t c0, int terms, float* norms) {
  constexpr int64_t parts = kSolveColumns / kSquare;
  const int64_t tiles = l.squares(), next = tiles * kTileWords, stride = parts * 2 * next;
  Buffer<uint32_t> right(terms * stride);
  std::fill_n(norms, kSolveColumns, 0.0f);
  for (int64_t r = 0; r < l.order(); ++r)
    if (block.dense && c0 + 2 * kSolveColumns <= block.width)
      prefetch(block.row(r) + c0 + kSolveColumns, kSolveColumns);
  for (int64_t part = 0; part < parts; ++part)
    pack_right(block, 0, c0 + part * kSquare, tiles, terms, right + part * 2 * next, stride, next);
  Floats largest = {};
  for (int64_t strip = 0; strip < 2 * parts; ++strip)
    for (int64_t p = 0; p < tiles * kTile; ++p) {
      Floats first = {}, second = {};
      for (int t = 0; t < terms; ++t) {
        Words pairs;
        std::memcpy(&pairs, right + t * stride + strip * next + p * kTile, sizeof pairs);
        first += (Floats)(pairs << 16);
        second += (Floats)(pairs & 0xffff0000u);
      }
      first *= first;
      second *= second;
      largest = first > largest ? first : largest;
      largest = second > largest ? second : largest;
    }
  float most = 0;
  for (int64_t c = 0; c < kTile; ++c) most = std::max(most, largest[c]);
  const int inverse_terms = most <= l.two_terms() ? 2 : l.terms();
  const TileRegisters registers;
  alignas(64) float product[kSquare * kSquare];
  for (int64_t i = 0; i < l.squares(); ++i)
    for (int64_t part = 0; part < parts; ++part) {
      TileOperands operands[kMaxTerms * kMaxTerms];
      const int count =
          term_products(l.at(i), l.term_words(), inverse_terms, right + part * 2 * next, stride, terms, operands);
      multiply_tiles(operands, count, l.next(i), next, i + 1, product);
      for (int64_t c = 0; c < kSquare; c += kLanes<float>) {
        Vector<float> sum = load<float>(norms + part * kSquare + c);
        for (int64_t r = 0; r < kSquare; ++r) {
          const Vector<float> y = load<float>(product + r * kSquare + c);
          sum += y * y;
        }
        std::memcpy(norms + part * kSquare + c, &sum, sizeof sum);
      }
    }
}

}  // namespace mfac::cpu
