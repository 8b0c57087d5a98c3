// Mask of the k smallest of n float32 scores, exact, ties to the lower index: no sort and no index array.
//
// A float maps to an unsigned key of the same order. The k-th smallest key is found digit by digit (11 + 11 + 10 bits):
// each pass counts the keys that share the digits found so far by their next digit and steps into the bucket that holds
// rank k. A last pass writes the mask; of the keys equal to the threshold the first in index order are pruned. How many of
// them each task's range holds is what its last histogram says, so the result does not depend on the number of tasks. Four
// reads of the scores, one write of the mask.
#include <array>

#include "kernels.h"

namespace mfac::cpu {
namespace {

constexpr int64_t kRange = 1 << 16;  // scores per task at least: many times what a histogram takes to clear and add
constexpr int64_t kTasks = 64;       // at most: their histograms take 1 MiB
constexpr int kBuckets = 1 << 11;
constexpr int kLanes = 4;  // histograms side by side, so that equal digits in a row do not wait for each other

uint32_t key(float score) {
  uint32_t bits;
  score += 0.0f;  // -0 and +0 tie
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

using Histogram = std::array<int64_t, kBuckets>;

// Counts the keys of n scores that agree with `prefix` in the bits of `found`, by their digit at `shift`.
Histogram count_digits(const float* scores, int64_t n, uint32_t found, uint32_t prefix, int shift, uint32_t digit) {
  std::array<std::array<uint32_t, kBuckets>, kLanes> lanes{};
  Histogram counts{};
  const auto count = [&](int64_t i, int lane) {
    const uint32_t value = key(scores[i]);
    if ((value & found) == prefix) ++lanes[lane][value >> shift & digit];
  };
  constexpr int64_t flush = int64_t{1} << 30;  // before a 32-bit counter can overflow
  for (int64_t begin = 0; begin < n; begin += flush) {
    const int64_t end = std::min(n, begin + flush), even = end - (end - begin) % kLanes;
    for (int64_t i = begin; i < even; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) count(i + lane, lane);
    for (int64_t i = even; i < end; ++i) count(i, 0);
    for (auto& lane : lanes) {
      for (int b = 0; b < kBuckets; ++b) counts[b] += lane[b];
      lane.fill(0);
    }
  }
  return counts;
}

}  // namespace

int64_t select_smallest(const float* scores, int64_t n, int64_t k, bool* kept) {
  const int64_t tasks = std::clamp<int64_t>(n / kRange, 1, kTasks);
  const auto begin = [&](int64_t task) { return task * n / tasks; };
  std::vector<Histogram> counts(tasks);
  const auto count_all = [&](uint32_t found, uint32_t prefix, int shift, uint32_t digit) {
    parallel_for(tasks, n / tasks, [&](int64_t task) {
      const int64_t first = begin(task);
      counts[task] = count_digits(scores + first, begin(task + 1) - first, found, prefix, shift, digit);
    });
  };

  // Invariant: the k-th smallest key agrees with `threshold` in the bits of `found`, and among the keys that do, in order,
  // it is number `rank`, counted from 1.
  uint32_t threshold = 0, found = 0, bucket = 0;
  int64_t rank = k;
  for (const int shift : {21, 10, 0}) {
    const uint32_t digit = shift == 0 ? 0x3ffu : 0x7ffu;
    count_all(found, threshold, shift, digit);
    if (shift == 21) {
      // NaN has the digits of infinity, or lies beyond: only then is it looked for.
      int64_t suspects = 0;
      for (const Histogram& count : counts)
        for (const int b : {0, 1, 2, 3, 0x7fc, 0x7fd, 0x7fe, 0x7ff}) suspects += count[b];
      for (int64_t i = 0; suspects > 0 && i < n; ++i)
        if (std::isnan(scores[i])) return i;
      if (k == 0 || k == n) {
        std::fill_n(kept, n, k == 0);
        return -1;
      }
    }
    for (bucket = 0;; ++bucket) {
      int64_t in_bucket = 0;
      for (const Histogram& count : counts) in_bucket += count[bucket];
      if (rank <= in_bucket) break;
      rank -= in_bucket;
    }
    threshold |= bucket << shift;
    found |= digit << shift;
  }

  std::vector<int64_t> ties(tasks + 1, 0);  // keys equal to the threshold before each task's range
  for (int64_t task = 0; task < tasks; ++task) ties[task + 1] = ties[task] + counts[task][bucket];
  parallel_for(tasks, n / tasks, [&](int64_t task) {
    int64_t left = rank - ties[task];  // equal keys still to be pruned in this range, not positive if none
    for (int64_t i = begin(task); i < begin(task + 1); ++i) {
      const uint32_t value = key(scores[i]);
      kept[i] = value > threshold || (value == threshold && left-- <= 0);
    }
  });
  return -1;
}

}  // namespace mfac::cpu
