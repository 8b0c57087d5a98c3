// Batches of blocks that fit in memory, and what all ops do with a batch: pack its columns, factor its small matrices,
// multiply and solve. It launches the kernels and leaves bfloat16 products to ATen (cuBLAS).
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <product.h>

#include <optional>
#include <vector>

#include "../checks.h"
#include "../numerics.h"
#include "kernels.h"

namespace mfac::cuda {

using at::Tensor;
using c10::cuda::CUDAGuard;
using OptionalTensor = std::optional<Tensor>;

inline Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// The precision of G and L⁻¹ in the large matrix products. The small matrices are always float64.
//   highest   float64, on the tensor cores of the GPUs of data centres; slow on others
//   high      sums of two bfloat16, 16 bits, with float32 sums; G of bfloat16 is exact. Tensor cores; errors near 1e-5
//   medium    one bfloat16, 8 bits; errors near 1e-2
struct Precision {
  Precision(c10::string_view name, const Tensor& grads)
      : exact(name == "highest"),
        factor_parts(name == "high" ? 2 : 1),
        grads_parts(grads.scalar_type() == at::kBFloat16 ? 1 : factor_parts),
        rounding(exact              ? 0x1p-52
                 : grads_parts == 2 ? 0x1p-18
                                    : 0x1p-22) {}
  bool exact;
  int factor_parts, grads_parts;
  // Rounding error of a small matrix over its trace: of float64 sums; of float32 sums and the product left out; of
  // float32 sums.
  double rounding;
};

// A matrix as the sum of its terms: one of float64, or some of bfloat16.
using Terms = std::vector<Tensor>;

inline Terms transposed(const Terms& terms) {
  Terms out;
  for (const Tensor& term : terms) out.push_back(term.transpose(1, 2));
  return out;
}

// Batched products, float64 or float32. Products of terms that are smaller than the rounding error of the last are left
// out.
inline Tensor multiply(const Terms& a, const Terms& b) {
  if (a[0].scalar_type() == at::kDouble) return at::bmm(a[0], b[0]);
  const size_t last = std::max(a.size(), b.size()) - 1;
  Tensor sum;
  for (size_t i = 0; i < a.size(); ++i)
    for (size_t j = 0; j < b.size() && i + j <= last; ++j) {
      const Tensor term = product(a[i], b[j]);
      sum = sum.defined() ? sum.add_(term) : term;
    }
  return sum;
}

inline Terms split(const Tensor& x, const Precision& precision) {
  if (precision.exact) return {x};
  Terms terms{x.to(at::kBFloat16)};
  if (precision.factor_parts > 1) terms.push_back((x - terms[0]).to(at::kBFloat16));
  return terms;
}

// Calls f with the gradients as the kernels see them.
template <typename F>
void dispatch(const Tensor& grads, const F& f) {
  const int64_t m = grads.size(0), d = grads.size(1), stride = grads.stride(0);
  if (grads.scalar_type() == at::kBFloat16)
    f(Gradients<BFloat16>{static_cast<const BFloat16*>(grads.const_data_ptr()), m, d, stride});
  else
    f(Gradients<float>{grads.const_data_ptr<float>(), m, d, stride});
}

// Some blocks of one side, padded to the number of columns in use of the widest.
struct Batch {
  Tensor ids;  // [count] int32
  Tile tile;
  bool capacitance;
  int64_t order;  // of their small matrices
};

struct Factor {
  Tensor l, inverse;  // [count, order, order] float64
};

// G, its partition into blocks of columns, and the columns in use of each.
class Blocks {
 public:
  Blocks(const Tensor& given, double damping, int64_t size, const OptionalTensor& active,
         c10::string_view precision_name = "highest")
      : grads(given.stride(1) == 1 || given.size(1) <= 1 ? given : given.contiguous()),
        m(grads.size(0)),
        d(grads.size(1)),
        block_size(std::max<int64_t>(1, std::min(size, d))),
        count((d + block_size - 1) / block_size),
        ridge(static_cast<double>(m) * damping),
        precision(precision_name, grads),
        limit(temporaries_bytes()),
        layout{d, block_size},
        in_use(count, static_cast<int32_t>(block_size)),
        failed(at::zeros({1}, options(at::kInt))) {
    if (count > 0) in_use.back() = static_cast<int32_t>(d - (count - 1) * block_size);
    if (!active || count == 0) return;
    mask = active->contiguous();
    positions = at::nonzero(mask).squeeze(1);
    offsets = at::searchsorted(positions, at::arange(count + 1, options(at::kLong)) * block_size);
    columns = positions.remainder(block_size).to(at::kInt);
    layout.columns = columns.const_data_ptr<int32_t>();
    layout.offsets = offsets.const_data_ptr<int64_t>();
    const Tensor host = offsets.diff().to(at::kInt).cpu();
    in_use.assign(host.const_data_ptr<int32_t>(), host.const_data_ptr<int32_t>() + count);
  }

