// Saliency of groups of weights that are pruned together: for a group, a set of P positions, and a subset Q of it,
//
//   ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q      the minimum of ½ δᵀFδ over all δ with δ_Q = -w_Q (Optimal Brain Surgeon for several)
//
// for each of the subsets that a pattern allows: the whole group for a block, the C(M, N) ways to prune an N:M group.
// F⁻¹ is block-diagonal, so a group whose members lie in several blocks is a sum of parts, one per block. Within a
// block the columns L⁻¹ g_i of the members of a few groups are solved in panels, as for the diagonal (diagonal.h), and
// their Gram matrix gives
//
//   capacitance side   [F⁻¹]_ij = (δ_ij - (L⁻¹ g_i)·(L⁻¹ g_j)) / λ
//   Fisher side        [F⁻¹]_ij = m (L⁻¹ e_i)·(L⁻¹ e_j)
//
// of which only the elements between members are computed: 2 m² flops per weight as for the diagonal, some 10 % more
// for the Gram matrix, and s³/6 for each subset of s weights. Weights not in use (pruned before) have a column of λ I:
// they are zero, and so is their saliency. If the last update has left A (held_gram.h), it is reused.
#include "diagonal.h"
#include "held_gram.h"

namespace mfac::cpu {

// A member of a group, in the block that is being worked on.
struct Member {
  int64_t group;
  int32_t place;     // in the group, [0, P)
  int32_t position;  // among the block's columns in use
};

// A group's members in one block: a range of the block's list of members, and where its saliencies go, [subsets].
struct Part {
  int64_t begin, end, slot;
};

namespace {

// A pivot of [F⁻¹]_QQ that is less than this part of the numbers that it is a difference of needs float64: float32
// elements have errors of some 1e-7 of those numbers. kGroupTerms is the limit where the factor is from bfloat16
// products, with errors of some 1e-5.
constexpr double kGroupCancellation = 0.01, kGroupTerms = 0.1;

// elements[i][j], j <= i, of F⁻¹ for `count` members of a block. Returns the smallest 1 - ‖L⁻¹ g_i‖² met, as in
// inverse_diagonal.cpp.
template <typename T, typename G>
double inverse_elements(const Block<G>& block, const Triangle<T>& l, const Member* members, int64_t count,
                        double* elements) {
  constexpr int64_t width = kPanel<T>;
  const int64_t n = block.order(), padded = round_up(n, kRows), panels = ceil_div(count, width);
  const double damping = block.grads.damping, m = static_cast<double>(block.grads.m);
  Buffer<T> solved(panels * padded * width), strip(panels * width * std::min(kDepth, padded));
  std::vector<double> squares(count, 0.0);
  std::fill_n(static_cast<T*>(solved), panels * padded * width, T(0));
  for (int64_t i = 0; i < count; ++i) {
    T* column = solved + i / width * padded * width + i % width;
    if (!block.capacitance()) {
      column[members[i].position * width] = T(1);
      continue;
    }
    const int64_t source = block.column(members[i].position);
    for (int64_t r = 0; r < n; ++r) {
      column[r * width] = convert<T>(block.row(r)[source]);
      squares[i] += static_cast<double>(column[r * width]) * column[r * width];
    }
  }
  for (int64_t j = 0; j < panels; ++j) {
    int64_t first = block.capacitance() ? 0 : n;  // the rows before are zero
    for (int64_t i = j * width; i < std::min(count, (j + 1) * width) && first > 0; ++i)
      first = std::min<int64_t>(first, members[i].position);
    solve(l, solved + j * padded * width, static_cast<T*>(nullptr), first / kRows);
  }
  std::fill_n(elements, count * count, 0.0);
  for (int64_t k = 0; k < padded; k += kDepth) {
    const int64_t depth = std::min(kDepth, padded - k);
    for (int64_t j = 0; j < panels; ++j)
      std::copy_n(solved + (j * padded + k) * width, depth * width, strip + j * depth * width);
    gram<T>(strip, count, depth, 1.0, elements, count);
  }
  double smallest = 1;
  for (int64_t i = 0; i < count; ++i) {
    double* row = elements + i * count;
    if (!block.capacitance()) {
      for (int64_t j = 0; j <= i; ++j) row[j] *= m;
      row[i] = std::min(row[i], 1 / damping);
      continue;
    }
    const double rest = 1 - row[i], bound = 1 / (damping + squares[i] / m);
    if (!(rest >= smallest)) smallest = rest;
    for (int64_t j = 0; j < i; ++j) row[j] /= -damping;
    row[i] = rest / damping > bound ? rest / damping : bound;
  }
  return smallest;
}

// F⁻¹ of a strip of members, and how large the terms were of which its elements are differences or sums.
struct Elements {
  std::vector<double> values;  // [count, count], lower triangle
  int64_t count;
  double scale;  // 1/λ on the capacitance side; 0 on the Fisher side, where it is the diagonal element itself
};

// ½ w_Qᵀ A⁻¹ w_Q, A = [F⁻¹]_QQ, for the members at `chosen`; lowers `smallest` to the least pivot over its scale. Where
// the data constrain some direction of Q far more than each weight in it, pivots are what rounding leaves of a
// difference; below kMinPivot they count as that.
double subset_saliency(const Elements& elements, const double* w, const std::vector<int32_t>& chosen,
                       std::vector<double>& scratch, double& smallest) {
  const int64_t s = static_cast<int64_t>(chosen.size());
  scratch.resize(s * s + s);
  double *l = scratch.data(), *y = l + s * s, sum = 0;
  for (int64_t i = 0; i < s; ++i) {
    const double* source = elements.values.data() + chosen[i] * elements.count;
    double *row = l + i * s, value = w[chosen[i]];
    for (int64_t j = 0; j < i; ++j) {
      double rest = source[chosen[j]];
      for (int64_t k = 0; k < j; ++k) rest -= row[k] * l[j * s + k];
      row[j] = rest / l[j * s + j];
      value -= row[j] * y[j];
    }
    const double diagonal = source[chosen[i]], scale = std::max(elements.scale, diagonal);
    double pivot = diagonal;
    for (int64_t k = 0; k < i; ++k) pivot -= row[k] * row[k];
    if (i > 0 && !(pivot >= smallest * scale)) smallest = pivot / scale;
    row[i] = std::sqrt(std::max(pivot, i > 0 ? kMinPivot * scale : 0));
    y[i] = value / row[i];
    sum += y[i] * y[i];
  }
  return 0.5 * sum;
}

// values[slot][k] for the parts [first, last) of a block, from elements of T's precision. False if those cancelled.
template <typename T, typename G>
bool score_parts(const Block<G>& block, const Triangle<T>& l, const std::vector<Member>& members, const Part* first,
                 const Part* last, const float* weights, const Groups& groups, double least_pivot, float* values) {
  const int64_t start = first->begin, count = last[-1].end - start;
  std::vector<double> w(count), scratch;
  std::vector<int32_t> chosen, member(groups.size);
  Elements elements{std::vector<double>(count * count), count, block.capacitance() ? 1 / block.grads.damping : 0};
  double smallest = inverse_elements(block, l, members.data() + start, count, elements.values.data());
  if (sizeof(T) == sizeof(float) && !(smallest >= kCancellation)) return false;
  for (const Part* part = first; part < last; ++part) {
    std::fill(member.begin(), member.end(), -1);
    for (int64_t i = part->begin; i < part->end; ++i) {
      member[members[i].place] = static_cast<int32_t>(i - start);
      w[i - start] = weights[groups.positions[members[i].group * groups.size + members[i].place]];
    }
    for (int64_t k = 0; k < groups.subsets; ++k) {
      chosen.clear();
      for (int64_t i = 0; i < groups.subset_size; ++i) {
        const int32_t at = member[groups.members[k * groups.subset_size + i]];
        if (at >= 0) chosen.push_back(at);
      }
      const double value = subset_saliency(elements, w.data(), chosen, scratch, smallest);
      if (sizeof(T) == sizeof(float) && !(smallest >= least_pivot)) return false;
      values[part->slot * groups.subsets + k] =
          static_cast<float>(std::min<double>(value, std::numeric_limits<float>::max()));
    }
  }
  return true;
}

}  // namespace

template <typename G>
void group_saliency(const Gradients<G>& given, const bool* active, const float* weights, const Groups& groups,
                    const Held& held, float* out) {
  const Gradients<G> grads = prefer_fisher_side(given), rows = capacitance_only(grads);
  // Members by block, in the order of the groups, and their parts: slot p of `values` is for part p.
  const int64_t blocks = grads.blocks(), total = groups.count * groups.size;
  std::vector<int64_t> first_member(blocks + 1, 0), first_part(blocks + 1, 0), order;
  const auto used = [&](int64_t id) {
    const int64_t position = groups.positions[id];
    return position >= 0 && (!active || active[position]);
  };
  for (int64_t id = 0; id < total; ++id)
    if (used(id)) ++first_member[groups.positions[id] / grads.block_size + 1];
  for (int64_t b = 0; b < blocks; ++b) first_member[b + 1] += first_member[b];
  order.resize(first_member[blocks]);
  std::vector<int64_t> next(first_member.begin(), first_member.end() - 1);
  for (int64_t id = 0; id < total; ++id)
    if (used(id)) order[next[groups.positions[id] / grads.block_size]++] = id;
  for (int64_t b = 0; b < blocks; ++b) {
    first_part[b + 1] = first_part[b];
    for (int64_t i = first_member[b]; i < first_member[b + 1]; ++i)
      if (i == first_member[b] || order[i] / groups.size != order[i - 1] / groups.size) ++first_part[b + 1];
  }
  std::vector<int64_t> part_group(first_part[blocks]);
  std::vector<float> values(first_part[blocks] * groups.subsets);

  for_each_block(grads, [&](int64_t index) {
    if (first_member[index] == first_member[index + 1]) return;
    const Block<G> block(grads, index, active);
    const int64_t n = block.order();
    std::vector<Member> members;
    std::vector<Part> parts;
    for (int64_t i = first_member[index]; i < first_member[index + 1]; ++i) {
      const int64_t group = order[i] / groups.size, at = i - first_member[index];
      const int32_t column = static_cast<int32_t>(groups.positions[order[i]] - block.begin);
      const auto found = std::lower_bound(block.columns.begin(), block.columns.end(), column);
      const int32_t position = block.dense ? column : static_cast<int32_t>(found - block.columns.begin());
      if (at == 0 || members.back().group != group) {
        if (at > 0) parts.back().end = at;
        parts.push_back({at, 0, first_part[index] + static_cast<int64_t>(parts.size())});
        part_group[parts.back().slot] = group;
      }
      members.push_back({group, static_cast<int32_t>(order[i] % groups.size), position});
    }
    parts.back().end = static_cast<int64_t>(members.size());

    Buffer<double> factor(n * n);
    HeldGram gram(held, grads, index);
    Precision precision;
    std::vector<int32_t> where;
    bool found = gram.find(block, where);
    if (found) found = factor_held(block, where, Block<G>(rows, index, gram.others(where)), gram, factor, precision);

    const bool read = block.capacitance() || !found;  // whether the columns are needed
    const PackedColumns<G> packed(block);
    if (read && packed.copied()) parallel_for(grads.m, block.size(), [&](int64_t r) { packed.copy_row(r); });
    const Block<G>& columns = read ? packed.block() : block;
    if (!found)
      precision = factor_block(columns, factor, [&](const double* a, Products products, double rounding) {
        gram.store(block, a, products, rounding);
      });
    // Strips of as many parts as one panel of float32 holds, or of one part.
    std::vector<int64_t> strips{0};
    for (int64_t p = 1; p < static_cast<int64_t>(parts.size()); ++p)
      if (parts[p].end - parts[strips.back()].begin > kPanel<float>) strips.push_back(p);
    const int64_t count = static_cast<int64_t>(strips.size());
    strips.push_back(static_cast<int64_t>(parts.size()));
    std::vector<char> done(count, 0);
    const double least_pivot = precision.terms > 0 ? kGroupTerms : kGroupCancellation;
    const auto score = [&](const auto& l, int64_t s) {
      return score_parts(columns, l, members, &parts[strips[s]], parts.data() + strips[s + 1], weights, groups,
                         least_pivot, values.data());
    };
    if (precision.float_solve) {
      Triangle<float> l(n);
      l.pack(factor, n, n);
      parallel_for(count, n * n * kPanel<float>, [&](int64_t s) { done[s] = score(l, s); });
    }
    if (std::count(done.begin(), done.end(), 1) == count) return;
    if (!precision.exact_factor) factor_double(columns, factor);
    Triangle<double> l(n);
    l.pack(factor, n, n);
    parallel_for(count, n * n * kPanel<float>, [&](int64_t s) {
      if (!done[s]) score(l, s);
    });
  });

  std::fill_n(out, groups.count * groups.subsets, 0.0f);
  for (int64_t p = 0; p < first_part[blocks]; ++p)
    for (int64_t k = 0; k < groups.subsets; ++k)
      out[part_group[p] * groups.subsets + k] += values[p * groups.subsets + k];
}

template void group_saliency<float>(const Gradients<float>&, const bool*, const float*, const Groups&, const Held&,
                                    float*);
template void group_saliency<BFloat16>(const Gradients<BFloat16>&, const bool*, const float*, const Groups&,
                                       const Held&, float*);

}  // namespace mfac::cpu
