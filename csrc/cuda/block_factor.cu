// The small matrices of a tile of blocks, from its packed columns:
//
//   A + ridge I = L Lᵀ,  L⁻¹     A = G Gᵀ (capacitance side) or GᵀG (Fisher side), float64, n = min(m, columns in use)
//
// A comes from cuBLAS. One block of threads per matrix, in panels of kStep rows of U = Lᵀ; one thread per column of U,
// with kStep elements of it in registers:
//
//   panel k     u_ki = a_ki - Σ_{j<k} u_jk u_ji        a kStep x kStep tile of U in shared memory, broadcast to all
//                                                      threads, and the thread's own column; loads are coalesced
//               one warp factors the diagonal tile, then every thread substitutes with it
//   L⁻¹         the same loop, with the identity in place of A: W_ic = (δ_ic - Σ_{j<i} l_ij W_jc) / l_ii
//
// n³/3 flops each, 2 n³ / kStep bytes from L2; float64.
#include "../numerics.h"
#include "solve.cuh"

namespace mfac::cuda {
namespace {

constexpr int kStep = 32;  // rows of a panel: one for each lane of the warp that factors the diagonal tile

struct Panel {
  double tile[kStep][kStep];          // of U: [j][r]
  double diagonal[kStep][kStep + 1];  // of L: [r][c]; padded by one to avoid bank conflicts
  double reciprocal[kStep];           // of its diagonal
  double sums[kThreads / kWarp];
  double trace;
  int failed;
};

// A block of threads packs kThreads columns of one row of one block; out [parts, tile.count, m, tile.width]. G is read
// once; writes 2 `parts` or 8 (float64) bytes per element. Coalesced, but for gaps between the columns listed.
template <typename G, typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Gradients<G> grads, Layout layout, Tile tile, int parts, T* __restrict__ out) {
  const int64_t chunks = (tile.width + kThreads - 1) / kThreads, index = blockIdx.x / chunks;
  const int64_t c = blockIdx.x % chunks * kThreads + threadIdx.x, row = index % grads.m, block = index / grads.m;
  if (c >= tile.width) return;
  const int64_t source = column(layout, tile.ids[block], tile.first + c);
  float value = source < 0 ? 0.0f : to_float(grads.data[row * grads.stride + source]);
  const int64_t place = index * tile.width + c;
  if constexpr (sizeof(T) == sizeof(double)) {
    out[place] = value;
  } else {
    for (int p = 0; p < parts; ++p) {
      const BFloat16 part = to_bfloat16(value);
      out[p * tile.count * grads.m * tile.width + place] = part;
      value -= to_float(part);
    }
  }
}

// sums[r] -= Σ_j u[j, row + r] x[j, c] for j in [begin, end), multiples of kStep, and r < kStep; x and u [n, n].
__device__ inline void subtract_products(const double* u, const double* x, int64_t n, int64_t row, int64_t begin,
                                         int64_t end, int64_t c, Panel& panel, double (&sums)[kStep]) {
  for (int64_t j0 = begin; j0 < end; j0 += kStep) {
    __syncthreads();
    for (int e = threadIdx.x; e < kStep * kStep; e += kThreads) {
      const int j = e / kStep, r = e % kStep;
      panel.tile[j][r] = row + r < n ? u[(j0 + j) * n + row + r] : 0.0;
    }
    __syncthreads();
    if (c >= n) continue;
#pragma unroll 1
    for (int j = 0; j < kStep; ++j) {
      const double value = x[(j0 + j) * n + c];
#pragma unroll
      for (int r = 0; r < kStep; ++r) sums[r] -= panel.tile[j][r] * value;
    }
  }
}

// sums <- D⁻¹ sums, D the panel's diagonal tile (of size kStep, the identity beyond the last row).
__device__ inline void substitute(const Panel& panel, double (&sums)[kStep]) {
#pragma unroll
  for (int r = 0; r < kStep; ++r) {
#pragma unroll
    for (int q = 0; q < r; ++q) sums[r] -= panel.diagonal[r][q] * sums[q];
    sums[r] *= panel.reciprocal[r];
  }
}

// Factors the diagonal tile in place: one warp, one lane per row.
__device__ inline void factor_tile(Panel& panel) {
  const int row = threadIdx.x;
  for (int j = 0; j < kStep; ++j) {
    const double pivot = panel.diagonal[j][j];
    if (!(pivot > 0)) {
      if (row == 0) panel.failed = 1;
      return;  // uniform in the warp: all lanes read the same pivot
    }
    const double root = sqrt(pivot);
    __syncwarp();
    if (row == j) {
      panel.diagonal[j][j] = root;
      panel.reciprocal[j] = 1 / root;
    }
    if (row > j) panel.diagonal[row][j] /= root;
    __syncwarp();
    for (int c = j + 1; c <= row; ++c) panel.diagonal[row][c] -= panel.diagonal[row][j] * panel.diagonal[c][j];
    __syncwarp();
  }
}

// Columns i of U, kThreads of them at a time, for the rows [row, row + kStep).
__device__ inline void factor_panel(const double* __restrict__ a, int64_t n, double ridge, int64_t row, double* u,
                                    double* __restrict__ l, Panel& panel) {
  for (int64_t first = row; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    double sums[kStep];
#pragma unroll
    for (int r = 0; r < kStep; ++r) {
      sums[r] = i < n && row + r < n ? a[(row + r) * n + i] : 0.0;
      if (i == row + r) sums[r] += i < n ? ridge : 1.0;
    }
    subtract_products(u, u, n, row, 0, row, i, panel, sums);
    if (first == row) {
      __syncthreads();
      if (threadIdx.x < kStep) {
#pragma unroll
        for (int r = 0; r < kStep; ++r) panel.diagonal[threadIdx.x][r] = sums[r];
      }
      __syncthreads();
      if (threadIdx.x < kStep) factor_tile(panel);
      __syncthreads();
      if (panel.failed) return;
    }
    if (i >= n) continue;
    substitute(panel, sums);
#pragma unroll
    for (int r = 0; r < kStep; ++r)
      if (row + r < n) {
        const double value = row + r <= i ? sums[r] : 0.0;
        u[(row + r) * n + i] = value;
        l[i * n + row + r] = value;
        if (row + r < i) l[(row + r) * n + i] = 0.0;
      }
  }
}

// Rows [row, row + kStep) of W = L⁻¹.
__device__ inline void invert_panel(const double* u, int64_t n, int64_t row, double* w, Panel& panel) {
  __syncthreads();
  for (int e = threadIdx.x; e < kStep * kStep; e += kThreads) {
    const int r = e / kStep, q = e % kStep;
    panel.diagonal[r][q] = row + r < n && q <= r ? u[(row + q) * n + row + r] : r == q ? 1.0 : 0.0;
    if (r == q) panel.reciprocal[r] = 1 / panel.diagonal[r][r];
  }
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t c = first + threadIdx.x;
    double sums[kStep];
#pragma unroll
    for (int r = 0; r < kStep; ++r) sums[r] = c == row + r ? 1.0 : 0.0;
    subtract_products(u, w, n, row, first, row, c, panel, sums);
    __syncthreads();
    if (c >= n) continue;
    substitute(panel, sums);
#pragma unroll
    for (int r = 0; r < kStep; ++r)
      if (row + r < n) w[(row + r) * n + c] = sums[r];
  }
}

