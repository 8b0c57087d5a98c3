// Product with sparse weights: y[m][row] = activation(Σ_k W[row][k] x[m][k] + bias[row]).
//
// Several samples: samples are the columns of tile.h. A tile of x is transposed when it is packed, and the results of a
// window of 128 rows are collected in L1 and transposed when they are written. Traffic: x and y once, W once per tile.
//
// One sample: entries are read as they lie, a vector of them at a time, and x is gathered from L1 by their columns:
//
//   acc[lane] += values[lane] · x[columns[lane]],   lane = 4 step + row of the slice
//
// and the lanes of a row are added at the end of its slice. One task per window of rows; W, 6 bytes per entry, is read
// once from where it lies, and that or the gather (some 10 cycles for 16 entries) is the limit.
#include <atomic>

#include "tile.h"

namespace mfac::sparse {

namespace {

constexpr int kSteps = kFloats / kSliceRows;  // steps of a slice in a vector

using Columns = cpu::VectorN<uint16_t, kFloats>;  // int16, of which negative ones are large

#if defined(__AVX2__) && !defined(MFAC_VECTOR_BYTES)
inline __m256 gather_eight(const float* x, __m128i columns) {
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(columns), sizeof(float));
}
#endif

// x[columns[i]], i < kFloats. Gathers of 8: one of 16 takes a seventh longer than two of them (Sapphire Rapids).
inline Floats gather(const float* x, Columns columns) {
#if defined(__AVX512DQ__) && !defined(MFAC_VECTOR_BYTES)
  const __m256i both = cast<__m256i>(columns);
  const __m256 low = gather_eight(x, _mm256_castsi256_si128(both));
  const __m256 high = gather_eight(x, _mm256_extracti128_si256(both, 1));
  return _mm512_maskz_insertf32x8(-1, _mm512_castps256_ps512(low), high, 1);  // masked: no false warning from GCC 12
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(MFAC_VECTOR_BYTES)
  return gather_eight(x, cast<__m128i>(columns));
#else
  Floats values{};
  for (int i = 0; i < kFloats; ++i) values[i] = x[columns[i]];
  return values;
#endif
}

// The first `count` columns at p, and `fill` for the others.
inline Columns load_columns(const int16_t* p, int64_t count, uint16_t fill) {
  Columns columns = Columns{} + fill;
  if (count >= kFloats) {
    std::memcpy(&columns, p, sizeof columns);
    return columns;
  }
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(MFAC_VECTOR_BYTES)
  return cast<Columns>(_mm256_mask_loadu_epi16(cast<__m256i>(columns), (1u << count) - 1, p));
#else
  for (int64_t i = 0; i < count; ++i) columns[i] = static_cast<uint16_t>(p[i]);
  return columns;
#endif
}

using FourRows = cpu::VectorN<float, kSliceRows>;

// The sums of the four rows of a slice. x[inputs + 1] ends in a zero, which is also read for a column that is out of
// range; `seen` becomes the largest columns met. (A check here, in registers, is free; a pass of its own takes a fifth
// longer.)
template <typename T>
FourRows multiply_slice(const Weights<T>& weights, int64_t slice, const float* x, Columns& seen) {
  const int64_t begin = weights.pointers[slice], end = weights.pointers[slice + 1];
  const T* values = weights.values + begin * kSliceRows;
  const auto limit = static_cast<uint16_t>(weights.inputs);
  Floats acc{};
  FourRows sums{};
  if (weights.blocks) {
    for (int64_t step = begin; step < end; ++step, values += kSliceRows) {
      const auto column = static_cast<uint16_t>(weights.columns[step]);
      seen[0] = std::max<uint16_t>(seen[0], column);
      FourRows w{};
      for (int r = 0; r < kSliceRows; ++r) w[r] = values[r];
      sums += w * x[std::min(column, limit)];
    }
    return sums;
  }
  const int16_t* column = weights.columns + begin * kSliceRows;
  for (int64_t left = (end - begin) * kSliceRows; left > 0; left -= kFloats, values += kFloats, column += kFloats) {
    const Columns places = load_columns(column, left, limit);
    seen = places > seen ? places : seen;
    acc += load_partial(values, left) * gather(x, places > limit ? Columns{} + limit : places);
  }
  FourRows parts[kSteps];
  std::memcpy(parts, &acc, sizeof parts);
  for (int i = 0; i < kSteps; ++i) sums += parts[i];
  return sums;
}

template <typename T>
bool multiply_vector(const Weights<T>& weights, const Epilogue<T>& epilogue, const T* x, T* y) {
  cpu::Buffer<float> input(weights.inputs + kFloats);
  widen_row(x, weights.inputs, input);
  input[weights.inputs] = 0;
  const int64_t entries = static_cast<int64_t>(weights.pointers[weights.slices()]) * kSliceRows;
  std::atomic<bool> in_range = true;
  constexpr int64_t kEntryCost = 8;  // multiply-adds of a dense product that take as long as an entry, for parallel_for
  cpu::parallel_for(
      weights.windows(), kEntryCost * entries / std::max<int64_t>(weights.windows(), 1), [&](int64_t window) {
        const int64_t first = window * kWindowRows, rows = std::min<int64_t>(kWindowRows, weights.rows - first);
        const int64_t last = std::min(weights.slices(), (window + 1) * kWindowSlices);
        alignas(64) float sums[kWindowRows + 1];  // and one for what is no row
        Columns seen{};
        for (int64_t slice = window * kWindowSlices; slice < last; ++slice) {
          const FourRows four = multiply_slice(weights, slice, input, seen);
          for (int r = 0; r < kSliceRows; ++r) {
            const int64_t row = weights.order[slice * kSliceRows + r];
            sums[row < 0 ? kWindowRows : row - first] = four[r];
          }
        }
        for (int i = 0; i < kFloats; ++i)
          if (seen[i] > weights.inputs) in_range = false;
        for (int64_t i = 0; i < rows; i += kFloats) {
          const Floats bias = epilogue.bias ? load_partial(epilogue.bias + first + i, rows - i) : Floats{};
          store_partial(y + first + i, finish(cpu::load<float>(sums + i) + bias, 0, epilogue.low, epilogue.high),
                        rows - i);
        }
      });
  return in_range;
}

// Collects the rows of a window, and writes them to y[m, rows] transposed.
template <typename T>
struct TransposedSink {
  const Epilogue<T>& epilogue;
  T* y;
  int64_t rows, count, first_row;  // of W; samples of the tile; first row of the window
  cpu::Buffer<float> values, turned;

