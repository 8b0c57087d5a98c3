// The product of sparse rows with a tile of dense columns: what linear and conv2d are made of.
//
//   acc[r][p] = Σ_s values[s][r] · tile[columns[s][r]][p]     r < 4 rows of a slice, p < V vectors of samples or pixels
//
// A tile holds V vectors of each of the K inputs, [K + 1][V · lanes] float32, aligned to 64 bytes and contiguous, with
// zeros in row K for entries that are no weight. It is packed once and read by all rows of W. 4 V accumulators stay in
// registers while the entries of a slice stream by, 4 to 6 bytes each. Per entry: a column to an address, a broadcast
// and V multiply-adds with an operand from the tile, hence V + 1 loads of which two go through per cycle: at most
// 2 V / (V + 1) multiply-adds per cycle, 1.33 for V = 2, and 2 for blocks of four rows, which load an input once for
// four. (Dense products do two.) That holds while the tile is in L1, so V is 2 where K exceeds 170 with AVX-512; beyond
// 256 inputs part of the tile comes from L2, which costs less than the second broadcast per entry that V = 1 takes.
// Four rows at a time give the 8 independent sums that the latency of a multiply-add needs; they have like numbers of
// entries, so that one loop and one branch per step serve all.
//
// Every sum runs over the entries of its row in the order in which they are stored, so the result depends neither on
// the number of threads nor on the place of a pixel in a tile.
#pragma once

#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "partial.h"

namespace mfac::sparse {

// Vectors of a tile: 4 rows of them as accumulators, and the operands, fit in the 32 registers of AVX-512 and aarch64
// and the 16 of AVX2 and SSE.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif
constexpr int kMaxWidth = kMaxVectors * kFloats;
constexpr int kMinVectors = 2;  // also where such a tile exceeds L1: measured, 1 is a tenth slower at 512 inputs
constexpr int64_t kTileBytes = 32 * 1024;  // of an L1 cache of 48 KiB, beside entries and results

// With fewer tiles than this all are packed first, and a task is a window of rows of a tile; else a task is a tile.
constexpr int64_t kManyTiles = 6;

constexpr int64_t kCopyCost = 16;  // multiply-adds that take as long as packing an element, for parallel_for

// Vectors of a tile of K inputs.
inline int tile_vectors(int64_t inputs) {
  const int64_t fitting = kTileBytes / (std::max<int64_t>(inputs, 1) * static_cast<int64_t>(sizeof(Floats)));
  return static_cast<int>(std::clamp<int64_t>(fitting, kMinVectors, kMaxVectors));
}

// Calls sink(row of W, acc) for each row of the slices [first, last). Not inlined: the accumulators need the registers.
template <int V, bool kBlocks, typename T, typename Sink>
[[gnu::noinline]] void multiply_slices(const Weights<T>& weights, int64_t first, int64_t last, const float* tile,
                                       Sink& sink) {
  constexpr int64_t width = V * kFloats;
  for (int64_t slice = first; slice < last; ++slice) {
    Floats acc[kSliceRows][V] = {};
    const int64_t begin = weights.pointers[slice], end = weights.pointers[slice + 1];
    const T* value = weights.values + begin * kSliceRows;
    const int16_t* column = weights.columns + begin * (kBlocks ? 1 : kSliceRows);
    for (int64_t step = begin; step < end; ++step, value += kSliceRows, column += kBlocks ? 1 : kSliceRows) {
      Floats x[V];
      uint64_t places = static_cast<uint16_t>(column[0]);  // of the four rows, one load for all (little-endian)
      if constexpr (!kBlocks) std::memcpy(&places, column, sizeof places);
#pragma GCC unroll 4
      for (int r = 0; r < kSliceRows; ++r) {
        if (!kBlocks || r == 0) {
          const Floats* source = reinterpret_cast<const Floats*>(tile + (places >> 16 * r & 0xffff) * width);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) x[v] = source[v];
        }
        const float w = value[r];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += w * x[v];
      }
    }
    for (int r = 0; r < kSliceRows; ++r)
      if (const int64_t row = weights.order[slice * kSliceRows + r]; row >= 0) sink(row, acc[r]);
  }
}

// Calls f with V as a compile-time constant, and with whether there are blocks.
template <int V = kMaxVectors, typename F>
void dispatch_vectors(int64_t vectors, bool blocks, const F& f) {
  if constexpr (V > 1)
    if (vectors < V) return dispatch_vectors<V - 1>(vectors, blocks, f);
  if (blocks)
    f(std::integral_constant<int, V>(), std::true_type());
  else
    f(std::integral_constant<int, V>(), std::false_type());
}

// The product of W with `samples` columns. pack(first, count, width, tile) writes columns first to first + count of the
// right-hand side to rows 0 to K - 1 of a tile that is `width` wide, zeros beyond them. make_sink(first, count, window)
// returns what takes the rows of a window: sink(row, acc), and sink.finish_window() after the last. Tasks are cut by
// the shape alone.
template <typename Sink, typename T, typename Pack, typename MakeSink>
void multiply(const Weights<T>& weights, int64_t samples, const Pack& pack, const MakeSink& make_sink) {
  const int64_t width = tile_vectors(weights.inputs) * kFloats, tiles = cpu::ceil_div(samples, width);
  const int64_t windows = weights.windows(), slices = weights.slices(), rows = weights.inputs + 1;
  const int64_t entries = static_cast<int64_t>(weights.pointers[slices]) * kSliceRows;
  const auto fill = [&](int64_t t, float* tile) {
    const int64_t count = std::min(width, samples - t * width), used = cpu::round_up(count, kFloats);
    pack(t * width, count, used, tile);
    std::fill_n(tile + weights.inputs * used, used, 0.0f);
  };
  const auto multiply_window = [&](int64_t t, int64_t window, const float* tile) {
    const int64_t count = std::min(width, samples - t * width);
    const int64_t first = window * kWindowSlices, last = std::min(slices, first + kWindowSlices);
    Sink sink = make_sink(t * width, count, window);
    dispatch_vectors(cpu::ceil_div(count, kFloats), weights.blocks, [&](auto vectors, auto blocks) {
      multiply_slices<vectors(), blocks()>(weights, first, last, tile, sink);
    });
    sink.finish_window();
  };
  if (tiles >= kManyTiles) {
    cpu::parallel_for(tiles, entries * width, [&](int64_t t) {
      cpu::Buffer<float> tile(rows * width);
      fill(t, tile);
      for (int64_t window = 0; window < windows; ++window) multiply_window(t, window, tile);
    });
    return;
  }
  cpu::Buffer<float> all(tiles * rows * width);
  cpu::parallel_for(tiles, kCopyCost * rows * width, [&](int64_t t) { fill(t, all + t * rows * width); });
  cpu::parallel_for(tiles * windows, entries * width / std::max<int64_t>(windows, 1),
                    [&](int64_t i) { multiply_window(i / windows, i % windows, all + i / windows * rows * width); });
}

}  // namespace mfac::sparse
