// The CUDA kernels as torch ops: checks, the order of work, and the matrix products that ATen gives to cuBLAS. The equations
// stand in block_factor.cu, inverse_diagonal.cu, inverse_product.cu and group_saliency.cu, those of the updates in joint.h and below.
// Everything runs on torch's current stream. The host waits where it needs a number: how many columns are in use, whether a
// factorisation failed, between the steps of a selection.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/full.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "joint.h"
#include "members.h"
#include "selection.h"
#include "tiles.h"

namespace mfac::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;
using c10::cuda::CUDAGuard;

Precision check(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active,
                c10::string_view precision = "highest") {
  check_grads(grads, damping, block_size);
  check_active(active, grads);
  check_precision(precision);
  return Precision(std::string_view(precision.data(), precision.size()), grads);
}

Tensor block_factor_op(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active) {
  const Precision precision = check(grads, damping, block_size, active);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  const int64_t s = blocks.order();
  Tensor out = at::zeros({blocks.count, s, s}, blocks.options(at::kDouble));
  blocks.for_each_batch({}, [&](const Batch& batch) {
    const int64_t n = batch.order;
    Tensor padded = at::zeros({batch.tile.count, s, s}, out.options());
    Tensor l = blocks.factor(batch, precision, false).l;
    if (!batch.capacitance) {  // blocks with fewer columns in use than the widest
      std::vector<int32_t> used;
      const Tensor host = batch.ids.cpu();
      for (int64_t i = 0; i < batch.tile.count; ++i) used.push_back(blocks.in_use[host.const_data_ptr<int32_t>()[i]]);
      l = l * (at::arange(n, batch.ids.options()) < blocks.to_device(used).unsqueeze(1)).unsqueeze(2);
    }
    padded.narrow(1, 0, n).narrow(2, 0, n).copy_(l);
    out.index_copy_(0, batch.ids.to(at::kLong), padded);
  });
  blocks.check_factors();
  return out;
}

Tensor inverse_diagonal_op(const Tensor& grads, double damping, int64_t block_size, const OptionalTensor& active,
                           c10::string_view name) {
  const Precision precision = check(grads, damping, block_size, active, name);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  Tensor out = at::full({blocks.d}, 1 / damping, blocks.options(at::kFloat));
  blocks.for_each_batch({}, [&](const Batch& batch) {
    write_diagonal(blocks, batch, precision, damping, blocks.factor(batch, precision, true).inverse, out);
  });
  blocks.check_factors();
  return out;
}

// out[k, d] = F⁻¹ x for x [k, d] float64 that is zero outside the chosen blocks; `factor_of` gives L of a batch, and whether it
// packs columns for it is said by `packs`.
template <typename F>
Tensor apply_inverse(const Blocks& blocks, double damping, const Tensor& x, const std::vector<bool>& chosen,
                     const F& factor_of, bool packs) {
  const int64_t k = x.size(0);
  const double m = static_cast<double>(blocks.m);
  Tensor out = x / damping, products = at::zeros_like(x);
  const Tensor used = blocks.mask.defined() ? x * blocks.mask : x;
  blocks.for_each_batch(
      chosen,
      [&](const Batch& batch) {
        const Tensor l = factor_of(batch);
        if (batch.capacitance) {
          bool done = false;
          dispatch(blocks.grads, [&](const auto& g) {
            done = inverse_product(g, blocks.layout, batch.tile, l.const_data_ptr<double>(), x.const_data_ptr<double>(),
                                   k, damping, out.mutable_data_ptr<double>(), current_stream());
          });
          if (done) return;
          Tensor t = blocks.rows(batch.tile, used);
          blocks.solve(l, t);
          blocks.add_columns(batch.tile, t, products);
        } else {
          Tensor t = at::empty({k, batch.tile.count, batch.order}, x.options());
          gather(blocks.layout, batch.tile, x.const_data_ptr<double>(), k, t.mutable_data_ptr<double>(),
                 current_stream());
          blocks.solve(l, t);
          scatter(blocks.layout, batch.tile, t.const_data_ptr<double>(), k, m, out.mutable_data_ptr<double>(),
                  current_stream());
        }
      },
      packs);
  if (blocks.mask.defined()) products.mul_(blocks.mask);
  return out.sub_(products, 1 / damping);
}