// a, u, l and inverse (may be null) [blocks, n, n], ids [blocks], failed [1].
__global__ void __launch_bounds__(kThreads)
    cholesky_kernel(const double* __restrict__ a, int64_t n, double ridge, double rounding,
                    const int32_t* __restrict__ ids, double* u, double* l, double* inverse, int32_t* failed) {
  Panel& panel = shared<Panel>();
  const int64_t matrix = blockIdx.x * n * n;
  a += matrix;
  u += matrix;
  l += matrix;
  double jitter = 0;
  for (int attempt = 0; attempt < kFactorAttempts; ++attempt) {
    if (threadIdx.x == 0) panel.failed = 0;
    __syncthreads();
    for (int64_t row = 0; row < n && !panel.failed; row += kStep) {
      factor_panel(a, n, ridge + jitter, row, u, l, panel);
      __syncthreads();
    }
    if (!panel.failed) break;
    // Rounding made it indefinite: a jitter, relative to the trace.
    double trace = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) trace += a[i * n + i] + ridge;
    trace = warp_sum(trace);
    if (threadIdx.x % kWarp == 0) panel.sums[threadIdx.x / kWarp] = trace;
    __syncthreads();
    if (threadIdx.x == 0) {
      panel.trace = 0;
      for (int warp = 0; warp < kThreads / kWarp; ++warp) panel.trace += panel.sums[warp];
    }
    __syncthreads();
    jitter = attempt > 0 ? jitter * 10 : rounding * panel.trace;
    if (attempt == kFactorAttempts - 1 && threadIdx.x == 0) failed[0] = 1 + ids[blockIdx.x];
  }
  if (inverse)
    for (int64_t row = 0; row < n; row += kStep) invert_panel(u, n, row, inverse + matrix, panel);
}

// l [count, n, n], x [k, count, n]: one vector for each block of threads.
__global__ void __launch_bounds__(kThreads)
    cholesky_solve_kernel(const double* __restrict__ l, int64_t count, int64_t n, double* x) {
  solve_in_place(l + blockIdx.x % count * n * n, n, x + blockIdx.x * n, shared<double[kSolveStep]>());
}

}  // namespace

int64_t temporaries_bytes() { return temporaries_limit(); }

template <typename G>
void pack(const Gradients<G>& grads, const Layout& layout, const Tile& tile, double* out, Stream stream) {
  launch(pack_kernel<G, double>, tile.count * grads.m * ceil_div(tile.width, kThreads), kThreads, 0, stream, grads,
         layout, tile, 1, out);
}

template <typename G>
void pack(const Gradients<G>& grads, const Layout& layout, const Tile& tile, int parts, BFloat16* out, Stream stream) {
  launch(pack_kernel<G, BFloat16>, tile.count * grads.m * ceil_div(tile.width, kThreads), kThreads, 0, stream, grads,
         layout, tile, parts, out);
}

void cholesky(const double* a, int64_t count, int64_t n, double ridge, double rounding, const int32_t* ids,
              double* scratch, double* l, double* inverse, int32_t* failed, Stream stream) {
  if (n > 0)
    launch(cholesky_kernel, count, kThreads, sizeof(Panel), stream, a, n, ridge, rounding, ids, scratch, l, inverse,
           failed);
}

void cholesky_solve(const double* l, int64_t count, int64_t n, int64_t k, double* x, Stream stream) {
  if (n > 0) launch(cholesky_solve_kernel, k * count, kThreads, sizeof(double[kSolveStep]), stream, l, count, n, x);
}

template void pack<float>(const Gradients<float>&, const Layout&, const Tile&, double*, Stream);
template void pack<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, double*, Stream);
template void pack<float>(const Gradients<float>&, const Layout&, const Tile&, int, BFloat16*, Stream);
template void pack<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, int, BFloat16*, Stream);

}  // namespace mfac::cuda
