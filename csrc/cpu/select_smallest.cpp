// Masks of the k smallest of n float32 scores, exact, ties to the lower index: no sort, no index array, and two reads
// of the scores, at the speed of memory.
//
//   1  A partially sorted sample gives two values low <= high that enclose the k-th smallest with a probability of
//      99.7 %: its rank in the sample is known to within three standard deviations.
//   2  One pass counts the scores below low, equal to low and equal to high, and copies those in between, one in a
//      hundred. The k-th smallest is low, high, or in the copy. If it is not, a larger sample is drawn, in the end all
//      scores.
//   3  One pass writes the mask and zeroes the weights. Of the scores equal to the k-th the first in index order are
//      pruned; how many of them the range of each task has is known from the second step.
//
// Tasks are cut by the number of scores alone and the sample has fixed positions: the same result for any number of
// threads.
#include "kernels.h"

namespace mfac::cpu {
namespace {

constexpr int64_t kMinTaskScores = 1 << 16;  // 256 KiB: reading them takes longer than starting a task
constexpr int64_t kMaxTasks = 64;            // of any number of scores: enough to balance the load of the threads
constexpr int64_t kSample = 1 << 16;  // of 25 million scores, partial sorts of it and of those in between cost the same

struct Count {
  int64_t below = 0, at_low = 0, at_high = 0;
  bool nan = false;
  std::vector<float> between;
};

Count count_scores(const float* scores, int64_t n, float low, float high) {
  constexpr int64_t lanes = kLanes<float>, step = 4 * lanes;
  using Ints = VectorN<int32_t, lanes>;  // a comparison yields -1 where it holds
  Ints below{}, at_low{}, at_high{}, nan{};
  Count count;
  std::vector<float> between(step);
  size_t found = 0;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    alignas(64) Ints inside[4];
    Ints any{};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const Vector<float> x = load<float>(scores + i + v * lanes);
      below -= x < low;
      at_low -= x == low;
      at_high -= x == high;
      nan |= x != x;
      any |= inside[v] = (x > low) & (x < high);
    }
    uint64_t parts[sizeof any / sizeof(uint64_t)], some = 0;
    std::memcpy(parts, &any, sizeof any);
    for (const uint64_t part : parts) some |= part;
    if (!some) continue;
    if (between.size() < found + step) between.resize(2 * between.size());
    const int32_t* flags = reinterpret_cast<const int32_t*>(inside);
    for (int64_t v = 0; v < step; ++v) {  // branch-free, as a branch would be mispredicted
      between[found] = scores[i + v];
      found -= flags[v];
    }
  }
  between.resize(found);
  count.between = std::move(between);
  for (int64_t v = 0; v < lanes; ++v) {
    count.below += below[v];
    count.at_low += at_low[v];
    count.at_high += at_high[v];
    count.nan = count.nan || nan[v];
  }
  for (; i < n; ++i) {
    count.below += scores[i] < low;
    count.at_low += scores[i] == low;
    count.at_high += scores[i] == high;
    count.nan = count.nan || std::isnan(scores[i]);
    if (low < scores[i] && scores[i] < high) count.between.push_back(scores[i]);
  }
  return count;
}

// kept[i] = scores[i] > threshold, and of the `ties` scores equal to it all but the first `pruned_ties`. Weights, if
// `zero`, become zero where pruned.
template <bool zero>
void write_mask(const float* __restrict scores, int64_t n, float threshold, int64_t ties, int64_t pruned_ties,
                bool* __restrict kept, float* weights) {
  const auto write = [&](int64_t i, bool keep) {
    kept[i] = keep;
    if (zero) weights[i] = keep ? weights[i] : 0.0f;
  };
  if (pruned_ties <= 0)
    for (int64_t i = 0; i < n; ++i) write(i, scores[i] >= threshold);
  else if (pruned_ties >= ties)
    for (int64_t i = 0; i < n; ++i) write(i, scores[i] > threshold);
  else
    for (int64_t i = 0; i < n; ++i) write(i, scores[i] > threshold || (scores[i] == threshold && pruned_ties-- <= 0));
}

// Two values of the sample that probably enclose the k-th smallest of all (infinite where the sample does not reach far
// enough), or NaN if the sample has one.
std::pair<float, float> bracket(const float* scores, int64_t n, int64_t k, std::vector<float>& sample) {
  const int64_t count = static_cast<int64_t>(sample.size());
  const double stride = static_cast<double>(n) / static_cast<double>(count);
  uint32_t random = 1;
  for (int64_t i = 0; i < count; ++i) {  // one at random of each `stride` scores: no aliasing with a period in them
    random = random * 1664525u + 1013904223u;
    const double position = (static_cast<double>(i) + (count < n ? random * 0x1p-32 : 0)) * stride;
    sample[i] = scores[std::min(n - 1, static_cast<int64_t>(position))];
    if (std::isnan(sample[i])) return {sample[i], sample[i]};
  }
  const double share = static_cast<double>(k) / static_cast<double>(n), rank = share * static_cast<double>(count);
  const double deviation = count < n ? 3 * std::sqrt(rank * (1 - share)) + 1 : 0;
  const auto at = [&](double place, auto from) {  // all before `from` are known to be smaller
    const auto nth = sample.begin() + std::clamp<int64_t>(std::llround(place) - 1, 0, count - 1);
    std::nth_element(from, nth, sample.end());
    return nth;
  };
  const bool all = count == n, from_least = !all && rank - deviation < 1,
             to_greatest = !all && rank + deviation > count;
  const auto low = from_least ? sample.begin() : at(rank - deviation, sample.begin());
  const float least = from_least ? -INFINITY : *low;
  return {least, to_greatest ? INFINITY : *at(rank + deviation, low)};
}

