// The factor of the small matrices of some blocks (gram.cu), all float64:
//
//   A + ridge I = L Lᵀ,   W = L⁻¹
//
// One block of threads per matrix, by tiles of kTile x kTile, 2/3 n³ flops, nearly all in products of tiles by a warp
// on the tensor cores (tiles.cuh); a third without W. Operands come from the caches, n³ / 6 bytes per matrix:
//
//   L, a panel k at a time   P_ik = A_ik - Σ_{j<k} L_ij L_kjᵀ    a warp per tile
//                            L_kk L_kkᵀ = P_kk                   one warp, a row in the registers of each lane
//                            L_ik = P_ik L_kk⁻ᵀ                  by substitution, a row per lane
//   W                        W_kk = L_kk⁻¹                       a warp per tile, by substitution, a column per lane
//                            W_kc = -W_kk Σ_{c≤j<k} L_kj W_jc    a warp per column c of tiles, which waits for no other
//
// Latency bounds it, of loads of tiles and of the chain of pivots: several matrices share a multiprocessor, so that
// one's products fill the others' waits.
#include "../numerics.h"
#include "solve.cuh"
#include "tiles.cuh"

namespace mfac::cuda {
namespace {

// Two warps: with four, matrices of order 256 take as long, and the small ones of the Fisher side half as long again.
constexpr int kFactorThreads = 64, kFactorWarps = kFactorThreads / kWarp;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerSM = 4;  // six would spill
#else
constexpr int kBlocksPerSM = 6;
#endif
// Of a tile in shared memory: rows are 16-byte aligned; bank conflicts are 2-way at most, along rows and columns.
constexpr int kPitch = kTile + 2;
using TileBuffer = double[kTile][kPitch];

struct FactorMemory {
  TileBuffer stages[kFactorWarps];  // of each warp
  TileBuffer diagonal;              // the diagonal tile of L, transposed: upper triangular
  double column[2][kTile];          // of L, as a tile is factored; double-buffered
  double reciprocals[kMaxOrder];    // of the diagonal of L
  double sums[kFactorWarps];
  double trace;
  int failed;
};

// Keeps the compiler from hoisting later loads, which would spill registers.
__device__ inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// Two adjacent elements, as one load of 16 bytes if `paired`: n is even, so that every row is aligned.
template <bool paired>
__device__ inline double2 load_two(const double* x) {
  if constexpr (paired) return *reinterpret_cast<const double2*>(x);
  return double2{x[0], x[1]};
}

// The addresses of a lane's operands of a tile of rows of a matrix [n, n]. Any order of the depth will do if both
// operands have it; pairs of adjacent elements allow loads of 16 bytes.
struct RowFragments {
  const double* matrix;
  int at[4];  // rows 8 i + lane / 4 of the tile; those beyond the last of n repeat it

  __device__ RowFragments(const double* x, int n, int first) : matrix(x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + 8 * i + lane / 4;
      at[i] = (row < n ? row : n - 1) * n + lane % 4 * 2;
    }
  }
  template <bool paired>
  __device__ void load_left(int k, double (&a)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double2 two = load_two<paired>(matrix + at[i] + k);
      a[i / 2][i % 2] = two.x;
      a[i / 2][i % 2 + 2] = two.y;
    }
  }
  template <bool paired>
  __device__ void load_right(int k, double (&b)[4][2]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const double2 two = load_two<paired>(matrix + at[i] + k);
      b[i][0] = two.x;
      b[i][1] = two.y;
    }
  }
};

// stage = P in the rows [first, first + kTile) and the columns [row, row + kTile), by one warp; the identity beyond n.
template <bool paired>
__device__ inline void subtract_products(const double* __restrict__ a, int n, double ridge, int row, int first,
                                         const double* l, TileBuffer& stage) {
  WarpSums tile;
  const RowFragments left(l, n, first), right(l, n, row);
#pragma unroll 1
  for (int k = 0; k < row; k += kDepth) {
    double x[2][4], y[4][2];
    left.load_left<paired>(k, x);
    right.load_right<paired>(k, y);
    multiply_add(tile.sums, x, y);
  }
  tile.for_each([&](int r, int c, double sum) {
    const int i = first + r, j = row + c;
    if (i < n && j < n)
      stage[r][c] = a[i * n + j] - sum + (i == j ? ridge : 0.0);
    else
      stage[r][c] = i == j ? 1.0 : 0.0;
    compiler_barrier();
  });
  __syncwarp();
}

