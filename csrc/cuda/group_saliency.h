// Order of work of group_saliency; kernel and equation: group_saliency.cu.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "batches.h"

namespace mfac::cuda {

// The members of the groups, ordered by block: their positions in [0, d) and their places in their groups. A part is a
// run of members of one group in one block.
struct Members {
  Tensor position, place, part;     // [count] int64
  std::vector<int64_t> first;       // [blocks + 1]: the first member of each block
  std::vector<int64_t> first_part;  // [blocks + 1]: the first part of each block
  Tensor part_group;                // [parts] int64: the group of each part
};

inline Members list_members(const Blocks& blocks, const Tensor& groups) {
  const Tensor flat = groups.reshape({-1});
  Tensor used = flat >= 0;
  if (blocks.mask.defined()) used = used & blocks.mask.index_select(0, flat.clamp_min(0));
  const Tensor ids = at::nonzero(used).squeeze(1);
  const auto [block, order] = at::sort(at::floor_divide(flat.index_select(0, ids), blocks.block_size), true, 0, false);
  const Tensor member = ids.index_select(0, order), size = at::full({}, groups.size(1), groups.options());
  Members out;
  out.position = flat.index_select(0, member);
  const Tensor group = at::floor_divide(member, size);
  out.place = member - group * size;
  Tensor starts = at::ones_like(member, member.options().dtype(at::kBool));
  if (member.numel() > 1) {
    const auto differs = [](const Tensor& x) { return x.slice(0, 1) != x.slice(0, 0, x.size(0) - 1); };
    starts.slice(0, 1).copy_(differs(block).logical_or(differs(group)));
  }
  out.part = at::cumsum(starts, 0) - 1;
  out.part_group = group.index_select(0, at::nonzero(starts).squeeze(1));
  const Tensor bounds = at::searchsorted(block, at::arange(blocks.count + 1, block.options()));
  const Tensor all = at::constant_pad_nd(at::cumsum(starts, 0), {1, 0});  // parts that begin before each member
  const auto host = [](const Tensor& x) {
    const Tensor values = x.cpu();
    return std::vector<int64_t>(values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel());
  };
  out.first = host(bounds);
  out.first_part = host(all.index_select(0, bounds));
  return out;
}

// Nothing is kept from one call to the next.
inline Tensor group_saliency_op(const Tensor& grads, const Tensor& weights, const Tensor& groups, const Tensor& subsets,
                                double damping, int64_t block_size, const OptionalTensor& active, c10::string_view name,
                                const OptionalTensor& gram, const OptionalTensor& held) {
  check_group_saliency(grads, weights, groups, subsets, damping, block_size, active, name, gram, held);
  const int64_t size = groups.size(1), s = subsets.size(1), chosen_subsets = subsets.size(0);
  const CUDAGuard guard(grads.device());
  const Blocks blocks(grads, damping, block_size, active, name);
  Tensor out = at::zeros({groups.size(0), chosen_subsets}, blocks.options(at::kFloat));
  if (out.numel() == 0 || size == 0 || blocks.d == 0) return out;
  const Members members = list_members(blocks, groups);
  const int64_t count = members.position.numel(), parts = members.part_group.numel();
  if (count == 0) return out;
  const Tensor local = members.position.remainder(blocks.block_size), columns = local.to(at::kInt);
  const Tensor first = at::tensor(members.first, groups.options());
  const Layout listed{blocks.d, blocks.block_size, columns.const_data_ptr<int32_t>(), first.const_data_ptr<int64_t>()};
  // The column of a member: on the capacitance side its place among the block's members, else among its columns in use.
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
    const Tensor inverse = blocks.factor(batch, true).inverse, host = batch.ids.cpu();
    const Terms terms = split(inverse, blocks.precision);
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
      return multiply(some, blocks.packed(listed, tile)).to(at::kDouble);
    };
    const auto members_in = [&](int64_t i) { return members.first[id[i] + 1] - members.first[id[i]]; };
    // Columns that are packed and solved at a time.
    const int64_t max_columns = std::max<int64_t>(1, blocks.limit / (16 * blocks.m));
    for (int64_t from = 0, to; from < batch.tile.count; from = to) {
      int64_t width = members_in(from);
      for (to = from + 1; to < batch.tile.count && id[to] == id[to - 1] + 1; ++to) {
        const int64_t wider = std::max(width, members_in(to));
        if (batch.capacitance && wider * (to - from + 1) > max_columns) break;
        width = wider;
      }
      const int64_t first_part = members.first_part[id[from]], last_part = members.first_part[id[to - 1] + 1];
      if (!batch.capacitance) {
        score(inverse.slice(0, from, to), id[from], 0, first_part, last_part);
      } else if (width <= max_columns) {
        score(solve(from, to, 0, width), id[from], 0, first_part, last_part);
      } else {  // one block, wider than fits: some parts of it at a time
        const int64_t begin = members.first[id[from]], end = members.first[id[from] + 1];
        for (int64_t part = first_part, member = begin, next_part, next; part < last_part;
             part = next_part, member = next) {
          next_part = last_part, next = end;
          if (end - member > max_columns) {
            next_part = std::max(part + 1, members.part[member + max_columns].item<int64_t>());
            next = at::searchsorted(members.part, next_part).item<int64_t>();
          }
          const int32_t column = static_cast<int32_t>(member - begin);
          score(solve(from, to, column, next - member), id[from], column, part, next_part);
        }
      }
    }
  });
  blocks.check_factors();
  // Sums the parts of each group in the order of the blocks: differences of a prefix sum would lose digits.
  const auto [owners, order] = at::sort(members.part_group, true, 0, false);
  const Tensor sorted = values.index_select(0, order),
               bounds = at::searchsorted(owners, at::arange(groups.size(0) + 1, groups.options()));
  const Tensor lengths = bounds.diff();
  const int64_t max_parts = lengths.max().item<int64_t>();
  Tensor sum = at::zeros({groups.size(0), chosen_subsets}, values.options());
  for (int64_t i = 0; i < max_parts; ++i) {
    const Tensor has = lengths > i, index = at::where(has, bounds.slice(0, 0, groups.size(0)) + i, 0);
    sum += sorted.index_select(0, index) * has.unsqueeze(1);
  }
  return sum.clamp_max(std::numeric_limits<float>::max()).to(at::kFloat);
}

}  // namespace mfac::cuda
