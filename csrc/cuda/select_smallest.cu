// Masks of the k smallest of n float32 scores, exact, ties to the lower index, in two reads of the scores and one
// write.
//
//   key      uint32 in the order of the scores (order_key.h)
//   sample   2^16 scores give two keys that nearly always enclose the k-th smallest (select_smallest.h)
//   count    one read: the number of keys below, and a copy of those in bounds, one in a hundred
//   cut      radix select of these: 11, 11 and 10 bits, a histogram each, prefix-summed by one block of threads
//   write    one read: kept = key > cut; of the keys equal to the cut the first in index order are pruned. If not all
//            of them are, one more read counts them in each chunk, for the prefix sum over chunks.
//
// If the sample does not enclose it, or with too many equal keys, one or three more reads are needed; the mask is exact
// in any case. 4 + 4 bytes are read and 1 is written per score, 8 more for weights. All sums are of integers: the
// result does not depend on their order.
#include "columns.cuh"
#include "order_key.h"

namespace mfac::cuda {
namespace {

constexpr int kScoresPerThread = 16;                 // scores: four loads of 16 bytes, and 16 bytes of the mask
constexpr int kChunk = kThreads * kScoresPerThread;  // scores of a block of threads
constexpr int kQuad = 4;                             // scores of one load of 16 bytes
constexpr int64_t kMaxBlocks = 132 * 32;  // of a histogram: 32 per multiprocessor of an H100, each with its own bins

struct alignas(16) Quad {
  float score[kQuad];
};

// Four scores from position i on, by one load if they are aligned; zeros past the end.
__device__ inline Quad load_quad(const float* __restrict__ scores, int64_t i, int64_t n) {
  Quad quad = {};
  if (i + kQuad <= n && reinterpret_cast<uintptr_t>(scores + i) % sizeof(Quad) == 0) {
    quad = *reinterpret_cast<const Quad*>(scores + i);
  } else {
#pragma unroll
    for (int e = 0; e < kQuad; ++e)
      if (i + e < n) quad.score[e] = scores[i + e];
  }
  return quad;
}

// scores [n], sample [count].
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* __restrict__ scores, int64_t n, int64_t count, float* __restrict__ sample) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= count) return;
  const uint32_t random = static_cast<uint32_t>(i) * 2654435761u;  // no aliasing with a period in the scores
  const double stride = static_cast<double>(n) / static_cast<double>(count);
  const int64_t position = static_cast<int64_t>((static_cast<double>(i) + random * 0x1p-32) * stride);
  sample[i] = scores[position < n ? position : n - 1];
}

// scores [n], inside [capacity], found [1]; kScoresPerThread scores for each thread, four at a time.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const float* __restrict__ scores, int64_t n, Bounds bounds, uint32_t* __restrict__ inside,
                 int64_t capacity, Found* __restrict__ found) {
  const int lane = threadIdx.x % kWarp;
  unsigned below = 0;
  for (int q = 0; q < kScoresPerThread / kQuad; ++q) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(kChunk) + (q * kThreads + threadIdx.x) * kQuad;
    const Quad quad = load_quad(scores, i, n);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      const bool valid = i + e < n;
      if (valid && quad.score[e] != quad.score[e]) atomicMin(&found->nan, static_cast<unsigned long long>(i + e));
      const uint32_t key = order_key(quad.score[e]);
      below += valid && key < bounds.low;
      const bool in_bounds = valid && bounds.low <= key && key <= bounds.high;
      const unsigned votes = __ballot_sync(kAllLanes, in_bounds);
      if (votes == 0) continue;  // uniform in the warp
      unsigned long long start = 0;
      if (lane == 0) start = atomicAdd(&found->inside, static_cast<unsigned long long>(__popc(votes)));
      start = __shfl_sync(kAllLanes, start, 0);
      const int64_t place = static_cast<int64_t>(start) + __popc(votes & ((1u << lane) - 1));
      if (in_bounds && place < capacity) inside[place] = key;
    }
  }
  for (int bits = kWarp / 2; bits > 0; bits /= 2) below += __shfl_xor_sync(kAllLanes, below, bits);
  if (lane == 0 && below) atomicAdd(&found->below, static_cast<unsigned long long>(below));
}

// The state of the radix select: the leading bits of the k-th smallest key, and its rank among the keys that share
// them.
struct Search {
  unsigned long long prefix, left;
};