// Factors a tile, by one warp with a row in the registers of each lane.
__device__ inline void factor_tile(const TileBuffer& tile, double* reciprocals, FactorMemory& memory) {
  const int lane = threadIdx.x;
  double row[kTile];
#pragma unroll
  for (int c = 0; c < kTile; ++c) row[c] = tile[lane][c];
#pragma unroll
  for (int j = 0; j < kTile; ++j) {
    const double pivot = __shfl_sync(kAllLanes, row[j], j);
    if (!(pivot > 0 && pivot < INFINITY)) {  // all lanes have the same pivot
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
  for (int c = 0; c < kTile; ++c) memory.diagonal[c][lane] = c <= lane ? row[c] : 0.0;
}

// x <- L_kk⁻¹ x, from the transposed tile and the reciprocals of its diagonal. An unknown is subtracted from all later
// ones as soon as it is known: these subtractions do not wait for each other.
__device__ inline void solve_with(const TileBuffer& transposed, const double* reciprocals, double (&x)[kTile]) {
#pragma unroll
  for (int q = 0; q < kTile; ++q) {
    x[q] *= reciprocals[q];
#pragma unroll
    for (int r = q + 1; r < kTile; ++r) x[r] -= transposed[q][r] * x[q];
    compiler_barrier();
  }
}

// The rows of a stage <- those of L, by one warp, a row per lane.
__device__ inline void divide_rows(const TileBuffer& transposed, const double* reciprocals, TileBuffer& stage) {
  const int lane = threadIdx.x % kWarp;
  double x[kTile];
#pragma unroll
  for (int c = 0; c < kTile; ++c) x[c] = stage[lane][c];
  solve_with(transposed, reciprocals, x);
#pragma unroll
  for (int c = 0; c < kTile; ++c) stage[lane][c] = x[c];
  __syncwarp();
}

// A panel of L, kTile columns from `row` on. Returns false if a pivot is not positive.
template <bool paired>
__device__ inline bool factor_panel(const double* __restrict__ a, int n, double ridge, int row, double* l,
                                    FactorMemory& memory) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  TileBuffer& own = memory.stages[warp];
  double* reciprocals = memory.reciprocals + row;
  for (int first = row + warp * kTile, turn = 0; turn == 0 || first < n; first += kFactorWarps * kTile, ++turn) {
    if (first < n) subtract_products<paired>(a, n, ridge, row, first, l, own);
    if (turn == 0) {
      if (warp == 0) factor_tile(own, reciprocals, memory);
      __syncthreads();
      if (memory.failed) return false;
    }
    if (first >= n) continue;
    if (first > row) divide_rows(memory.diagonal, reciprocals, own);
#pragma unroll 4
    for (int r = 0; r < kTile; ++r)
      if (first + r < n && row + lane < n)
        l[(first + r) * n + row + lane] = first > row ? own[r][lane] : memory.diagonal[lane][r];
    __syncwarp();
  }
  return true;
}

// The diagonal tile of W that begins at `row`, by one warp, a column per lane.
__device__ inline void invert_tile(const double* l, int n, int row, double* w, TileBuffer& stage,
                                   const double* reciprocals) {
  const int lane = threadIdx.x % kWarp;
  const int rows = n - row < kTile ? n - row : kTile;
#pragma unroll 4
  for (int r = 0; r < kTile; ++r) stage[lane][r] = r < rows && lane < rows ? l[(row + r) * n + row + lane] : 0.0;
  __syncwarp();
  double x[kTile];
#pragma unroll
  for (int r = 0; r < kTile; ++r) x[r] = r == lane ? 1.0 : 0.0;
  solve_with(stage, reciprocals + row, x);
#pragma unroll
  for (int r = 0; r < kTile; ++r)
    if (r < rows && lane < rows) w[(row + r) * n + row + lane] = x[r];
  __syncwarp();
}

// The tiles of W below the diagonal tile that begins at `first`, by one warp.
template <bool paired>
__device__ inline void invert_column(const double* l, int n, int first, double* w, TileBuffer& stage) {
  const int lane = threadIdx.x % kWarp;
  const double* right = w + lane % 4 * 2 * n + first + lane / 4;
  for (int row = first + kTile; row < n; row += kTile) {
    const RowFragments left(l, n, row);
    WarpSums tile;
#pragma unroll 1
    for (int k = first; k < row; k += kDepth) {
      double x[2][4], y[4][2];
      left.load_left<paired>(k, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i / 2][i % 2] = right[(k + i % 2) * n + i / 2 * 8];
      multiply_add(tile.sums, x, y);
    }
    tile.for_each([&](int r, int c, double sum) { stage[r][c] = -sum; });
    __syncwarp();
    WarpSums product;
#pragma unroll 1
    for (int k = 0; k < kTile && row + k < n; k += kDepth)
      product.add_product(
          [&](int i, int place) {
            const int r = row + i, c = row + k + place;
            return r < n && c < n ? w[r * n + c] : 0.0;
          },
          [&](int i, int place) { return stage[k + place][i]; });
    product.for_each([&](int r, int c, double sum) {
      if (row + r < n) w[(row + r) * n + first + c] = sum;
    });
    __syncwarp();
  }
}

// Zeros in the tiles above the diagonal.
__device__ inline void clear_above(int n, double* x) {
  for (int r = threadIdx.x / kWarp; r < n; r += kFactorWarps)
#pragma unroll 1
    for (int c = r / kTile * kTile + kTile + threadIdx.x % kWarp; c < n; c += kWarp) x[r * n + c] = 0.0;
}

// a, l and w [blocks, n, n] (w may be null), ids [blocks], failed [1]. Only the part of a on and below the diagonal is
// read. `paired`: n is even.
template <bool paired>
__global__ void __launch_bounds__(kFactorThreads, kBlocksPerSM)
    cholesky_kernel(const double* __restrict__ a, int n, double ridge, double rounding, const int32_t* __restrict__ ids,
                    double* l, double* w, int32_t* failed) {
  FactorMemory& memory = shared<FactorMemory>();
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * n * n;
  const int warp = threadIdx.x / kWarp;
  a += matrix;
  l += matrix;
  double jitter = 0;
  for (int attempt = 0; attempt < kFactorAttempts; ++attempt) {
    if (threadIdx.x == 0) memory.failed = 0;
    __syncthreads();
    bool done = true;
    for (int row = 0; row < n && done; row += kTile) {
      done = factor_panel<paired>(a, n, ridge + jitter, row, l, memory);
      __syncthreads();
    }
    if (done) break;
    // Rounding made it indefinite: a jitter, relative to the trace.
    double trace = 0;
    for (int i = threadIdx.x; i < n; i += kFactorThreads) trace += a[i * n + i] + ridge;
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
  clear_above(n, l);
  if (!w) return;
  w += matrix;
  clear_above(n, w);
  for (int row = warp * kTile; row < n; row += kFactorWarps * kTile)
    invert_tile(l, n, row, w, memory.stages[warp], memory.reciprocals);
  __syncthreads();
  // Columns on the left have more tiles: one from either end in turn.
  const int columns = (n + kTile - 1) / kTile;
  for (int c = warp; c < columns; c += kFactorWarps) {
    const int turn = c / kFactorWarps, last = turn * kFactorWarps + kFactorWarps - 1;
    const int mine = turn % 2 == 0 ? c : last - warp;
    if (mine < columns) invert_column<paired>(l, n, mine * kTile, w, memory.stages[warp]);
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
    launch(n % 2 == 0 ? cholesky_kernel<true> : cholesky_kernel<false>, count, kFactorThreads, sizeof(FactorMemory),
           stream, a, static_cast<int>(n), ridge, rounding, ids, l, inverse, failed);
}

void cholesky_solve(const double* l, int64_t count, int64_t n, int64_t k, double* x, Stream stream) {
  if (n > 0) launch(cholesky_solve_kernel, k * count, kThreads, sizeof(double[kSolveStep]), stream, l, count, n, x);
}

}  // namespace mfac::cuda
