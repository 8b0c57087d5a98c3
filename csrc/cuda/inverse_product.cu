// Products with G and Gᵀ, block by block, with float64 sums: F⁻¹ x = (x - Gᵀ A⁻¹ G x) / λ, and those of the updates and
// of quadratic_form. Each reads G once and is bound by memory bandwidth: 2 flops per element and vector.
//
//   multiply_rows      One warp per kRows rows of a block, for kVectors of the vectors x at a time, so that an element
//                      of x is loaded once for several rows; lanes go along the columns. Wide blocks are split into
//                      ranges of columns, each with a sum of its own: no atomics, so that the result does not depend on
//                      the order of the warps.
//   multiply_columns   One thread per column; t is in shared memory and broadcast.
//   inverse_product    Both, and the solve with A between them, for blocks that fit in shared memory: a block of
//                      threads loads its block of G once for all vectors.
#include "solve.cuh"

namespace mfac::cuda {
namespace {

constexpr int kRows = 4;     // of G per warp: four independent loads in flight
constexpr int kVectors = 4;  // at most at a time: 16 sums in registers
// Columns of a wide block per warp: 256 per lane, so that the reduction over the warp costs little.
constexpr int64_t kSplit = 8192;

// x [k, d] from first_vector on; t [splits, k, tile.count, m], k = all_vectors.
template <int vectors, typename G>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Gradients<G> grads, Layout layout, Tile tile, int64_t splits, const double* __restrict__ x,
                int64_t first_vector, int64_t all_vectors, double* __restrict__ t) {
  const int64_t item = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t groups = (grads.m + kRows - 1) / kRows, row = item % groups * kRows, split = item / groups % splits;
  const int64_t block = item / groups / splits;
  if (block >= tile.count) return;
  const int64_t begin = block_begin(layout, tile.ids[block]), width = block_width(layout, tile.ids[block]);
  const int64_t from = begin + split * kSplit, end = begin + width, rest = end - from;
  const int64_t to = splits == 1 || rest < kSplit ? end : from + kSplit;
  const G* source[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) source[r] = grads.data + (row + r < grads.m ? row + r : row) * grads.stride;
  const double* vector = x + first_vector * grads.d;
  double sums[vectors][kRows] = {};
#pragma unroll 2
  for (int64_t c = from + lane; c < to; c += kWarp) {
    double g[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) g[r] = to_float(source[r][c]);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const double element = vector[v * grads.d + c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[v][r] += g[r] * element;
    }
  }
#pragma unroll
  for (int v = 0; v < vectors; ++v)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const double sum = warp_sum(sums[v][r]);
      if (lane == 0 && row + r < grads.m)
        t[((split * all_vectors + first_vector + v) * tile.count + block) * grads.m + row + r] = sum;
    }
}

// t [k, tile.count, m] and out [k, d], from first_vector on.
template <int vectors, typename G>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(Gradients<G> grads, Layout layout, Tile tile, const double* __restrict__ t, int64_t first_vector,
                   double* __restrict__ out) {
  using Strip = double[vectors][kThreads];
  Strip& strip = shared<Strip>();
  const int64_t widest = layout.block_size < layout.d ? layout.block_size : layout.d;
  const int64_t chunks = (widest + kThreads - 1) / kThreads, block = blockIdx.x / chunks;
  const int64_t c = blockIdx.x % chunks * kThreads + threadIdx.x;
  const bool inside = c < block_width(layout, tile.ids[block]);
  const int64_t position = block_begin(layout, tile.ids[block]) + c;
  double sums[vectors] = {};
  for (int64_t first = 0; first < grads.m; first += kThreads) {
    const int rows = static_cast<int>(grads.m - first < kThreads ? grads.m - first : kThreads);
    __syncthreads();
#pragma unroll
    for (int v = 0; v < vectors; ++v)
      if (static_cast<int>(threadIdx.x) < rows)
        strip[v][threadIdx.x] = t[((first_vector + v) * tile.count + block) * grads.m + first + threadIdx.x];
    __syncthreads();
    if (!inside) continue;
    const G* source = grads.data + first * grads.stride + position;
#pragma unroll 8
    for (int r = 0; r < rows; ++r) {
      const double g = to_float(source[r * grads.stride]);
#pragma unroll
      for (int v = 0; v < vectors; ++v) sums[v] += g * strip[v][r];
    }
  }
  if (!inside) return;
#pragma unroll
  for (int v = 0; v < vectors; ++v) out[(first_vector + v) * grads.d + position] = sums[v];
}

// Bytes of shared memory of product_kernel: solved [kSolveStep], x [width], t [m], G of the block [m, width].
template <typename G>
int64_t product_bytes(int64_t m, int64_t width) {
  return static_cast<int64_t>(sizeof(double)) * (kSolveStep + width + m) + m * width * static_cast<int64_t>(sizeof(G));
}

