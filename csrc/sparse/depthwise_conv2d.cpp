// Depthwise 3 x 3 convolution, one border of zeros, stride 1 or 2, in the layout of conv2d.cpp:
//
//   y[n][c][i][j] = activation(Σ_a Σ_b weight[c][a][b] · x[n][c][stride·i + a - 1][stride·j + b - 1] + bias[c])
//
// A task is one plane. kBandRows rows of outputs, a vector wide, are summed at once: their inputs are loaded once for
// all, 3 loads and up to 9 multiply-adds per row of inputs; stride 2 takes 4 loads, and 3 shuffles that part even
// from odd columns. Lanes in the border are masked in the first and the last vector of a row. Traffic: x is read
// once and y written once, which bounds large planes: 9 multiply-adds per output are few.
#include "../cpu/parallel.h"
#include "partial.h"

namespace mfac::sparse {

namespace {

constexpr int kBandRows = 4;  // rows of outputs at once; their sums, three inputs and nine weights are in registers

constexpr int64_t kCost = 36;  // multiply-adds of a dense product that take as long as an output, for parallel_for

// taps[b][lane] = row[stride · lane + b - 1] for a row of which the columns [-before, after) lie in the plane.
template <int kStride, typename T>
inline void load_taps(const T* row, int64_t before, int64_t after, Floats (&taps)[3]) {
  if constexpr (kStride == 1) {
    for (int b = 0; b < 3; ++b) taps[b] = load_lanes(row + b - 1, 1 - b - before, after + 1 - b);
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kFloats>();
    const Floats a = load_lanes(row - 1, 1 - before, after + 1),
                 b = load_lanes(row + kFloats - 1, 0, after + 1 - kFloats);
    const Floats c = load_lanes(row + 1, 0, after - 1), d = load_lanes(row + kFloats + 1, 0, after - 1 - kFloats);
    taps[0] = every_second<0>(lanes, a, b);
    taps[1] = every_second<1>(lanes, a, b);
    taps[2] = every_second<0>(lanes, c, d);
  }
}

template <typename T>
struct Plane {
  const T* x;
  int64_t height, width, out_height, out_width;
  float weight[9], bias, low, high;
  T* y;
};

// Rows i to i + kRows of outputs.
template <int kRows, int kStride, typename T>
void sum_rows(const Plane<T>& p, int64_t i) {
  for (int64_t j = 0; j < p.out_width; j += kFloats) {
    Floats acc[kRows] = {};
    const int64_t column = j * kStride, before = std::min<int64_t>(column, 1), after = p.width - column;
#pragma GCC unroll 9
    for (int k = 0; k < kStride * (kRows - 1) + 3; ++k) {
      const int64_t row = i * kStride - 1 + k;
      if (row < 0 || row >= p.height) continue;
      Floats x[3];
      load_taps<kStride>(p.x + row * p.width + column, before, after, x);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        if (const int a = k - r * kStride; a >= 0 && a < 3)
          for (int b = 0; b < 3; ++b) acc[r] += p.weight[3 * a + b] * x[b];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      store_partial(p.y + (i + r) * p.out_width + j, finish(acc[r], p.bias, p.low, p.high), p.out_width - j);
  }
}

template <int kStride, typename T>
void convolve(const Plane<T>& p) {
  int64_t i = 0;
  for (; i + kBandRows <= p.out_height; i += kBandRows) sum_rows<kBandRows, kStride>(p, i);
  for (; i < p.out_height; ++i) sum_rows<1, kStride>(p, i);
}

}  // namespace

template <typename T>
void depthwise_conv2d(const T* weight, const Epilogue<T>& epilogue, const Convolution& c, const T* x, T* y) {
  const int64_t out_height = c.out_height(), out_width = c.out_width();
  cpu::parallel_for(c.images * c.channels, kCost * out_height * out_width, [&](int64_t i) {
    const int64_t channel = i % c.channels;
    Plane<T> plane{x + i * c.height * c.width,
                   c.height,
                   c.width,
                   out_height,
                   out_width,
                   {},
                   epilogue.bias ? static_cast<float>(epilogue.bias[channel]) : 0.0f,
                   epilogue.low,
                   epilogue.high,
                   y + i * out_height * out_width};
    for (int k = 0; k < 9; ++k) plane.weight[k] = weight[9 * channel + k];
    c.stride[0] == 1 ? convolve<1>(plane) : convolve<2>(plane);
  });
}

template void depthwise_conv2d(const float*, const Epilogue<float>&, const Convolution&, const float*, float*);
template void depthwise_conv2d(const BFloat16*, const Epilogue<BFloat16>&, const Convolution&, const BFloat16*,
                               BFloat16*);

}  // namespace mfac::sparse
