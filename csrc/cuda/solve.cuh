// Substitution with a Cholesky factor, by a block of threads.
#pragma once

#include "columns.cuh"

namespace mfac::cuda {

constexpr int kSolveStep = 32;  // unknowns at a time: one per lane of a warp

// 1 / L_ii of row + lane; 0 where a row of L is zero, and beyond `rows` rows.
__device__ inline double reciprocal_of_pivot(const double* __restrict__ l, int64_t n, int64_t row, int lane, int rows) {
  const double pivot = lane < rows ? l[(row + lane) * n + row + lane] : 0.0;
  return pivot > 0 ? 1 / pivot : 0.0;
}

// x <- (L Lᵀ)⁻¹ x for l[n, n] and x[n], zero where a row of L is zero, by a whole block of threads: one warp solves
// with the diagonal tile, then all threads subtract its unknowns from the remaining rows. `solved` is in shared memory.
// Ends with a barrier.
__device__ inline void solve_in_place(const double* __restrict__ l, int64_t n, double* x,
                                      double (&solved)[kSolveStep]) {
  const int lane = threadIdx.x;
  for (int64_t row = 0; row < n; row += kSolveStep) {
    const int rows = static_cast<int>(n - row < kSolveStep ? n - row : kSolveStep);
    if (lane < kSolveStep) {
      double tile[kSolveStep];  // this lane's row, prefetched, so that a step waits only for the last unknown
#pragma unroll
      for (int j = 0; j < kSolveStep; ++j) tile[j] = j <= lane && lane < rows ? l[(row + lane) * n + row + j] : 0.0;
      double value = lane < rows ? x[row + lane] : 0.0;
      const double inverse = reciprocal_of_pivot(l, n, row, lane, rows);
#pragma unroll
      for (int j = 0; j < kSolveStep; ++j) {
        const double known = __shfl_sync(kAllLanes, value * inverse, j);
        if (lane == j) value = known;
        if (lane > j) value -= tile[j] * known;
      }
      if (lane < rows) x[row + lane] = value;
      solved[lane] = value;
    }
    __syncthreads();
    for (int64_t i = row + rows + threadIdx.x; i < n; i += blockDim.x) {
      double value = x[i];
#pragma unroll 8
      for (int j = 0; j < rows; ++j) value -= l[i * n + row + j] * solved[j];
      x[i] = value;
    }
    __syncthreads();
  }
  for (int64_t row = (n - 1) / kSolveStep * kSolveStep; row >= 0; row -= kSolveStep) {
    const int rows = static_cast<int>(n - row < kSolveStep ? n - row : kSolveStep);
    if (lane < kSolveStep) {
      double tile[kSolveStep];  // this lane's column
#pragma unroll
      for (int j = 0; j < kSolveStep; ++j) tile[j] = lane <= j && j < rows ? l[(row + j) * n + row + lane] : 0.0;
      double value = lane < rows ? x[row + lane] : 0.0;
      const double inverse = reciprocal_of_pivot(l, n, row, lane, rows);
#pragma unroll
      for (int j = kSolveStep - 1; j >= 0; --j) {
        const double known = __shfl_sync(kAllLanes, value * inverse, j);
        if (lane == j) value = known;
        if (lane < j) value -= tile[j] * known;
      }
      if (lane < rows) x[row + lane] = value;
      solved[lane] = value;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < row; i += blockDim.x) {
      double value = x[i];
#pragma unroll 8
      for (int j = 0; j < rows; ++j) value -= l[(row + j) * n + i] * solved[j];
      x[i] = value;
    }
    __syncthreads();
  }
}

}  // namespace mfac::cuda