// out = (x - Gᵀ A⁻¹ G x) / λ in the listed columns of one block, for x and out [k, d] and l [tile.count, m, m]. 4 m
// flops per column and vector.
template <typename G>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(Gradients<G> grads, Layout layout, Tile tile, const double* __restrict__ l,
                   const double* __restrict__ x, int64_t k, double inverse_damping, double* __restrict__ out) {
  using Solved = double[kSolveStep];
  Solved& solved = shared<Solved>();
  double *vector = solved + kSolveStep, *t = vector + tile.width;
  G* own = reinterpret_cast<G*>(t + grads.m);
  const int64_t id = tile.ids[blockIdx.x], m = grads.m, width = listed(layout, id);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t c = threadIdx.x; c < width; c += kThreads) {
    const G* source = grads.data + column(layout, id, c);
#pragma unroll 8
    for (int64_t r = 0; r < m; ++r) own[r * tile.width + c] = source[r * grads.stride];
  }
  for (int64_t v = 0; v < k; ++v) {
    for (int64_t c = threadIdx.x; c < width; c += kThreads) vector[c] = x[v * grads.d + column(layout, id, c)];
    __syncthreads();
    for (int64_t r = warp; r < m; r += kThreads / kWarp) {
      double sum = 0;
      for (int64_t c = lane; c < width; c += kWarp) sum += to_float(own[r * tile.width + c]) * vector[c];
      sum = warp_sum(sum);
      if (lane == 0) t[r] = sum;
    }
    __syncthreads();
    solve_in_place(l + blockIdx.x * m * m, m, t, solved);
    for (int64_t c = threadIdx.x; c < width; c += kThreads) {
      double sum = 0;
#pragma unroll 4
      for (int64_t r = 0; r < m; ++r) sum += to_float(own[r * tile.width + c]) * t[r];
      out[v * grads.d + column(layout, id, c)] = (vector[c] - sum) * inverse_damping;
    }
    __syncthreads();
  }
}

// x [k, d], packed [k, tile.count, tile.width]; so below.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Layout layout, Tile tile, const double* __restrict__ x, double* __restrict__ packed) {
  const int64_t chunks = (tile.width + kThreads - 1) / kThreads, index = blockIdx.x / chunks;
  const int64_t c = blockIdx.x % chunks * kThreads + threadIdx.x;
  if (c >= tile.width) return;
  const int64_t source = column(layout, tile.ids[index % tile.count], tile.first + c);
  packed[index * tile.width + c] = source < 0 ? 0.0 : x[index / tile.count * layout.d + source];
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Layout layout, Tile tile, const double* __restrict__ packed, double factor, double* __restrict__ x) {
  const int64_t chunks = (tile.width + kThreads - 1) / kThreads, index = blockIdx.x / chunks;
  const int64_t c = blockIdx.x % chunks * kThreads + threadIdx.x;
  const int64_t target = c < tile.width ? column(layout, tile.ids[index % tile.count], tile.first + c) : -1;
  if (target >= 0) x[index / tile.count * layout.d + target] = factor * packed[index * tile.width + c];
}

}  // namespace

int64_t row_splits(int64_t width) { return width <= 2 * kSplit ? 1 : ceil_div(width, kSplit); }

template <typename G>
void multiply_rows(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* x, int64_t k,
                   double* t, Stream stream) {
  const int64_t splits = row_splits(layout.block_size < layout.d ? layout.block_size : layout.d);
  const int64_t blocks = ceil_div(tile.count * splits * ceil_div(grads.m, kRows), kThreads / kWarp);
  for (int64_t v = 0; v < k;) {
    const bool several = k - v >= kVectors;
    launch(several ? rows_kernel<kVectors, G> : rows_kernel<1, G>, blocks, kThreads, 0, stream, grads, layout, tile,
           splits, x, v, k, t);
    v += several ? kVectors : 1;
  }
}

template <typename G>
void multiply_columns(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* t, int64_t k,
                      double* out, Stream stream) {
  const int64_t blocks = tile.count * ceil_div(layout.block_size < layout.d ? layout.block_size : layout.d, kThreads);
  for (int64_t v = 0; v < k;) {
    const int vectors = k - v >= kVectors ? kVectors : 1;
    launch(vectors > 1 ? columns_kernel<kVectors, G> : columns_kernel<1, G>, blocks, kThreads,
           sizeof(double) * vectors * kThreads, stream, grads, layout, tile, t, v, out);
    v += vectors;
  }
}

template <typename G>
bool inverse_product(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* l,
                     const double* x, int64_t k, double damping, double* out, Stream stream) {
  const int64_t bytes = product_bytes<G>(grads.m, tile.width);
  if (bytes > shared_limit()) return false;
  launch(product_kernel<G>, tile.count, kThreads, bytes, stream, grads, layout, tile, l, x, k, 1 / damping, out);
  return true;
}

void gather(const Layout& layout, const Tile& tile, const double* x, int64_t k, double* packed, Stream stream) {
  launch(gather_kernel, k * tile.count * ceil_div(tile.width, kThreads), kThreads, 0, stream, layout, tile, x, packed);
}

void scatter(const Layout& layout, const Tile& tile, const double* packed, int64_t k, double factor, double* x,
             Stream stream) {
  launch(scatter_kernel, k * tile.count * ceil_div(tile.width, kThreads), kThreads, 0, stream, layout, tile, packed,
         factor, x);
}

template void multiply_rows<float>(const Gradients<float>&, const Layout&, const Tile&, const double*, int64_t, double*,
                                   Stream);
template void multiply_rows<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, const double*, int64_t,
                                      double*, Stream);
template void multiply_columns<float>(const Gradients<float>&, const Layout&, const Tile&, const double*, int64_t,
                                      double*, Stream);
template void multiply_columns<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, const double*, int64_t,
                                         double*, Stream);

template bool inverse_product<float>(const Gradients<float>&, const Layout&, const Tile&, const double*, const double*,
                                     int64_t, double, double*, Stream);
template bool inverse_product<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, const double*,
                                        const double*, int64_t, double, double*, Stream);

}  // namespace mfac::cuda