Tensor inverse_product_op(const Tensor& grads, const Tensor& factor, const Tensor& x, double damping,
                          int64_t block_size, const OptionalTensor& active) {
  constexpr int64_t kVectorsAtOnce = 16;  // float64 copies of them take memory
  check(grads, damping, block_size, active);
  check_product(grads, factor, x, block_size);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  const Tensor vectors = x.reshape({-1, blocks.d}), all = factor.contiguous();
  Tensor flat = out.view({-1, blocks.d});
  for (int64_t v = 0; v < vectors.size(0); v += kVectorsAtOnce) {
    const int64_t end = std::min(vectors.size(0), v + kVectorsAtOnce);
    const Tensor some = vectors.slice(0, v, end).to(at::kDouble).contiguous();
    const auto factor_of = [&](const Batch& batch) {
      const Tensor l = batch.tile.count == blocks.count ? all : all.index_select(0, batch.ids);
      return l.narrow(1, 0, batch.order).narrow(2, 0, batch.order).contiguous();
    };
    flat.slice(0, v, end).copy_(apply_inverse(blocks, damping, some, {}, factor_of, /*packs=*/false));
  }
  return out;
}

// Nothing is kept from one call to the next.
std::tuple<Tensor, Tensor> joint_step_op(const Tensor& grads, Tensor& weights, const Tensor& kept, double damping,
                                         int64_t block_size, c10::string_view name, const OptionalTensor& gram,
                                         const OptionalTensor& held, bool wanted) {
  check_joint_step(grads, weights, kept, damping, block_size, name, gram, held);
  const Precision precision(std::string_view(name.data(), name.size()), grads);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, kept);
  Tensor diagonal = at::full({wanted ? blocks.d : 0}, 1 / damping, blocks.options(at::kFloat));
  const Tensor loss = joint_update(blocks, precision, weights, kept, damping, wanted ? &diagonal : nullptr);
  return {loss, diagonal};
}

Tensor joint_update_op(const Tensor& grads, Tensor& weights, const Tensor& kept, double damping, int64_t block_size,
                       c10::string_view name) {
  return std::get<0>(joint_step_op(grads, weights, kept, damping, block_size, name, std::nullopt, std::nullopt, false));
}

// w <- w - F⁻¹ u with u_i = w_i / [F⁻¹]_ii where not kept (M-FAC, equation 4), then zero there.
void independent_update_op(const Tensor& grads, Tensor& weights, const Tensor& kept, const Tensor& diagonal,
                           double damping, int64_t block_size, const OptionalTensor& active, c10::string_view name) {
  const Precision precision = check(grads, damping, block_size, active, name);
  check_vector(weights, "weights", at::kFloat, grads);
  check_vector(kept, "kept", at::kBool, grads);
  check_vector(diagonal, "inverse_diagonal", at::kFloat, grads);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  if (blocks.d == 0) return;
  const Tensor w = weights.to(at::kDouble), u = at::where(kept, 0.0, w / diagonal.to(at::kDouble));
  const auto factor_of = [&](const Batch& batch) { return blocks.factor(batch, precision, false).l; };
  const Tensor step = apply_inverse(blocks, damping, u.unsqueeze(0), blocks_with(blocks, u), factor_of, /*packs=*/true);
  blocks.check_factors();
  weights.copy_(at::where(kept, w - step[0], 0.0));
}

Tensor quadratic_form_op(const Tensor& grads, const Tensor& x, double damping, int64_t block_size) {
  check(grads, damping, block_size, std::nullopt);
  check_vector(x, "x", at::kFloat, grads);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, std::nullopt);
  if (blocks.d == 0) return at::zeros({}, blocks.options(at::kDouble));
  const Tensor step = x.to(at::kDouble), ids = at::arange(blocks.count, blocks.options(at::kInt));
  return step.square().sum() * (0.5 * damping) + squared_rows(blocks, ids, step) / (2 * static_cast<double>(blocks.m));
}