// keys [n] or null, scores [n], bins [kRadixBins]: bins[digit] += keys whose bits above `shift + bits` are the prefix;
// digit = the `bits` bits above `shift`.
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const uint32_t* __restrict__ keys, const float* __restrict__ scores, int64_t n, Bounds bounds,
                     const Search* __restrict__ search, int shift, int bits, unsigned long long* __restrict__ bins) {
  unsigned* own = shared<unsigned[kRadixBins]>();
  const int lane = threadIdx.x % kWarp;
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) own[bin] = 0;
  __syncthreads();
  const uint64_t prefix = search->prefix;
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads), rounds = (n + step - 1) / step;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t i = round * step + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
    const uint32_t key = i < n ? keys ? keys[i] : order_key(scores[i]) : 0;
    const bool counts =
        i < n && bounds.low <= key && key <= bounds.high && static_cast<uint64_t>(key) >> (shift + bits) == prefix;
    const unsigned digit = key >> shift & ((1u << bits) - 1);
    // Most keys fall into few bins: lanes with the same digit as the first add once, together.
    const unsigned votes = __ballot_sync(kAllLanes, counts);
    if (votes == 0) continue;
    int leader = 0;
    while (!(votes >> leader & 1)) ++leader;
    const unsigned first = __shfl_sync(kAllLanes, digit, leader);
    const unsigned same = __ballot_sync(kAllLanes, counts && digit == first);
    if (lane == leader) atomicAdd(&own[first], static_cast<unsigned>(__popc(same)));
    if (counts && digit != first) atomicAdd(&own[digit], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads)
    if (own[bin]) atomicAdd(&bins[bin], static_cast<unsigned long long>(own[bin]));
}

// search [1], bins [kRadixBins].
__global__ void start_kernel(int64_t k, Search* search, unsigned long long* bins) {
  for (int bin = threadIdx.x; bin < kRadixBins; bin += kThreads) bins[bin] = 0;
  if (threadIdx.x == 0) *search = {0, static_cast<unsigned long long>(k)};
}

// Finds the bin in which the k-th key lies, into search [1] and cut [3], and clears bins [kRadixBins].
__global__ void __launch_bounds__(kThreads)
    digit_kernel(unsigned long long* bins, int bits, Search* search, unsigned long long* cut) {
  constexpr int kEach = kRadixBins / kThreads;  // bins per thread
  unsigned long long* sums = shared<unsigned long long[kThreads]>();
  unsigned long long sum = 0;
  for (int e = 0; e < kEach; ++e) sum += bins[threadIdx.x * kEach + e];
  sums[threadIdx.x] = sum;
  __syncthreads();
  unsigned long long before = 0;
  for (int t = 0; t < static_cast<int>(threadIdx.x); ++t) before += sums[t];
  const unsigned long long left = search->left, prefix = search->prefix;
  __syncthreads();
  for (int e = 0; e < kEach; ++e) {
    const int bin = threadIdx.x * kEach + e;
    const unsigned long long count = bins[bin];
    bins[bin] = 0;
    if (before < left && left <= before + count) {
      search->prefix = prefix << bits | static_cast<unsigned>(bin);
      search->left = left - before;
      cut[0] = search->prefix;
      cut[1] = count;
      cut[2] = left - before;
    }
    before += count;
  }
}

// counts[chunk]: scores of the chunk that are equal to the threshold.
__global__ void __launch_bounds__(kThreads)
    ties_kernel(const float* __restrict__ scores, int64_t n, uint32_t threshold, int32_t* __restrict__ counts) {
  int32_t* sums = shared<int32_t[kThreads / kWarp]>();
  int32_t count = 0;
  for (int q = 0; q < kScoresPerThread / kQuad; ++q) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(kChunk) + (q * kThreads + threadIdx.x) * kQuad;
    const Quad quad = load_quad(scores, i, n);
#pragma unroll
    for (int e = 0; e < kQuad; ++e) count += i + e < n && order_key(quad.score[e]) == threshold;
  }
  for (int bits = kWarp / 2; bits > 0; bits /= 2) count += __shfl_xor_sync(kAllLanes, count, bits);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) count += sums[warp];
  counts[blockIdx.x] = count;
}

