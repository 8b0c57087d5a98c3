// The factor of the small matrices of some blocks (gram.cu), all float64:
//
//   A + ridge I = L Lᵀ,   W = L⁻¹
//
// One block of threads per matrix, by tiles of kTile x kTile, 2/3 n³ flops, nearly all in products of tiles by a warp
// on the tensor cores (tiles.cuh) with operands from the caches:
//
//   L, a panel k at a time   P_ik = A_ik - Σ_{j<k} L_ij L_kjᵀ    a warp per tile
//                            L_kk L_kkᵀ = P_kk                   one warp, a row in the registers of each lane
//                            L_ik = P_ik L_kk⁻ᵀ                  a thread per row, by substitution
//   W                        W_kk = L_kk⁻¹                       a warp per tile, by substitution, a column per lane
//                            W_kc = -W_kk Σ_{c≤j<k} L_kj W_jc    a warp per column c of tiles, which waits for no other
//
// What one warp does by itself leaves the tensor cores to others: three matrices share a multiprocessor.
#include "../numerics.h"
#include "solve.cuh"
#include "tiles.cuh"

namespace mfac::cuda {
namespace {

constexpr int kFactorThreads = 128, kFactorWarps = kFactorThreads / kWarp;

struct FactorMemory {
  double stages[kFactorWarps][kTile][kTile + kPadding];  // of each warp
  double column[2][kTile];                               // of L, as a tile is factored
  double reciprocals[kMaxOrder];                         // of the diagonal of L
  double sums[kFactorWarps];
  double trace;
  int failed;
};
using Stage = double[kTile][kTile + kPadding];

// Keeps the compiler from loading what is needed later, for which there are no registers.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

// Factors a tile in place, with zeros above the diagonal, by one warp.
__device__ inline void factor_tile(Stage& tile, double* reciprocals, FactorMemory& memory) {
  const int lane = threadIdx.x;
  double row[kTile];
#pragma unroll
  for (int c = 0; c < kTile; ++c) row[c] = tile[lane][c];
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const double pivot = __shfl_sync(kAllLanes, row[j], j);
    if (!(pivot > 0)) {  // all lanes have the same pivot
      if (lane == 0) memory.failed = 1;
      return;
    }
    const double reciprocal = rsqrt(pivot);
    row[j] *= reciprocal;
    if (lane == j) reciprocals[j] = reciprocal;
    double (&column)[kTile] = memory.column[j % 2];
    column[lane] = row[j];
    __syncwarp();
#pragma unroll
    for (int c = j + 1; c < kTile; ++c) row[c] -= row[j] * column[c];
  }
#pragma unroll
  for (int c = 0; c < kTile; ++c) tile[lane][c] = c <= lane ? row[c] : 0.0;
  __syncwarp();
}

// Rows [row, n) of L in the columns [row, row + kTile), but not those of the diagonal tile: P, still to be divided by it.
__device__ inline void subtract_products(const double* __restrict__ a, int64_t n, double ridge, int64_t row, double* l,
                                         FactorMemory& memory) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t first = row + warp * kTile; first < n; first += kFactorThreads) {
    WarpSums tile;
    const double *left[2][2], *right[4];  // this lane's rows; those beyond the last repeat it
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t mine = first + 8 * i + lane / 4, other = row + 8 * i + lane / 4;
      left[i / 2][i % 2] = l + (mine < n ? mine : n - 1) * n + lane % 4;
      right[i] = l + (other < n ? other : n - 1) * n + lane % 4;
    }
#pragma unroll 1
    for (int64_t k = 0; k < row; k += kDepth) {
      double x[2][4], y[4][2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i / 4][i % 4] = left[i / 4][i % 2][k + i % 4 / 2 * 4];
        y[i / 2][i % 2] = right[i / 2][k + i % 2 * 4];
      }
      multiply_add(tile.sums, x, y);
    }
    tile.for_each([&](int r, int c, double sum) {
      const int64_t i = first + r, j = row + c;
      const bool inside = i < n && j < n;
      const double value = inside ? a[i * n + j] - sum : 0.0;
      if (first == row)
        memory.stages[0][r][c] = r == c ? (inside ? value + ridge : 1.0) : value;
      else if (inside)
        l[i * n + j] = value;
    });
  }
}