// Nothing is kept from one call to the next.
Tensor group_saliency_op(const Tensor& grads, const Tensor& weights, const Tensor& groups, const Tensor& subsets,
                         double damping, int64_t block_size, const OptionalTensor& active, c10::string_view name,
                         const OptionalTensor& gram, const OptionalTensor& held) {
  const Precision precision = check(grads, damping, block_size, active, name);
  check_vector(weights, "weights", at::kFloat, grads);
  check_groups(groups, subsets, grads);
  check_memory(grads, block_size, gram, held);
  const int64_t size = groups.size(1), s = subsets.size(1), chosen_subsets = subsets.size(0);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active);
  Tensor out = at::zeros({groups.size(0), chosen_subsets}, blocks.options(at::kFloat));
  if (out.numel() == 0 || size == 0 || blocks.d == 0) return out;
  const Members members = list_members(blocks, groups);
  const int64_t count = members.position.numel(), parts = members.part_group.numel();
  if (count == 0) return out;
  const Tensor local = members.position.remainder(blocks.block_size), columns = local.to(at::kInt);
  const Tensor first = at::tensor(members.first, groups.options());
  const Layout listed{blocks.d, blocks.block_size, columns.const_data_ptr<int32_t>(), first.const_data_ptr<int64_t>()};
  // Where a member's column is: on the capacitance side in the order of the members, else among the block's columns in use.
  const Tensor block_of = at::floor_divide(members.position, blocks.block_size);
  const Tensor in_order = at::arange(count, groups.options()) - first.index_select(0, block_of);
  Tensor among = local;
  if (blocks.mask.defined())
    among = at::searchsorted(blocks.positions, members.position) - blocks.offsets.index_select(0, block_of);
  std::vector<int32_t> sides;
  for (int64_t b = 0; b < blocks.count; ++b) sides.push_back(blocks.capacitance(b));
  const Tensor side = blocks.to_device(sides).index_select(0, block_of), places = at::where(side > 0, in_order, among);
  const Tensor slots = members.part * size + members.place, chosen_members = subsets.contiguous();
  Tensor table = at::full({parts, size}, -1, blocks.options(at::kInt));
  Tensor part_weights = at::zeros({parts, size}, blocks.options(at::kFloat));
  Tensor owner = at::empty({parts}, blocks.options(at::kInt));
  table.view({-1}).index_copy_(0, slots, places.to(at::kInt));
  part_weights.view({-1}).index_copy_(0, slots, weights.index_select(0, members.position));
  owner.index_copy_(0, members.part, block_of.to(at::kInt));  // the same for all members of a part

  Tensor values = at::zeros({parts, chosen_subsets}, blocks.options(at::kDouble)), scratch;
  int64_t at_once = parts;
  if (!group_saliency_fits(size, s)) {
    const int64_t bytes = group_saliency_bytes(size, s);
    at_once = std::max<int64_t>(1, std::min(parts, blocks.limit / bytes));
    scratch = at::empty({at_once * bytes}, blocks.options(at::kByte));
  }
  std::vector<bool> chosen(blocks.count);
  for (int64_t b = 0; b < blocks.count; ++b) chosen[b] = members.first[b] < members.first[b + 1];
  blocks.for_each_batch(chosen, [&](const Batch& batch) {
    const Tensor inverse = blocks.factor(batch, precision, true).inverse, host = batch.ids.cpu();
    const Terms terms = split(inverse, precision);
    const int32_t* id = host.const_data_ptr<int32_t>();
    const auto score = [&](const Tensor& solved, int32_t first_block, int32_t first_column, int64_t from, int64_t to) {
      for (int64_t part = from, next; part < to; part = next) {
        next = std::min(to, part + at_once);
        group_saliency(Parts{table.const_data_ptr<int32_t>() + part * size, owner.const_data_ptr<int32_t>() + part,
                             first_column, first_block, part_weights.const_data_ptr<float>() + part * size, next - part,
                             size, chosen_members.const_data_ptr<int64_t>(), chosen_subsets, s},
                       solved.const_data_ptr<double>(), solved.size(1), solved.size(2), damping, blocks.m,
                       batch.capacitance, scratch.defined() ? scratch.mutable_data_ptr() : nullptr,
                       values.mutable_data_ptr<double>() + part * chosen_subsets, current_stream());
      }
    };
    // L⁻¹ G in the columns [first_column, first_column + width) of the members of some blocks.
    const auto solve = [&](int64_t from, int64_t to, int64_t first_column, int64_t width) {
      Terms some;
      for (const Tensor& term : terms) some.push_back(term.slice(0, from, to));
      const Tile tile{batch.tile.ids + from, to - from, first_column, width};
      return multiply(some, blocks.packed(listed, tile, precision)).to(at::kDouble);
    };
    const auto members_in = [&](int64_t i) { return members.first[id[i] + 1] - members.first[id[i]]; };
    const int64_t most = std::max<int64_t>(1, blocks.limit / (16 * blocks.m));  // columns at a time, packed and solved
    for (int64_t from = 0, to; from < batch.tile.count; from = to) {
      int64_t width = members_in(from);
      for (to = from + 1; to < batch.tile.count && id[to] == id[to - 1] + 1; ++to) {
        const int64_t wider = std::max(width, members_in(to));
        if (batch.capacitance && wider * (to - from + 1) > most) break;
        width = wider;
      }
      const int64_t first_part = members.first_part[id[from]], last_part = members.first_part[id[to - 1] + 1];
      if (!batch.capacitance) {
        score(inverse.slice(0, from, to), id[from], 0, first_part, last_part);
      } else if (width <= most) {
        score(solve(from, to, 0, width), id[from], 0, first_part, last_part);
      } else {  // one block, wider than fits: some parts of it at a time
        const int64_t begin = members.first[id[from]], end = members.first[id[from] + 1];
        for (int64_t part = first_part, member = begin, next_part, next; part < last_part;
             part = next_part, member = next) {
          next_part = last_part, next = end;
          if (end - member > most) {
            next_part = std::max(part + 1, members.part[member + most].item<int64_t>());
            next = at::searchsorted(members.part, next_part).item<int64_t>();
          }
          const int32_t column = static_cast<int32_t>(member - begin);
          score(solve(from, to, column, next - member), id[from], column, part, next_part);
        }
      }
    }
  });
  blocks.check_factors();
  // The parts of a group follow in the order of the blocks: a running sum, and its differences, would lose digits.
  const auto [owners, order] = at::sort(members.part_group, true, 0, false);
  const Tensor sorted = values.index_select(0, order),
               bounds = at::searchsorted(owners, at::arange(groups.size(0) + 1, groups.options()));
  const Tensor lengths = bounds.diff();
  const int64_t most = lengths.max().item<int64_t>();
  Tensor sum = at::zeros({groups.size(0), chosen_subsets}, values.options());
  for (int64_t i = 0; i < most; ++i) {
    const Tensor has = lengths > i, index = at::where(has, bounds.slice(0, 0, groups.size(0)) + i, 0);
    sum += sorted.index_select(0, index) * has.unsqueeze(1);
  }
  return sum.clamp_max(std::numeric_limits<float>::max()).to(at::kFloat);
}

