// Which weights of which groups lie in which block: what group_saliency is told.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>

#include "tiles.h"

namespace mfac::cuda {

// Members of the groups that have a part in F: their positions in the order of their blocks, and their places in their groups;
// and the parts, runs of members of one group in one block.
struct Members {
  Tensor position, place, part;     // [count] int64
  std::vector<int64_t> first;       // [blocks + 1]: members of the blocks
  std::vector<int64_t> first_part;  // [blocks + 1]
  Tensor part_group;                // [parts]
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

}  // namespace mfac::cuda