// Rows beyond the diagonal tile, divided by it; the diagonal tile itself; zeros above it.
__device__ inline void substitute(int64_t n, int64_t row, double* l, FactorMemory& memory) {
  const Stage& tile = memory.stages[0];
  for (int64_t i = row + kTile + threadIdx.x; i < n; i += kFactorThreads) {
    double x[kTile];
#pragma unroll
    for (int c = 0; c < kTile; ++c) x[c] = l[i * n + row + c];
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int q = 0; q < c; ++q) x[c] -= tile[c][q] * x[q];
      x[c] *= memory.reciprocals[row + c];
      keep_order();
    }
#pragma unroll
    for (int c = 0; c < kTile; ++c) l[i * n + row + c] = x[c];
  }
  const int64_t rows = n - row < kTile ? n - row : kTile;
  for (int64_t e = threadIdx.x; e < rows * kTile; e += kFactorThreads)
    if (e % kTile < rows) l[(row + e / kTile) * n + row + e % kTile] = tile[e / kTile][e % kTile];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = row + kTile + threadIdx.x; c < n; c += kFactorThreads) l[(row + r) * n + c] = 0.0;
}

// The diagonal tile of W that begins at `row`, by one warp, and zeros to the right of it.
__device__ inline void invert_tile(const double* l, int64_t n, int64_t row, double* w, Stage& tile,
                                   const double* reciprocals) {
  const int lane = threadIdx.x % kWarp;
  const int rows = static_cast<int>(n - row < kTile ? n - row : kTile);
  __syncwarp();
  for (int r = 0; r < kTile; ++r) tile[r][lane] = r < rows && lane < rows ? l[(row + r) * n + row + lane] : 0.0;
  __syncwarp();
  double x[kTile];
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    x[r] = r == lane ? 1.0 : 0.0;
#pragma unroll
    for (int q = 0; q < r; ++q) x[r] -= tile[r][q] * x[q];
    x[r] *= reciprocals[row + r];
    keep_order();
  }
#pragma unroll
  for (int r = 0; r < kTile; ++r)
    if (r < rows && lane < rows) w[(row + r) * n + row + lane] = x[r];
  for (int r = 0; r < rows; ++r)
    for (int64_t c = row + kTile + lane; c < n; c += kWarp) w[(row + r) * n + c] = 0.0;
}

// The tiles of W below the diagonal tile that begins at `first`, by one warp.
__device__ inline void invert_column(const double* l, int64_t n, int64_t first, double* w, Stage& stage) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = first + kTile; row < n; row += kTile) {
    const double* left[2][2];  // this lane's rows of L
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t mine = row + 8 * i + lane / 4;
      left[i / 2][i % 2] = l + (mine < n ? mine : n - 1) * n + lane % 4;
    }
    const double* right = w + lane % 4 * n + first + lane / 4;
    WarpSums tile;
#pragma unroll 1
    for (int64_t k = first; k < row; k += kDepth) {
      double x[2][4], y[4][2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i / 4][i % 4] = left[i / 4][i % 2][k + i % 4 / 2 * 4];
        y[i / 2][i % 2] = right[(k + i % 2 * 4) * n + i / 2 * 8];
      }
      multiply_add(tile.sums, x, y);
    }
    __syncwarp();
    tile.for_each([&](int r, int c, double sum) { stage[r][c] = -sum; });
    __syncwarp();
    WarpSums product;
#pragma unroll 1
    for (int k = 0; k < kTile; k += kDepth)
      product.add_product(
          [&](int i, int place) {
            const int64_t r = row + i, c = row + k + place;
            return r < n && c < n ? w[r * n + c] : 0.0;
          },
          [&](int i, int place) { return stage[k + place][i]; });
    product.for_each([&](int r, int c, double sum) {
      if (row + r < n) w[(row + r) * n + first + c] = sum;
    });
    __syncwarp();
  }
}