Tensor select_smallest_op(const Tensor& scores, at::IntArrayRef k, at::OptionalIntArrayRef sizes,
                          const std::optional<Tensor>& weights) {
  check_selection(scores, k, sizes, weights);
  const CUDAGuard guard(scores.device());
  const Tensor values = scores.contiguous();
  Tensor kept = at::empty({scores.size(0)}, scores.options().dtype(at::kBool)), w;
  if (weights) w = weights->contiguous();
  const at::IntArrayRef segments = sizes ? *sizes : at::IntArrayRef(scores.sizes());
  std::vector<std::vector<unsigned long long>> cuts;
  const auto segment = [&](size_t i, int64_t begin) {
    return Selection{values.const_data_ptr<float>() + begin, segments[i], k[i], scores.options()};
  };
  int64_t begin = 0;
  for (size_t i = 0; i < k.size(); begin += segments[i++])
    cuts.push_back(segments[i] ? segment(i, begin).find(begin) : std::vector<unsigned long long>{});
  begin = 0;  // nothing has been written so far
  for (size_t i = 0; i < k.size(); begin += segments[i++])
    if (segments[i])
      segment(i, begin).write(cuts[i], kept.mutable_data_ptr<bool>() + begin,
                              weights ? w.mutable_data_ptr<float>() + begin : nullptr);
  if (weights && !w.is_same(*weights)) weights->copy_(w);
  return kept;
}

TORCH_LIBRARY_IMPL(mfac, CUDA, m) {
  m.impl("block_factor", block_factor_op);
  m.impl("inverse_diagonal", inverse_diagonal_op);
  m.impl("inverse_product", inverse_product_op);
  m.impl("joint_update", joint_update_op);
  m.impl("joint_step", joint_step_op);
  m.impl("independent_update", independent_update_op);
  m.impl("quadratic_form", quadratic_form_op);
  m.impl("group_saliency", group_saliency_op);
  m.impl("select_smallest", select_smallest_op);
}

}  // namespace
}  // namespace mfac::cuda
