// The gradients as the kernels read them: a block of columns of G[m, d], and the two ways in which a piece of it is
// packed into panels (microkernels.h). G is converted and packed while it is read; a second [m, columns] matrix exists
// only for columns with gaps between them, and only if it is small (PackedColumns).
//
// Rows of a block are far apart in memory, which defeats the hardware prefetcher: code that works on a piece prefetches
// the next one.
#pragma once

#include <vector>

#include "microkernels.h"

namespace mfac::cpu {

// What every op receives, row-major.
template <typename G>
struct Gradients {
  const G* data;  // [m, d], rows `stride` elements apart
  int64_t m, d, stride;
  double damping;              // λ
  int64_t block_size;          // B columns per block, the last block may have fewer
  int terms = 0;               // bfloat16 terms per float32 gradient permitted in large products; 0: float32 products
  int64_t fisher_columns = m;  // blocks with up to this many columns in use are on the Fisher side

  int64_t blocks() const { return ceil_div(d, block_size); }
  int64_t order() const { return std::min({m, block_size, d}); }  // of the largest factor
};

// The columns of one block that are in use: all of them, or those where mask[i] == keep.
template <typename G>
struct Block {
  const Gradients<G>& grads;
  int64_t begin, width;
  bool dense = true;
  std::vector<int32_t> columns;  // positions within the block, ascending; empty if dense

  Block(const Gradients<G>& g, int64_t index, const bool* mask = nullptr, bool keep = true)
      : grads(g), begin(index * g.block_size), width(std::min(g.block_size, g.d - begin)) {
    if (!mask) return;
    const int64_t used = std::count(mask + begin, mask + begin + width, keep);
    if (used == width) return;
    dense = false;
    columns.reserve(used);
    for (int64_t c = 0; c < width; ++c)
      if (mask[begin + c] == keep) columns.push_back(static_cast<int32_t>(c));
  }
  Block(const Gradients<G>& g, int64_t index, std::vector<int32_t> chosen)
      : grads(g),
        begin(index * g.block_size),
        width(std::min(g.block_size, g.d - begin)),
        dense(false),
        columns(std::move(chosen)) {}
  int64_t size() const { return dense ? width : static_cast<int64_t>(columns.size()); }
  int64_t column(int64_t c) const { return dense ? c : columns[c]; }
  const G* row(int64_t r) const { return grads.data + r * grads.stride + begin; }
  bool last() const { return begin + width == grads.d; }
  bool capacitance() const { return grads.fisher_columns < size(); }
  int64_t order() const { return capacitance() ? grads.m : size(); }  // of A
  int64_t terms() const { return capacitance() ? size() : grads.m; }  // of a sum that is an element of A
  double ridge() const { return static_cast<double>(grads.m) * grads.damping; }
};

// The columns in use of a block. If there are others between them, copy_row packs them into a copy [m, size], so that
// later passes find them contiguous and in the cache; unless the copy is too large for that.
template <typename G>
class PackedColumns {
 public:
  explicit PackedColumns(const Block<G>& block)
      : source_(block),
        copied_(!block.dense && block.grads.m * block.size() * static_cast<int64_t>(sizeof(G)) <= kMaxBytes),
        copy_(copied_ ? block.grads.m * block.size() : 0),
        grads_{copy_,
               block.grads.m,
               block.size(),
               block.size(),
               block.grads.damping,
               block.size(),
               block.grads.terms,
               block.grads.fisher_columns},
        block_(copied_ ? Block<G>(grads_, 0) : block) {}
  PackedColumns(const PackedColumns&) = delete;  // block_ refers to grads_
  bool copied() const { return copied_; }
  void copy_row(int64_t r) const {
    const G* row = source_.row(r);
    G* out = copy_ + r * source_.size();
    for (const int32_t c : source_.columns) *out++ = row[c];
  }
  const Block<G>& block() const { return block_; }