// a, l and w (may be null) [blocks, n, n], ids [blocks], failed [1]. Only the part of a on and below the diagonal is
// read.
__global__ void __launch_bounds__(kFactorThreads, 3)
    cholesky_kernel(const double* __restrict__ a, int64_t n, double ridge, double rounding,
                    const int32_t* __restrict__ ids, double* l, double* w, int32_t* failed) {
  FactorMemory& memory = shared<FactorMemory>();
  const int64_t matrix = blockIdx.x * n * n;
  const int warp = threadIdx.x / kWarp;
  a += matrix;
  l += matrix;
  double jitter = 0;
  for (int attempt = 0; attempt < kFactorAttempts; ++attempt) {
    if (threadIdx.x == 0) memory.failed = 0;
    __syncthreads();
    bool failing = false;
    for (int64_t row = 0; row < n && !failing; row += kTile) {
      subtract_products(a, n, ridge + jitter, row, l, memory);
      __syncwarp();
      if (warp == 0) factor_tile(memory.stages[0], memory.reciprocals + row, memory);
      __syncthreads();
      failing = memory.failed;
      if (!failing) substitute(n, row, l, memory);
      __syncthreads();
    }
    if (!failing) break;
    // Rounding made it indefinite: a jitter, relative to the trace.
    double trace = 0;
    for (int64_t i = threadIdx.x; i < n; i += kFactorThreads) trace += a[i * n + i] + ridge;
    trace = warp_sum(trace);
    if (threadIdx.x % kWarp == 0) memory.sums[warp] = trace;
    __syncthreads();
    if (threadIdx.x == 0) {
      memory.trace = 0;
      for (int i = 0; i < kFactorWarps; ++i) memory.trace += memory.sums[i];
    }
    __syncthreads();
    jitter = attempt > 0 ? jitter * 10 : rounding * memory.trace;
    if (attempt == kFactorAttempts - 1 && threadIdx.x == 0) failed[0] = 1 + ids[blockIdx.x];
  }
  if (!w) return;
  w += matrix;
  for (int64_t row = warp * kTile; row < n; row += kFactorThreads)
    invert_tile(l, n, row, w, memory.stages[warp], memory.reciprocals);
  __syncthreads();
  // Columns on the left have more tiles: one from either end in turn.
  const int64_t columns = (n + kTile - 1) / kTile;
  for (int64_t c = warp; c < columns; c += kFactorWarps) {
    const int64_t turn = c / kFactorWarps, last = turn * kFactorWarps + kFactorWarps - 1;
    const int64_t mine = turn % 2 == 0 ? c : last - warp;
    if (mine < columns) invert_column(l, n, mine * kTile, w, memory.stages[warp]);
  }
}

// l [count, n, n], x [k, count, n]: one vector for each block of threads.
__global__ void __launch_bounds__(kThreads)
    cholesky_solve_kernel(const double* __restrict__ l, int64_t count, int64_t n, double* x) {
  solve_in_place(l + blockIdx.x % count * n * n, n, x + blockIdx.x * n, shared<double[kSolveStep]>());
}

}  // namespace

int64_t temporaries_bytes() { return temporaries_limit(); }

void cholesky(const double* a, int64_t count, int64_t n, double ridge, double rounding, const int32_t* ids, double* l,
              double* inverse, int32_t* failed, Stream stream) {
  if (n > 0)
    launch(cholesky_kernel, count, kFactorThreads, sizeof(FactorMemory), stream, a, n, ridge, rounding, ids, l, inverse,
           failed);
}

void cholesky_solve(const double* l, int64_t count, int64_t n, int64_t k, double* x, Stream stream) {
  if (n > 0) launch(cholesky_solve_kernel, k * count, kThreads, sizeof(double[kSolveStep]), stream, l, count, n, x);
}

}  // namespace mfac::cuda
