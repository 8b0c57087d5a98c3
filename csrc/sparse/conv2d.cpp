// Convolution by sparse weights:
//
//   y[n][row][p] = activation(Σ_k W[row][k] · patches[k][n, p] + bias[row])
//
// where patches[k][n, p] is the input that weight k meets at output pixel p of image n: x itself for a 1 x 1 kernel,
// and for others x moved by the position in the kernel, zero in the border. The columns of the product are the output
// pixels of all images, one after another. A tile of them is packed from x (tile.h), rows of x being copied as they lie
// in memory, and the results leave the registers for y directly. Traffic: x is read once for a 1 x 1 kernel (from L1
// for each further position of a larger one), y is written once, and W is read from L2 once per tile.
#include "tile.h"

namespace mfac::sparse {

namespace {

// Neighbouring pixels of one row of the output (of one image, for a kernel of 1 x 1 without stride) within a tile.
struct Run {
  int64_t image, pixel, lane, count;  // pixel: first one in the output plane; lane: its place in the tile
};

// The runs of `count` pixels from `first` on, in rows of `row` pixels and planes of `plane` pixels.
int split_runs(int64_t first, int64_t count, int64_t row, int64_t plane, Run* runs) {
  int n = 0;
  for (int64_t lane = 0; lane < count; ++n) {
    const int64_t image = (first + lane) / plane, pixel = (first + lane) % plane;
    const int64_t length = std::min({count - lane, row - pixel % row, plane - pixel});
    runs[n] = {image, pixel, lane, length};
    lane += length;
  }
  return n;
}

// row[start + stride · lane] for the lanes where that lies in the row, [0, width), and zeros.
template <typename T>
inline Floats load_strided(const T* row, int64_t start, int64_t stride, int64_t width) {
  const T* first = row + start;
  if (stride == 1) return load_lanes(first, -start, width - start);
  if (stride == 2)
    return every_second<0>(std::make_integer_sequence<int, kFloats>(), load_lanes(first, -start, width - start),
                           load_lanes(first + kFloats, -start - kFloats, width - start - kFloats));
  Floats x{};
  for (int lane = 0; lane < kFloats; ++lane)
    if (const int64_t place = start + stride * lane; place >= 0 && place < width) x[lane] = row[place];
  return x;
}

// Row k of the tile, for every k, from one run of pixels of an output row.
template <typename T>
void pack_patches(const Convolution& c, const T* x, const Run& run, int64_t width, float* tile) {
  const int64_t out_width = c.out_width(), out_y = run.pixel / out_width, out_x = run.pixel % out_width;
  float* to = tile + run.lane;
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    const T* plane = x + (run.image * c.channels + channel) * c.height * c.width;
    for (int64_t i = 0; i < c.kernel[0]; ++i) {
      const int64_t y = out_y * c.stride[0] - c.padding[0] + i;
      const bool inside = y >= 0 && y < c.height;
      for (int64_t j = 0; j < c.kernel[1]; ++j, to += width)
        for (int64_t lane = 0; lane < run.count; lane += kFloats) {
          const int64_t start = (out_x + lane) * c.stride[1] - c.padding[1] + j;
          const Floats some = inside ? load_strided(plane + y * c.width, start, c.stride[1], c.width) : Floats{};
          store_partial(to + lane, some, run.count - lane);
        }
    }
  }
}

// Writes the rows of a window to y.
template <typename T>
struct PlaneSink {
  const Epilogue<T>& epilogue;
  T* y;
  int64_t rows, plane, count;  // of W, of a plane of y; pixels of the tile
  Run runs[kMaxWidth];
  int n = 0;

  template <int V>
  void operator()(int64_t row, const Floats (&acc)[V]) {
    const float bias = epilogue.bias ? static_cast<float>(epilogue.bias[row]) : 0.0f;
    if (n == 1) {
      T* to = y + (runs[0].image * rows + row) * plane + runs[0].pixel;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store_partial(to + v * kFloats, finish(acc[v], bias, epilogue.low, epilogue.high), count - v * kFloats);
      return;
    }
    T values[V * kFloats];
    for (int v = 0; v < V; ++v)
      store_partial(values + v * kFloats, finish(acc[v], bias, epilogue.low, epilogue.high), kFloats);
    for (int i = 0; i < n; ++i)
      std::memcpy(y + (runs[i].image * rows + row) * plane + runs[i].pixel, values + runs[i].lane,
                  runs[i].count * sizeof(T));
  }
  void finish_window() {}
};

}  // namespace

template <typename T>
void conv2d(const Weights<T>& weights, const Epilogue<T>& epilogue, const Convolution& c, const T* x, T* y) {
  const int64_t plane = c.out_height() * c.out_width(), source = c.height * c.width;
  const bool pointwise = c.kernel[0] == 1 && c.kernel[1] == 1 && c.stride[0] == 1 && c.stride[1] == 1 &&
                         c.padding[0] == 0 && c.padding[1] == 0;
  const auto pack = [&](int64_t first, int64_t count, int64_t width, float* tile) {
    Run runs[kMaxWidth];
    const int n = split_runs(first, count, pointwise ? plane : c.out_width(), plane, runs);
    if (pointwise && n == 1) {
      const T* from = x + runs[0].image * c.channels * source + runs[0].pixel;
      for (int64_t k = 0; k < c.channels; ++k) widen_row(from + k * source, count, tile + k * width);
      return;
    }
    if (count < width) std::fill_n(tile, weights.inputs * width, 0.0f);
    for (int i = 0; i < n; ++i)
      if (pointwise)
        for (int64_t k = 0; k < c.channels; ++k)
          for (int64_t lane = 0; lane < runs[i].count; lane += kFloats)
            store_partial(tile + k * width + runs[i].lane + lane,
                          load_partial(x + (runs[i].image * c.channels + k) * source + runs[i].pixel + lane,
                                       runs[i].count - lane),
                          runs[i].count - lane);
      else
        pack_patches(c, x, runs[i], width, tile);
  };
  const auto make_sink = [&](int64_t first, int64_t count, int64_t) {
    PlaneSink<T> sink{epilogue, y, weights.rows, plane, count, {}};
    sink.n = split_runs(first, count, plane, plane, sink.runs);
    return sink;
  };
  multiply<PlaneSink<T>>(weights, c.images * plane, pack, make_sink);
}

template void conv2d(const Weights<float>&, const Epilogue<float>&, const Convolution&, const float*, float*);
template void conv2d(const Weights<BFloat16>&, const Epilogue<BFloat16>&, const Convolution&, const BFloat16*,
                     BFloat16*);

}  // namespace mfac::sparse