// kept and weights (or null) [n]. `ordered`: some of the ties are kept, so that their order matters; ties_before[chunk]
// is the number of ties in the chunks before.
template <bool ordered>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(const float* __restrict__ scores, int64_t n, uint32_t threshold, int64_t pruned_ties,
                const int64_t* __restrict__ ties_before, bool* __restrict__ kept, float* __restrict__ weights) {
  int32_t* sums = shared<int32_t[kThreads / kWarp]>();
  int64_t before = ordered ? ties_before[blockIdx.x] : 0;  // ties at lower positions
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int q = 0; q < kScoresPerThread / kQuad; ++q) {
    const int64_t i = blockIdx.x * static_cast<int64_t>(kChunk) + (q * kThreads + threadIdx.x) * kQuad;
    const Quad quad = load_quad(scores, i, n);
    int64_t rank = before;
    if constexpr (ordered) {
      int32_t own = 0;
#pragma unroll
      for (int e = 0; e < kQuad; ++e) own += i + e < n && order_key(quad.score[e]) == threshold;
      int32_t sum = own;
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (lane == kWarp - 1) sums[warp] = sum;
      __syncthreads();
      rank += sum - own;
      for (int w = 0; w < kThreads / kWarp; ++w) {
        if (w < warp) rank += sums[w];
        before += sums[w];
      }
      __syncthreads();
    }
    bool keep[kQuad];
#pragma unroll
    for (int e = 0; e < kQuad; ++e) {
      const uint32_t key = order_key(quad.score[e]);
      keep[e] = key > threshold || (key == threshold && rank >= pruned_ties);
      if (ordered && key == threshold) ++rank;
    }
    if (i + kQuad <= n && reinterpret_cast<uintptr_t>(kept + i) % kQuad == 0) {
      uint32_t packed = 0;
#pragma unroll
      for (int e = 0; e < kQuad; ++e) packed |= static_cast<uint32_t>(keep[e]) << (8 * e);
      *reinterpret_cast<uint32_t*>(kept + i) = packed;
    } else {
#pragma unroll
      for (int e = 0; e < kQuad; ++e)
        if (i + e < n) kept[i + e] = keep[e];
    }
    if (!weights) continue;
#pragma unroll
    for (int e = 0; e < kQuad; ++e)
      if (i + e < n && !keep[e]) weights[i + e] = 0;
  }
}

}  // namespace

void sample_scores(const float* scores, int64_t n, int64_t count, float* sample, Stream stream) {
  launch(sample_kernel, ceil_div(count, kThreads), kThreads, 0, stream, scores, n, count, sample);
}

void count_scores(const float* scores, int64_t n, Bounds bounds, uint32_t* inside, int64_t capacity, Found* found,
                  Stream stream) {
  launch(count_kernel, ceil_div(n, kChunk), kThreads, 0, stream, scores, n, bounds, inside, capacity, found);
}

void find_cut(const uint32_t* keys, const float* scores, int64_t n, Bounds bounds, int64_t k,
              unsigned long long* histogram, unsigned long long* cut, Stream stream) {
  Search* search = reinterpret_cast<Search*>(histogram + kRadixBins);
  launch(start_kernel, 1, kThreads, 0, stream, k, search, histogram);
  const int64_t most = ceil_div(n, kChunk), blocks = most < kMaxBlocks ? most : kMaxBlocks;
  int shift = 32;
  for (const int bits : {11, 11, 10}) {
    shift -= bits;
    launch(histogram_kernel, blocks, kThreads, sizeof(unsigned[kRadixBins]), stream, keys, scores, n, bounds, search,
           shift, bits, histogram);
    launch(digit_kernel, 1, kThreads, sizeof(unsigned long long[kThreads]), stream, histogram, bits, search, cut);
  }
}

int64_t tie_chunks(int64_t n) { return ceil_div(n, kChunk); }

void count_ties(const float* scores, int64_t n, uint32_t threshold, int32_t* tie_counts, Stream stream) {
  launch(ties_kernel, tie_chunks(n), kThreads, sizeof(int32_t[kThreads / kWarp]), stream, scores, n, threshold,
         tie_counts);
}

void write_mask(const float* scores, int64_t n, uint32_t threshold, int64_t pruned_ties, const int64_t* ties_before,
                bool* kept, float* weights, Stream stream) {
  launch(ties_before ? mask_kernel<true> : mask_kernel<false>, tie_chunks(n), kThreads,
         sizeof(int32_t[kThreads / kWarp]), stream, scores, n, threshold, pruned_ties, ties_before, kept, weights);
}

}  // namespace mfac::cuda
