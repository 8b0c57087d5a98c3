// Products of tiles with float64 sums on the tensor cores: what a warp does with its part, and a block of threads with
// operands in shared memory.
//
// A warp computes a tile of kTile x kTile sums, kDepth terms at a time (tensor_multiply_add of device.cuh): 16 operands
// in registers of each lane for 8192 multiplications by the warp. A block of threads has two rows of warps (gram: 2 x
// 2, the diagonal: 2 x 4) and takes kStage terms at a time from operands in shared memory, where G is float32: its
// bandwidth is what bounds these products. Several blocks of threads share a multiprocessor, so that some load while
// others multiply.
#pragma once

#include "columns.cuh"

namespace mfac::cuda {

constexpr int kTile = 32;             // 32 sums in the registers of a lane
constexpr int kDepth = 8;             // of the tensor cores' instruction
constexpr int kStage = 32;            // a row of G for each lane of a warp that loads: 128 bytes
constexpr int kTileRows = 2 * kTile;  // of a block of threads
static_assert(kTile == kWarp);        // a row or a column per lane, in block_factor.cu

// The same as tensor_multiply_add where there are no tensor cores for float64: the lanes pass their numbers on.
__device__ inline void shuffled_multiply_add(double (&sums)[2][4][4], const double (&a)[2][4],
                                             const double (&b)[4][2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    double left[2][2], right[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      left[i / 2][i % 2] = __shfl_sync(kAllLanes, a[i / 2][k / 4 * 2 + i % 2], lane / 4 * 4 + k % 4);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      right[i / 2][i % 2] = __shfl_sync(kAllLanes, b[i / 2][k / 4], (lane % 4 * 2 + i % 2) * 4 + k % 4);
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] += left[i / 16][i % 4 / 2] * right[i / 4 % 4][i % 2];
  }
}

__device__ inline void multiply_add(double (&sums)[2][4][4], const double (&a)[2][4], const double (&b)[4][2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  shuffled_multiply_add(sums, a, b);
#else
  tensor_multiply_add(sums, a, b);
#endif
}

struct WarpSums {
  double sums[2][4][4] = {};

  // f(row, column, sum) for the sums of this lane, rows and columns within the tile.
  template <typename F>
  __device__ void for_each(const F& f) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int v = 0; v < 4; ++v) f(16 * p + v / 2 * 8 + lane / 4, 8 * q + lane % 4 * 2 + v % 2, sums[p][q][v]);
  }

  // += a bᵀ over kDepth terms, for a(row, place) and b(column, place) that give numbers.
  template <typename A, typename B>
  __device__ void add_product(const A& a, const B& b) {
    const int lane = threadIdx.x % kWarp;
    double left[2][4], right[4][2];
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int v = 0; v < 4; ++v) left[p][v] = a(16 * p + v % 2 * 8 + lane / 4, lane % 4 + v / 2 * 4);
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int h = 0; h < 2; ++h) right[q][h] = b(8 * q + lane / 4, lane % 4 + 4 * h);
    multiply_add(sums, left, right);
  }
};

// An operand in shared memory: [places][kStage], or by depth first [kStage][places]. Rows are padded so that what a
// warp reads at once, 8 places of 4 of the depth, is in different banks (half a warp at once for float64).
template <typename T, int places, bool depth_first>
struct Operand {
  static constexpr int kPitch = depth_first ? places + (sizeof(T) == sizeof(float) ? 8 : 4) : kStage + 4;
  T values[(depth_first ? kStage : places) * kPitch];
  __device__ T& at(int place, int depth) {
    return values[depth_first ? depth * kPitch + place : place * kPitch + depth];
  }
};

// out = rows [row, row + places) of G by columns [first, end) of those listed for a block, which are the depth; zeros
// beyond. By all threads of a block.
template <int threads, int places, typename G>
__device__ inline void load_rows(const Gradients<G>& grads, const Layout& layout, int64_t block, int64_t row,
                                 int64_t first, int64_t end, Operand<float, places, false>& out) {
  constexpr int kStep = threads / kStage;
  const int depth = threadIdx.x % kStage, top = threadIdx.x / kStage;
  const int64_t c = first + depth < end ? column(layout, block, first + depth) : -1;
  const int rows = c < 0 ? 0 : grads.m - row < places ? static_cast<int>(grads.m - row) : places;
  const G* source = grads.data + (row + top) * grads.stride + c;
#pragma unroll 16
  for (int r = top; r < places; r += kStep, source += kStep * grads.stride)
    out.at(r, depth) = r < rows ? to_float(*source) : 0.0f;
}

// out = rows [row, row + places) of a matrix [n, n] by columns [first, first + kStage), the depth; zeros beyond.
template <int threads, int places>
__device__ inline void load_matrix(const double* matrix, int64_t n, int64_t row, int64_t first,
                                   Operand<double, places, false>& out) {
  constexpr int kStep = threads / kStage;
  const int depth = threadIdx.x % kStage, top = threadIdx.x / kStage;
  const int rows = first + depth >= n ? 0 : n - row < places ? static_cast<int>(n - row) : places;
  const double* source = matrix + (row + top) * n + first + depth;
#pragma unroll 8
  for (int r = top; r < places; r += kStep, source += kStep * n) out.at(r, depth) = r < rows ? *source : 0.0;
}

// out = rows [first, first + kStage) of G, the depth, of column c (zeros if c < 0) at the place threadIdx.x % places.
// Returns the sum of the squares of what this thread has loaded.
template <int threads, int places, typename G>
__device__ inline double load_column(const Gradients<G>& grads, int64_t c, int64_t first,
                                     Operand<float, places, true>& out) {
  constexpr int kStep = threads / places;
  const int place = threadIdx.x % places, top = threadIdx.x / places;
  const int rows = c < 0 ? 0 : grads.m - first < kStage ? static_cast<int>(grads.m - first) : kStage;
  const G* source = grads.data + (first + top) * grads.stride + c;
  double square = 0;
#pragma unroll 8
  for (int r = top; r < kStage; r += kStep, source += kStep * grads.stride) {
    const float value = r < rows ? to_float(*source) : 0.0f;
    out.at(place, r) = value;
    square += static_cast<double>(value) * value;
  }
  return square;
}

// The sums of the calling warp, whose tile begins at (row, column), += those of one stage.
template <typename A, typename B>
__device__ inline void add_stage(WarpSums& sums, A& a, B& b, int row, int column) {
#pragma unroll 1
  for (int depth = 0; depth < kStage; depth += kDepth)
    sums.add_product([&](int i, int k) { return a.at(row + i, depth + k); },
                     [&](int i, int k) { return b.at(column + i, depth + k); });
}

}  // namespace mfac::cuda