  at::TensorOptions options(at::ScalarType type) const { return grads.options().dtype(type); }
  bool capacitance(int64_t block) const { return m < in_use[block]; }

  // Rows of L's shape that block_factor gives: min(m, B, d).
  int64_t order() const { return std::min(m, std::min(block_size, d)); }

  Tensor to_device(const std::vector<int32_t>& values) const {
    return at::from_blob(const_cast<int32_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kInt)
        .to(grads.device(), at::kInt, /*non_blocking=*/false, /*copy=*/true);
  }

  // Calls f for batches of the blocks that have columns in use, or of those of them that are `chosen`: each
  // fits in `limit` bytes with its factorisation; if not `factors`, each side is one batch.
  template <typename F>
  void for_each_batch(const std::vector<bool>& chosen, const F& f, bool factors = true) const {
    for (const bool side : {true, false}) {
      std::vector<int32_t> list;
      for (int64_t b = 0; b < count; ++b)
        if ((chosen.empty() || chosen[b]) && in_use[b] > 0 && capacitance(b) == side)
          list.push_back(static_cast<int32_t>(b));
      if (list.empty()) continue;
      const Tensor ids = to_device(list);
      for (size_t first = 0, last; first < list.size(); first = last) {
        int64_t width = 0, order = 0;
        for (last = first; last < list.size(); ++last) {
          // cuBLAS needs rows of a multiple of 16 elements for full speed; the Fisher side's matrix must not grow.
          const bool pads = side && !precision.exact;
          const int64_t own = pads ? (in_use[list[last]] + 15) / 16 * 16 : in_use[list[last]];
          const int64_t wider = std::max(width, own), n = side ? m : wider;
          const int64_t packed = precision.exact ? 0 : 16 * m * wider;  // its products included
          const int64_t bytes = (packed + 3 * 8 * n * n)                // and A, L, L⁻¹
                                * static_cast<int64_t>(last - first + 1);
          if (factors && last > first && bytes > limit) break;
          width = wider;
          order = n;
        }
        const Tensor some = ids.slice(0, static_cast<int64_t>(first), static_cast<int64_t>(last));
        f(Batch{some, {some.const_data_ptr<int32_t>(), static_cast<int64_t>(last - first), 0, width}, side, order});
      }
    }
  }

  // Calls f for ranges of the batch's columns that fit in `limit` bytes: packed, or with their partial sums where G is
  // read in place. A single one, unless a block is wide.
  template <typename F>
  void for_each_chunk(const Batch& batch, const F& f) const {
    const int64_t packed = std::max<int64_t>(256, limit / 2 / (8 * m * batch.tile.count));
    const int64_t sums = std::max<int64_t>(2, limit / 2 / (8 * m * m * batch.tile.count)) * kGramSplit;
    const int64_t max_columns = precision.exact ? sums : packed;
    const int64_t step = batch.capacitance ? max_columns : batch.tile.width;  // the Fisher side has few columns
    Tile chunk = batch.tile;
    for (chunk.first = 0; chunk.first < batch.tile.width; chunk.first += step) {
      chunk.width = std::min(step, batch.tile.width - chunk.first);
      f(chunk);
    }
  }

  // The columns of a tile packed, [count, m, width]; a view of bfloat16 gradients that are laid out like that already.
  Terms packed(const Layout& list, const Tile& tile) const {
    Tensor out;
    if (count == 1 && !list.columns && !precision.exact && grads.scalar_type() == at::kBFloat16)
      return {grads.narrow(1, tile.first, tile.width).unsqueeze(0)};
    const std::vector<int64_t> sizes{tile.count, m, tile.width};
    if (precision.exact) {
      out = at::empty(sizes, options(at::kDouble));
      dispatch(grads, [&](const auto& g) { pack(g, list, tile, out.mutable_data_ptr<double>(), current_stream()); });
      return {out};
    }
    out = at::empty({precision.grads_parts, tile.count, m, tile.width}, options(at::kBFloat16));
    dispatch(grads, [&](const auto& g) {
      pack(g, list, tile, precision.grads_parts, static_cast<BFloat16*>(out.mutable_data_ptr()), current_stream());
    });
    return out.unbind(0);
  }

  // L, and L⁻¹ if `invert`, of the batch's matrices.
  Factor factor(const Batch& batch, bool invert) const {
    Tensor a;
    for_each_chunk(batch, [&](const Tile& chunk) {
      const Tensor sum = precision.exact ? gram_of(batch, chunk) : product_of(batch, chunk);
      a = a.defined() ? a.add_(sum) : sum.to(at::kDouble);
    });
    if (batch.order > kMaxOrder) return library_factor(a, batch.ids, invert);
    Factor out{at::empty_like(a), invert ? at::empty_like(a) : Tensor()};
    cholesky(a.const_data_ptr<double>(), batch.tile.count, batch.order, ridge, precision.rounding, batch.tile.ids,
             out.l.mutable_data_ptr<double>(), invert ? out.inverse.mutable_data_ptr<double>() : nullptr,
             failed.mutable_data_ptr<int32_t>(), current_stream());
    return out;
  }

