// Elements of diag F⁻¹ from L⁻¹ G or L⁻¹, which cuBLAS has computed:
//
//   capacitance side   [F⁻¹]_ii = (1 - ‖L⁻¹ g_i‖²) / λ, at least 1/F_ii, F_ii = λ + ‖g_i‖² / m, whatever the rounding
//   Fisher side        [F⁻¹]_ii = m ‖column i of L⁻¹‖², at most 1/λ
//
// One thread per column: it reads a column of `solved` and of G once, loads are coalesced, sums are float64.
#include "columns.cuh"

namespace mfac::cuda {
namespace {

// solved [tile.count, rows, tile.width], out [d].
template <typename G, typename T>
__global__ void __launch_bounds__(kThreads)
    diagonal_kernel(Gradients<G> grads, Layout layout, Tile tile, const T* __restrict__ solved, int64_t rows,
                    double damping, bool capacitance, float* __restrict__ out) {
  const int64_t chunks = (tile.width + kThreads - 1) / kThreads, block = blockIdx.x / chunks;
  const int64_t c = blockIdx.x % chunks * kThreads + threadIdx.x;
  const int64_t target = c < tile.width ? column(layout, tile.ids[block], tile.first + c) : -1;
  if (target < 0) return;
  const T* x = solved + block * rows * tile.width + c;
  const double m = static_cast<double>(grads.m);
  double norm = 0, value;
#pragma unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    const double element = x[r * tile.width];
    norm += element * element;
  }
  if (capacitance) {
    double square = 0;
#pragma unroll 4
    for (int64_t r = 0; r < grads.m; ++r) {
      const double element = to_float(grads.data[r * grads.stride + target]);
      square += element * element;
    }
    const double bound = 1 / (damping + square / m), rest = (1 - norm) / damping;
    value = rest > bound ? rest : bound;  // the bound, if rounding makes it NaN
  } else {
    value = m * norm < 1 / damping ? m * norm : 1 / damping;
  }
  constexpr double kMinFloat = 0x1p-126, kMaxFloat = 3.4028234663852886e38;  // of float32
  out[target] = static_cast<float>(value < kMinFloat ? kMinFloat : value > kMaxFloat ? kMaxFloat : value);
}

}  // namespace

template <typename G, typename T>
void inverse_diagonal(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const T* solved, int64_t rows,
                      double damping, bool capacitance, float* out, Stream stream) {
  launch(diagonal_kernel<G, T>, tile.count * ceil_div(tile.width, kThreads), kThreads, 0, stream, grads, layout, tile,
         solved, rows, damping, capacitance, out);
}

template void inverse_diagonal<float, double>(const Gradients<float>&, const Layout&, const Tile&, const double*,
                                              int64_t, double, bool, float*, Stream);
template void inverse_diagonal<float, float>(const Gradients<float>&, const Layout&, const Tile&, const float*, int64_t,
                                             double, bool, float*, Stream);
template void inverse_diagonal<BFloat16, double>(const Gradients<BFloat16>&, const Layout&, const Tile&, const double*,
                                                 int64_t, double, bool, float*, Stream);
template void inverse_diagonal<BFloat16, float>(const Gradients<BFloat16>&, const Layout&, const Tile&, const float*,
                                                int64_t, double, bool, float*, Stream);

}  // namespace mfac::cuda