 private:
  static constexpr int64_t kMaxBytes = 16 << 20;  // of a copy, one per thread: a larger one would not stay in the cache
  const Block<G>& source_;
  bool copied_;
  Buffer<G> copy_;
  Gradients<G> grads_;
  Block<G> block_;
};

// out[r][c] = G[r0 + r, column c0 + c] for r < rows, c < width (up to kPanel), columns in use; 0 past the last of them.
// `ahead`: prefetch what lies that many columns further.
template <typename T, typename G>
void pack_rows(const Block<G>& block, int64_t r0, int64_t rows, int64_t c0, int64_t width, int64_t ahead, T* out) {
  const int64_t columns = std::min(width, block.size() - c0);
  if (!block.dense || block.begin + c0 + width > block.grads.d) {
    for (int64_t r = 0; r < rows; ++r, out += width) {
      const G* row = block.row(r0 + r);
      for (int64_t c = 0; c < columns; ++c) out[c] = convert<T>(row[block.column(c0 + c)]);
      std::fill(out + columns, out + width, T(0));
    }
    return;
  }
  // Rows are far apart, and few instructions for each let the processor wait for many of them at once.
  with_vectors(width / kLanes<T>, [&]<int kUsed>(std::integral_constant<int, kUsed>) {
    for (int64_t r = 0; r < rows; ++r, out += kUsed * kLanes<T>) {
      const G* row = block.row(r0 + r) + c0;
      if (ahead) prefetch(row + ahead, columns);
#pragma GCC unroll 3
      for (int v = 0; v < kUsed; ++v) {
        const Vector<T> values = load<T>(row + v * kLanes<T>);  // of the last vector some are past the block
        reinterpret_cast<Vector<T>*>(out)[v] = v + 1 < kUsed ? values : first_of<T>(values, columns - v * kLanes<T>);
      }
    }
  });
}

// out[c][r] = source[r][c] for kLanes<T> rows of `depth` elements; out has the row stride `width`.
template <typename T, typename G>
void transpose_rows(const G* const (&source)[kLanes<T>], int64_t depth, int64_t width, T* out) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= depth; c += lanes) {
    Vector<T> square[lanes];
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) square[r] = load<T>(source[r] + c);
    transpose<T>(square);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) *reinterpret_cast<Vector<T>*>(out + (c + r) * width) = square[r];
  }
  for (; c < depth; ++c)
    for (int r = 0; r < lanes; ++r) out[c * width + r] = static_cast<T>(static_cast<float>(source[r][c]));
}

// A panel of `width` rows from r0 on, transposed: out[c][r] = G[r0 + r, column c0 + c], c < depth <= kDepth, 0 past the
// last row.
template <typename T, typename G>
void pack_columns(const Block<G>& block, int64_t r0, int64_t c0, int64_t depth, int64_t width, T* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t v = 0; v < width; v += lanes, r0 += lanes, out += lanes) {
    const int64_t rows = std::clamp<int64_t>(block.grads.m - r0, 0, lanes);
    if (block.dense) {
      static const G zeros[kDepth] = {};
      const G* source[lanes];
      for (int r = 0; r < lanes; ++r) source[r] = r < rows ? block.row(r0 + r) + c0 : zeros;
      if (c0 + depth < block.width || !block.last())
        for (int64_t r = 0; r < rows; ++r) prefetch(source[r] + depth, depth);
      transpose_rows<T>(source, depth, width, out);
    } else {
      alignas(64) T gathered[lanes][kDepth];
      const T* source[lanes];
      for (int r = 0; r < lanes; ++r) {
        source[r] = gathered[r];
        if (r < rows)
          for (int64_t c = 0; c < depth; ++c) gathered[r][c] = convert<T>(block.row(r0 + r)[block.columns[c0 + c]]);
        else
          std::fill_n(gathered[r], depth, T(0));
      }
      transpose_rows<T>(source, depth, width, out);
    }
  }
}

}  // namespace mfac::cpu
