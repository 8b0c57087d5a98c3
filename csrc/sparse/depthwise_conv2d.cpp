// Depthwise 3 x 3 convolution, one border of zeros, stride 1 or 2, in the layout of conv2d.cpp:
//
//   y[n][c][i][j] = activation(Σ_a Σ_b weight[c][a][b] · x[n][c][stride·i + a - 1][stride·j + b - 1] + bias[c])
//
// A task is one plane. Bands of its rows are copied to L1 with their border, so that the loop over pixels has no special
// cases; with stride 2 even and odd columns go apart, so that neighbouring outputs read neighbouring inputs. kBandRows
// rows of outputs are summed at once, each vector of inputs being loaded once for the up to three rows that it is part
// of. Traffic: x is read once and y written once, which is what bounds it: 9 multiply-adds per output are few.
#include "../cpu/parallel.h"
#include "../cpu/scratch.h"
#include "partial.h"

namespace mfac::sparse {

namespace {

constexpr int64_t kBandBytes = 16 * 1024;  // of a band of x: a third of an L1 cache
constexpr int kBandRows = 4;               // rows of outputs at once; their sums, and nine weights, are in registers

// One row of x with its border. Stride 1: to[0 .. width + 2). Stride 2: even places to to[0 ..), odd ones to to[half ..).
template <typename T>
void copy_row(const T* from, int64_t width, int64_t stride, int64_t half, float* to) {
  if (stride == 1) {
    to[0] = 0;
    widen_row(from, width, to + 1);
    to[width + 1] = 0;
    return;
  }
  float *even = to, *odd = to + half;
  even[0] = 0;
  for (int64_t j = 0; j < width / 2; ++j) {
    odd[j] = from[2 * j];
    even[j + 1] = from[2 * j + 1];
  }
  if (width % 2) odd[width / 2] = from[width - 1];
  (width % 2 ? even : odd)[width / 2 + width % 2] = 0;
}

// kRows rows of outputs, `width` wide, from the band at `from`, whose rows have `pitch` elements; to rows y + r · out_pitch.
template <int kRows, int kStride, typename T>
[[gnu::noinline]] void sum_rows(const float* from, int64_t pitch, int64_t half, const float* weight, float bias,
                                float low, float high, int64_t width, T* y, int64_t out_pitch) {
  for (int64_t j = 0; j < width; j += kFloats) {
    Floats acc[kRows] = {};
#pragma GCC unroll 9
    for (int i = 0; i < kStride * (kRows - 1) + 3; ++i) {
      const float* row = from + i * pitch + j;
      const Floats x[3] = {cpu::load<float>(row), cpu::load<float>(kStride == 1 ? row + 1 : row + half),
                           cpu::load<float>(kStride == 1 ? row + 2 : row + 1)};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        if (const int a = i - r * kStride; a >= 0 && a < 3)
          for (int b = 0; b < 3; ++b) acc[r] += weight[3 * a + b] * x[b];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      store_partial(y + r * out_pitch + j, finish(acc[r], bias, low, high), width - j);
  }
}

template <int kStride, typename T>
void convolve_plane(const T* x, int64_t height, int64_t width, const float* weight, float bias, float low, float high,
                    T* y) {
  const int64_t out_height = (height - 1) / kStride + 1, out_width = (width - 1) / kStride + 1;
  // Rows of the band; loads run over their ends by up to a vector.
  const int64_t half = kStride == 1 ? 0 : (width + 2) / 2 + kFloats, pitch = kStride * (width / kStride + 3 + kFloats);
  const int64_t fitting = (kBandBytes / static_cast<int64_t>(pitch * sizeof(float)) - 3 + kStride) / kStride;
  const int64_t band = std::min(out_height, std::max<int64_t>(kBandRows, fitting / kBandRows * kBandRows));
  const int64_t band_rows = kStride * (band - 1) + 3;
  cpu::Buffer<float> rows(band_rows * pitch + kFloats);
  std::fill_n(static_cast<float*>(rows), band_rows * pitch + kFloats, 0.0f);
  for (int64_t first = 0; first < out_height; first += band) {
    const int64_t count = std::min(band, out_height - first);
    for (int64_t i = 0; i < kStride * (count - 1) + 3; ++i) {
      const int64_t source = first * kStride - 1 + i;
      if (source < 0 || source >= height)
        std::fill_n(rows + i * pitch, pitch, 0.0f);
      else
        copy_row(x + source * width, width, kStride, half, rows + i * pitch);
    }
    int64_t i = 0;
    for (; i + kBandRows <= count; i += kBandRows)
      sum_rows<kBandRows, kStride>(rows + i * kStride * pitch, pitch, half, weight, bias, low, high, out_width,
                                   y + (first + i) * out_width, out_width);
    for (; i < count; ++i)
      sum_rows<1, kStride>(rows + i * kStride * pitch, pitch, half, weight, bias, low, high, out_width,
                           y + (first + i) * out_width, out_width);
  }
}

}  // namespace

template <typename T>
void depthwise_conv2d(const T* weight, const Epilogue<T>& epilogue, const Convolution& c, const T* x, T* y) {
  const int64_t plane = c.out_height() * c.out_width();
  cpu::parallel_for(c.images * c.channels, 9 * plane, [&](int64_t i) {
    const int64_t channel = i % c.channels;
    float own[9];
    for (int k = 0; k < 9; ++k) own[k] = weight[9 * channel + k];
    const float bias = epilogue.bias ? static_cast<float>(epilogue.bias[channel]) : 0.0f;
    const auto convolve = c.stride[0] == 1 ? convolve_plane<1, T> : convolve_plane<2, T>;
    convolve(x + i * c.height * c.width, c.height, c.width, own, bias, epilogue.low, epilogue.high, y + i * plane);
  });
}

template void depthwise_conv2d(const float*, const Epilogue<float>&, const Convolution&, const float*, float*);
template void depthwise_conv2d(const BFloat16*, const Epilogue<BFloat16>&, const Convolution&, const BFloat16*,
                               BFloat16*);

}  // namespace mfac::sparse