// Where to cut n scores, and for each task's range of them how many are equal to the threshold and how many of these
// are pruned: all if there are fewer, none if that is not positive.
struct Cut {
  explicit Cut(int64_t size)
      : n(size), tasks(std::clamp<int64_t>(n / kMinTaskScores, 1, kMaxTasks)), ties(tasks), pruned_ties(tasks) {}
  int64_t begin(int64_t task) const { return task * n / tasks; }

  int64_t n, tasks;
  float threshold = -INFINITY;
  std::vector<int64_t> ties, pruned_ties;
};

// Fills in the cut below which k scores lie. Returns false if there is a NaN.
bool find_cut(const float* scores, int64_t k, Cut& cut) {
  const int64_t n = cut.n;
  std::vector<Count> counts(cut.tasks);
  const auto total = [&](const auto& number) {
    int64_t sum = 0;
    for (const Count& count : counts) sum += number(count);
    return sum;
  };
  for (int64_t size = std::min(n, kSample); n > 0; size = std::min(n, 8 * size)) {
    std::vector<float> sample(size), between;
    const auto [low, high] = bracket(scores, n, k, sample);
    if (std::isnan(low)) return false;
    parallel_for(cut.tasks, n / cut.tasks, [&, low = low, high = high](int64_t task) {
      counts[task] = count_scores(scores + cut.begin(task), cut.begin(task + 1) - cut.begin(task), low, high);
    });
    if (total([](const Count& count) { return count.nan; }) > 0) return false;
    if (k == 0) return true;
    for (const Count& count : counts) between.insert(between.end(), count.between.begin(), count.between.end());
    const int64_t at_low = total([](const Count& count) { return count.at_low; });
    const int64_t at_high = low < high ? total([](const Count& count) { return count.at_high; }) : 0;
    const int64_t inside = static_cast<int64_t>(between.size());
    int64_t left = k - total([](const Count& count) { return count.below; });  // to be pruned of those not below low
    if (left <= 0 || left > at_low + inside + at_high) continue;               // an unlucky sample
    if (left <= at_low) {
      cut.threshold = low;
      for (int64_t task = 0; task < cut.tasks; ++task) cut.ties[task] = counts[task].at_low;
    } else if (left > at_low + inside) {
      cut.threshold = high;
      left -= at_low + inside;
      for (int64_t task = 0; task < cut.tasks; ++task) cut.ties[task] = counts[task].at_high;
    } else {
      left -= at_low;
      std::nth_element(between.begin(), between.begin() + left - 1, between.end());
      cut.threshold = between[left - 1];
      left -= std::count_if(between.begin(), between.end(), [&](float x) { return x < cut.threshold; });
      for (int64_t task = 0; task < cut.tasks; ++task)
        cut.ties[task] = std::count(counts[task].between.begin(), counts[task].between.end(), cut.threshold);
    }
    for (int64_t task = 0; task < cut.tasks; left -= cut.ties[task++]) cut.pruned_ties[task] = left;
    return true;
  }
  return true;
}

}  // namespace

int64_t select_smallest(const float* scores, const int64_t* sizes, const int64_t* k, int64_t segments, bool* kept,
                        float* weights) {
  std::vector<Cut> cuts;
  for (int64_t i = 0, begin = 0; i < segments; begin += sizes[i++]) {
    cuts.emplace_back(sizes[i]);
    const float* segment = scores + begin;
    if (!find_cut(segment, k[i], cuts.back()))
      return std::find_if(segment, segment + sizes[i], [](float x) { return std::isnan(x); }) - scores;
  }
  for (const Cut& cut : cuts) {
    parallel_for(cut.tasks, cut.n / cut.tasks, [&](int64_t task) {
      const int64_t first = cut.begin(task), size = cut.begin(task + 1) - first;
      const auto write = weights ? write_mask<true> : write_mask<false>;
      write(scores + first, size, cut.threshold, cut.ties[task], cut.pruned_ties[task], kept + first,
            weights ? weights + first : nullptr);
    });
    scores += cut.n;
    kept += cut.n;
    weights += weights ? cut.n : 0;
  }
  return -1;
}

}  // namespace mfac::cpu