  // Waits for the GPU.
  void check_factors() const {
    const int32_t block = failed.item<int32_t>() - 1;
    TORCH_CHECK(block < 0, "grads: expected rows whose block ", block, " (m=", m, " gradients, damping ",
                ridge / static_cast<double>(m),
                ") has a Cholesky factor, got NaN or infinity in it, or a damping that is "
                "too low for a precision other than 'highest'");
  }

  // G x of each block of a tile: [k, count, m] for x [k, d] float64.
  Tensor rows(const Tile& tile, const Tensor& x) const {
    const int64_t k = x.numel() / d, splits = row_splits(block_size);
    Tensor t = at::empty({splits, k, tile.count, m}, options(at::kDouble));
    dispatch(grads, [&](const auto& g) {
      multiply_rows(g, layout, tile, x.const_data_ptr<double>(), k, t.mutable_data_ptr<double>(), current_stream());
    });
    return splits == 1 ? t.select(0, 0) : t.sum(0);
  }

  // Gᵀ t into the columns of a tile's blocks, of out [k, d].
  void add_columns(const Tile& tile, const Tensor& t, Tensor& out) const {
    dispatch(grads, [&](const auto& g) {
      multiply_columns(g, layout, tile, t.const_data_ptr<double>(), t.size(0), out.mutable_data_ptr<double>(),
                       current_stream());
    });
  }

  // x [k, count, n] <- (L Lᵀ)⁻¹ x
  static void solve(const Tensor& l, Tensor& x) {
    cholesky_solve(l.const_data_ptr<double>(), l.size(0), l.size(1), x.size(0), x.mutable_data_ptr<double>(),
                   current_stream());
  }

  const Tensor grads;
  const int64_t m, d, block_size, count;
  const double ridge;
  const Precision precision;
  const int64_t limit;  // bytes of the temporaries of a batch; exceeded only by a single block
  Layout layout;
  Tensor mask, positions, offsets, columns;  // of the columns in use; undefined if all are
  std::vector<int32_t> in_use;               // the number of columns in use of each block
  mutable Tensor failed;

 private:
  Tensor gram_of(const Batch& batch, const Tile& chunk) const {
    const int64_t splits = batch.capacitance ? gram_splits(chunk.width) : 1;
    Tensor out = at::empty({splits, chunk.count, batch.order, batch.order}, options(at::kDouble));
    dispatch(grads, [&](const auto& g) {
      gram(g, layout, chunk, batch.capacitance, batch.order, out.mutable_data_ptr<double>(), current_stream());
    });
    return splits == 1 ? out.select(0, 0) : out.sum(0);
  }

  Tensor product_of(const Batch& batch, const Tile& chunk) const {
    const Terms g = packed(layout, chunk);
    return batch.capacitance ? multiply(g, transposed(g)) : multiply(transposed(g), g);
  }

  // For matrices too large for one block of threads. They are few, so that waiting for the outcome costs little.
  Factor library_factor(Tensor sum, const Tensor& ids, bool invert) const {
    sum.diagonal(0, 1, 2).add_(ridge);
    const Tensor traces = sum.diagonal(0, 1, 2).sum(1), not_finite = traces.isfinite().logical_not();
    if (not_finite.any().item<bool>()) {  // cuSOLVER may say nothing of NaN
      failed.copy_(ids.index_select(0, not_finite.to(at::kInt).argmax().reshape({1})) + 1);
      return {sum, sum};
    }
    const double trace = traces.max().item<double>();
    double jitter = 0;
    Tensor worst;
    for (int attempt = 0; attempt < kFactorAttempts; ++attempt) {
      const auto [l, info] = at::linalg_cholesky_ex(sum);
      if (info.max().item<int>() == 0) {
        const Tensor identity = at::eye(sum.size(1), sum.options()).expand_as(sum);
        const Tensor inverse =
            invert ? at::linalg_solve_triangular(l, identity, /*upper=*/false).contiguous() : Tensor();
        return {l.contiguous(), inverse};
      }
      worst = info.argmax().reshape({1});
      const double more = attempt > 0 ? jitter * 10 : precision.rounding * trace;
      sum.diagonal(0, 1, 2).add_(more - jitter);
      jitter = more;
    }
    failed.copy_(ids.index_select(0, worst) + 1);
    return {sum, sum};
  }
};

// Which blocks have an element of x [d] that is not zero.
inline std::vector<bool> blocks_with(const Blocks& blocks, const Tensor& x) {
  const Tensor padded = at::constant_pad_nd(x != 0, {0, blocks.count * blocks.block_size - blocks.d});
  const Tensor any = padded.view({blocks.count, -1}).any(1).cpu();
  const bool* values = any.const_data_ptr<bool>();
  return std::vector<bool>(values, values + blocks.count);
}

}  // namespace mfac::cuda