  TransposedSink(const Epilogue<T>& e, T* out, int64_t all_rows, int64_t samples, int64_t first)
      : epilogue(e),
        y(out),
        rows(all_rows),
        count(samples),
        first_row(first),
        values(kWindowRows * kMaxWidth),
        turned(std::is_same_v<T, float> ? 0 : kWindowRows * kMaxWidth) {}

  template <int V>
  void operator()(int64_t row, const Floats (&acc)[V]) {
    const float bias = epilogue.bias ? static_cast<float>(epilogue.bias[row]) : 0.0f;
    Floats* to = reinterpret_cast<Floats*>(values + (row - first_row) * kMaxWidth);
    for (int v = 0; v < V; ++v) to[v] = finish(acc[v], bias, epilogue.low, epilogue.high);
  }
  void finish_window() {
    const int64_t height = std::min<int64_t>(kWindowRows, rows - first_row);
    if constexpr (std::is_same_v<T, float>) {
      cpu::transpose_copy<float>(values, kMaxWidth, height, count, y + first_row, rows);
    } else {
      cpu::transpose_copy<float>(values, kMaxWidth, height, count, turned, kWindowRows);
      for (int64_t m = 0; m < count; ++m) narrow_row(turned + m * kWindowRows, height, y + m * rows + first_row);
    }
  }
};

}  // namespace

template <typename T>
bool linear(const Weights<T>& weights, const Epilogue<T>& epilogue, const T* x, int64_t m, T* y) {
  if (m == 1) return multiply_vector(weights, epilogue, x, y);
  const int64_t inputs = weights.inputs;
  const auto pack = [&](int64_t first, int64_t count, int64_t width, float* tile) {
    if (count < width) std::fill_n(tile, inputs * width, 0.0f);
    if constexpr (std::is_same_v<T, float>) {
      cpu::transpose_copy<float>(x + first * inputs, inputs, count, inputs, tile, width);
    } else {
      const int64_t stride = cpu::round_up(inputs, kFloats);
      cpu::Buffer<float> wide(count * stride);
      for (int64_t i = 0; i < count; ++i) widen_row(x + (first + i) * inputs, inputs, wide + i * stride);
      cpu::transpose_copy<float>(wide, stride, count, inputs, tile, width);
    }
  };
  const auto make_sink = [&](int64_t first, int64_t count, int64_t window) {
    return TransposedSink<T>(epilogue, y + first * weights.rows, weights.rows, count, window * kWindowRows);
  };
  multiply<TransposedSink<T>>(weights, m, pack, make_sink);
  return true;
}

template bool linear(const Weights<float>&, const Epilogue<float>&, const float*, int64_t, float*);
template bool linear(const Weights<BFloat16>&, const Epilogue<BFloat16>&, const BFloat16*, int64_t, BFloat16*);

}  // namespace mfac::sparse
