// Order of work of select_smallest, and what the host decides in between; the kernels and their steps:
// select_smallest.cu.
#pragma once

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sort.h>

#include <cmath>
#include <vector>

#include "batches.h"
#include "order_key.h"

namespace mfac::cuda {

// One segment of a selection; the kernels' comments say what each step does.
struct Selection {
  const float* scores;
  int64_t n, k;
  at::TensorOptions options;

  Tensor empty(int64_t bytes) const { return at::empty({bytes}, options.dtype(at::kByte)); }

  template <typename T>
  std::vector<T> read(const Tensor& bytes) const {
    const Tensor host = bytes.cpu();
    const T* values = reinterpret_cast<const T*>(host.const_data_ptr());
    return std::vector<T>(values, values + host.numel() / static_cast<int64_t>(sizeof(T)));
  }

  // Keys that probably enclose the k-th smallest: its rank in a sample is known to within three standard deviations.
  Bounds bracket() const {
    constexpr int64_t kSample = 1 << 16;      // bounds then enclose one score in a hundred
    constexpr int64_t kMinSampled = 1 << 18;  // fewer scores are all copied
    if (n < kMinSampled) return {0, UINT32_MAX};
    const Tensor sample = at::empty({kSample}, options.dtype(at::kFloat));
    sample_scores(scores, n, kSample, sample.mutable_data_ptr<float>(), current_stream());
    const Tensor sorted = std::get<0>(at::sort(sample));
    const double share = static_cast<double>(k) / static_cast<double>(n), rank = share * kSample;
    const double deviation = 3 * std::sqrt(rank * (1 - share)) + 1;
    const auto key = [&](double place, uint32_t beyond) {
      return place < 1 || place > kSample ? beyond : order_key(sorted[std::llround(place) - 1].item<float>());
    };
    return {key(rank - deviation, 0), key(rank + deviation, UINT32_MAX)};
  }

  // The cut: key, number of ties, number of ties pruned. Throws if there is a NaN.
  std::vector<unsigned long long> find(int64_t begin) const {
    const int64_t capacity = std::max<int64_t>(n / 16, std::min<int64_t>(n, 1 << 20));
    const Tensor inside = empty(capacity * 4), histogram = empty((kRadixBins + 2) * 8), cut = empty(3 * 8);
    for (Bounds bounds = bracket();; bounds = {0, UINT32_MAX}) {
      const Tensor counts = empty(sizeof(Found));
      Found found{0, 0, static_cast<unsigned long long>(n)};
      counts.copy_(at::from_blob(&found, {static_cast<int64_t>(sizeof found)}, at::kByte));
      uint32_t* keys = static_cast<uint32_t*>(inside.mutable_data_ptr());
      count_scores(scores, n, bounds, keys, capacity, static_cast<Found*>(counts.mutable_data_ptr()), current_stream());
      found = read<Found>(counts)[0];
      TORCH_CHECK_VALUE(found.nan >= static_cast<unsigned long long>(n), "scores: expected no NaN, got one at index ",
                        begin + static_cast<int64_t>(found.nan));
      if (k == 0) return {0, 0, 0};
      const int64_t below = static_cast<int64_t>(found.below), within = static_cast<int64_t>(found.inside);
      if (k <= below || k > below + within) continue;  // the bounds do not enclose it
      const bool copied = within <= capacity;
      find_cut(copied ? keys : nullptr, scores, copied ? within : n, bounds, k - below,
               static_cast<unsigned long long*>(histogram.mutable_data_ptr()),
               static_cast<unsigned long long*>(cut.mutable_data_ptr()), current_stream());
      return read<unsigned long long>(cut);
    }
  }

  void write(const std::vector<unsigned long long>& cut, bool* kept, float* weights) const {
    const uint32_t threshold = static_cast<uint32_t>(cut[0]);
    const int64_t ties = static_cast<int64_t>(cut[1]), pruned = static_cast<int64_t>(cut[2]);
    if (pruned == ties)
      return write_mask(scores, n, threshold, k > 0 ? INT64_MAX : 0, nullptr, kept, weights, current_stream());
    const Tensor counts = at::empty({tie_chunks(n)}, options.dtype(at::kInt));
    count_ties(scores, n, threshold, counts.mutable_data_ptr<int32_t>(), current_stream());
    const Tensor before = at::cumsum(counts, 0) - counts;
    write_mask(scores, n, threshold, pruned, before.const_data_ptr<int64_t>(), kept, weights, current_stream());
  }
};

inline Tensor select_smallest_op(const Tensor& scores, at::IntArrayRef k, at::OptionalIntArrayRef sizes,
                                 const std::optional<Tensor>& weights) {
  check_select_smallest(scores, k, sizes, weights);
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

}  // namespace mfac::cuda
