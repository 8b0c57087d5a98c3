// Mask of the k smallest of n float32 scores, exact, ties to the lower index: no sort and no index array.
//
// A float maps to an unsigned key of the same order. The k-th smallest key is found digit by digit (11 + 11 + 10 bits):
// each pass counts the keys that share the digits found so far by their next digit and steps into the bucket that holds
// rank k. A last pass writes the mask; of the keys equal to the threshold, the first ones in index order are pruned, which
// a count of them per chunk makes independent of the threads. Five reads of the scores, one write of the mask.
#include <array>

#include "kernels.h"

namespace mfac::cpu {
namespace {

constexpr int64_t kChunk = 1 << 18;  // scores per task: 1 MiB, far more than a histogram
constexpr int kBuckets = 1 << 11;

uint32_t key(float score) {
  uint32_t bits;
  score += 0.0f;  // -0 and +0 tie
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace

int64_t select_smallest(const float* scores, int64_t n, int64_t k, bool* kept) {
  const int64_t chunks = ceil_div(n, kChunk);
  const auto bounds = [&](int64_t chunk) { return std::min(n, (chunk + 1) * kChunk); };

  std::vector<int64_t> nan(chunks, -1);
  parallel_for(chunks, kChunk, [&](int64_t chunk) {
    bool any = false;
    for (int64_t i = chunk * kChunk; i < bounds(chunk); ++i) any |= scores[i] != scores[i];
    for (int64_t i = chunk * kChunk; any && nan[chunk] < 0; ++i)
      if (scores[i] != scores[i]) nan[chunk] = i;
  });
  for (const int64_t position : nan)
    if (position >= 0) return position;
  if (k == 0 || k == n) {
    std::fill_n(kept, n, k == 0);
    return -1;
  }

  // Invariant: the k-th smallest key agrees with `threshold` in the bits of `found`, and `rank` of the keys that do are at
  // or below it.
  uint32_t threshold = 0, found = 0;
  int64_t rank = k;
  for (const int shift : {21, 10, 0}) {
    const uint32_t digit = shift == 0 ? 0x3ffu : 0x7ffu;
    std::vector<std::array<int64_t, kBuckets>> counts(num_threads() < chunks ? num_threads() : chunks);
    const int64_t tasks = static_cast<int64_t>(counts.size());
    parallel_for(tasks, kChunk, [&](int64_t task) {
      counts[task].fill(0);
      for (int64_t i = task * n / tasks; i < (task + 1) * n / tasks; ++i) {
        const uint32_t value = key(scores[i]);
        if ((value & found) == threshold) ++counts[task][value >> shift & digit];
      }
    });
    uint32_t bucket = 0;
    for (;; ++bucket) {
      int64_t in_bucket = 0;
      for (const auto& count : counts) in_bucket += count[bucket];
      if (rank <= in_bucket) break;
      rank -= in_bucket;
    }
    threshold |= bucket << shift;
    found |= digit << shift;
  }

  std::vector<int64_t> ties(chunks + 1, 0);
  parallel_for(chunks, kChunk, [&](int64_t chunk) {
    int64_t equal = 0;
    for (int64_t i = chunk * kChunk; i < bounds(chunk); ++i) equal += key(scores[i]) == threshold;
    ties[chunk + 1] = equal;
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) ties[chunk + 1] += ties[chunk];
  parallel_for(chunks, kChunk, [&](int64_t chunk) {
    int64_t left = rank - ties[chunk];  // equal keys still to be pruned in this chunk, not positive if none
    for (int64_t i = chunk * kChunk; i < bounds(chunk); ++i) {
      const uint32_t value = key(scores[i]);
      kept[i] = value > threshold || (value == threshold && left-- <= 0);
    }
  });
  return -1;
}

}  // namespace mfac::cpu
