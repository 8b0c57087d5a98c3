// Elements of diag F⁻¹ from W = L⁻¹:
//
//   capacitance side   [F⁻¹]_ii = (1 - ‖W g_i‖²) / λ, at least 1/F_ii, F_ii = λ + ‖g_i‖² / m, whatever the rounding
//   Fisher side        [F⁻¹]_ii = m ‖column i of W‖², at most 1/λ
//
//   capacitance_diagonal   Capacitance side in float64, m² flops per column: one block of threads for 128 columns, by
//                          tiles of 64 rows of W G on the tensor cores (tiles.cuh), which are squared and added up
//                          in place. Tiles of W above the diagonal are left out.
//   diagonal_of_solved     From W G, which cuBLAS has computed for the other precisions, or on the Fisher side from W:
//                          one thread per column reads a column of it and of G once; loads are coalesced, sums are
//                          float64.
#include "tiles.cuh"

namespace mfac::cuda {
namespace {

// The nearest normal number of float32 to a positive one.
__device__ inline float to_float32(double x) {
  constexpr double kMin = 0x1p-126, kMax = 3.4028234663852886e38;
  return static_cast<float>(x < kMin ? kMin : x > kMax ? kMax : x);
}

// The element of diag F⁻¹ on the capacitance side, from ‖W g‖² and ‖g‖².
__device__ inline float capacitance_element(double norm, double square, int64_t m, double damping) {
  const double bound = 1 / (damping + square / static_cast<double>(m)), rest = (1 - norm) / damping;
  return to_float32(rest > bound ? rest : bound);  // the bound, if rounding makes it NaN
}

constexpr int kColumns = 128;                                                    // of a block of threads
constexpr int kAcross = kColumns / kTile, kSolvedThreads = 2 * kAcross * kWarp;  // 2 x 4 warps

struct SolvedStage {
  Operand<double, kTileRows, false> w;
  Operand<float, kColumns, true> g;
  double norms[2][kColumns];                            // of the rows of either half of the tiles
  double squares[kSolvedThreads / kColumns][kColumns];  // of the rows that a thread loads
};

// w [tile.count, m, m], out [d].
template <typename G>
__global__ void __launch_bounds__(kSolvedThreads, 2)
    capacitance_diagonal_kernel(Gradients<G> grads, Layout layout, Tile tile, const double* __restrict__ w,
                                double damping, float* __restrict__ out) {
  SolvedStage& stage = shared<SolvedStage>();
  const int64_t chunks = (tile.width + kColumns - 1) / kColumns, block = blockIdx.x / chunks, m = grads.m;
  const int place = threadIdx.x % kColumns, share = threadIdx.x / kColumns;
  const int64_t i = blockIdx.x % chunks * kColumns + place;
  const int64_t c = i < tile.width ? column(layout, tile.ids[block], tile.first + i) : -1;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int half = warp / kAcross, warp_row = half * kTile, warp_column = warp % kAcross * kTile;
  w += block * m * m;
  double square = 0;
  static_assert(kSolvedThreads == 2 * kColumns);
  stage.norms[share][place] = 0;
  for (int64_t row = 0; row < m; row += kTileRows) {  // of W G
    const int64_t end = row + kTileRows < m ? row + kTileRows : m;
    WarpSums sums;
    for (int64_t first = 0; first < end; first += kStage) {
      load_matrix<kSolvedThreads>(w, m, row, first, stage.w);
      const double loaded = load_column<kSolvedThreads>(grads, c, first, stage.g);
      if (end == m) square += loaded;  // once: the last tile needs all rows of G
      __syncthreads();
      if (row + warp_row < m && first < row + warp_row + kTile)
        add_stage(sums, stage.w, stage.g, warp_row, warp_column);
      __syncthreads();
    }
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        double sum = 0;  // of this lane's four rows, then of all
#pragma unroll
        for (int p = 0; p < 2; ++p)
#pragma unroll
          for (int g = 0; g < 2; ++g) sum += sums.sums[p][q][2 * g + v] * sums.sums[p][q][2 * g + v];
        for (int bits = 4; bits < kWarp; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
        if (lane < 4) stage.norms[half][warp_column + 8 * q + 2 * lane + v] += sum;
      }
  }
  stage.squares[share][place] = square;
  __syncthreads();
  if (share > 0 || c < 0) return;
  for (int s = 1; s < kSolvedThreads / kColumns; ++s) square += stage.squares[s][place];
  out[c] = capacitance_element(stage.norms[0][place] + stage.norms[1][place], square, m, damping);
}

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
  double norm = 0;
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
    out[target] = capacitance_element(norm, square, grads.m, damping);
  } else {
    const double value = static_cast<double>(grads.m) * norm;
    out[target] = to_float32(value < 1 / damping ? value : 1 / damping);
  }
}

}  // namespace

template <typename G, typename T>
void diagonal_of_solved(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const T* solved,
                        int64_t rows, double damping, bool capacitance, float* out, Stream stream) {
  launch(diagonal_kernel<G, T>, tile.count * ceil_div(tile.width, kThreads), kThreads, 0, stream, grads, layout, tile,
         solved, rows, damping, capacitance, out);
}

template <typename G>
void capacitance_diagonal(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* w,
                          double damping, float* out, Stream stream) {
  launch(capacitance_diagonal_kernel<G>, tile.count * ceil_div(tile.width, kColumns), kSolvedThreads,
         sizeof(SolvedStage), stream, grads, layout, tile, w, damping, out);
}

template void capacitance_diagonal<float>(const Gradients<float>&, const Layout&, const Tile&, const double*, double,
                                          float*, Stream);
template void capacitance_diagonal<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, const double*,
                                             double, float*, Stream);
template void diagonal_of_solved<float, double>(const Gradients<float>&, const Layout&, const Tile&, const double*,
                                                int64_t, double, bool, float*, Stream);
template void diagonal_of_solved<float, float>(const Gradients<float>&, const Layout&, const Tile&, const float*,
                                               int64_t, double, bool, float*, Stream);
template void diagonal_of_solved<BFloat16, double>(const Gradients<BFloat16>&, const Layout&, const Tile&,
                                                   const double*, int64_t, double, bool, float*, Stream);
template void diagonal_of_solved<BFloat16, float>(const Gradients<BFloat16>&, const Layout&, const Tile&, const float*,
                                                  int64_t, double, bool, float*, Stream);

}  // namespace mfac::cuda
