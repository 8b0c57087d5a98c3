// The columns in use of some blocks, and their small matrices A = G Gᵀ (capacitance side) or GᵀG (Fisher side).
//
//   pack    Copies the columns, as what cuBLAS multiplies: one thread per column of a row.
//   gram    A in float64, without a copy: one block of threads for 64 x 64 sums on or below the diagonal, so that n²
//           flops per column are done where a product of matrices does 2 n². G is read from the GPU's memory once, and
//           from its caches n / 64 times. Wide blocks are split into ranges of columns, each with a sum of its own.
#include "tiles.cuh"

namespace mfac::cuda {
namespace {

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

constexpr int kGramThreads = 4 * kWarp;  // 2 x 2 tiles; four such blocks of threads have the registers they need

// out [splits, tile.count, n, n]: 32 x 32 tiles on and below the diagonal.
template <bool capacitance, typename G>
__global__ void __launch_bounds__(kGramThreads, 4)
    gram_kernel(Gradients<G> grads, Layout layout, Tile tile, int64_t n, int64_t splits, double* __restrict__ out) {
  using Staged = Operand<float, kTileRows, !capacitance>;
  Staged(&stage)[2] = shared<Staged[2]>();
  const int64_t row_tiles = (n + kTileRows - 1) / kTileRows, pairs = row_tiles * (row_tiles + 1) / 2;
  const int64_t block = blockIdx.x / pairs % tile.count, split = blockIdx.x / pairs / tile.count;
  const int64_t id = tile.ids[block], pair = blockIdx.x % pairs;
  int64_t i = 0;  // the tile (i, j) of the pair is the pair-th of the lower triangle, row by row
  while ((i + 1) * (i + 2) / 2 <= pair) ++i;
  const int64_t row = i * kTileRows, col = (pair - i * (i + 1) / 2) * kTileRows;
  Staged &left = stage[0], &right = stage[row == col ? 0 : 1];
  int64_t first = 0, end = grads.m, left_column = -1, right_column = -1;
  if constexpr (capacitance) {
    first = tile.first + split * kGramSplit;
    end = split + 1 < splits ? first + kGramSplit : tile.first + tile.width;
    if (end > listed(layout, id)) end = listed(layout, id);
  } else {
    left_column = column(layout, id, tile.first + row + threadIdx.x % kTileRows);
    right_column = column(layout, id, tile.first + col + threadIdx.x % kTileRows);
  }
  const int warp = threadIdx.x / kWarp, warp_row = warp / 2 * kTile, warp_column = warp % 2 * kTile;
  const bool busy =
      row + warp_row < n && col + warp_column < n && (row > col || warp_row >= warp_column);  // else all zero
  WarpSums tile_sums;
  for (; first < end; first += kStage) {
    if constexpr (capacitance) {
      load_rows<kGramThreads>(grads, layout, id, row, first, end, left);
      if (row != col) load_rows<kGramThreads>(grads, layout, id, col, first, end, right);
    } else {
      load_column<kGramThreads>(grads, left_column, first, left);
      if (row != col) load_column<kGramThreads>(grads, right_column, first, right);
    }
    __syncthreads();
    if (busy) add_stage(tile_sums, left, right, warp_row, warp_column);
    __syncthreads();
  }
  if (!busy) return;
  out += (split * tile.count + block) * n * n;
  tile_sums.for_each([&](int r, int c, double sum) {
    const int64_t y = row + warp_row + r, x = col + warp_column + c;
    if (y < n && x < n) out[y * n + x] = sum;
  });
}

}  // namespace

template <typename G>
void gram(const Gradients<G>& grads, const Layout& layout, const Tile& tile, bool capacitance, int64_t n, double* out,
          Stream stream) {
  const int64_t row_tiles = ceil_div(n, kTileRows), pairs = row_tiles * (row_tiles + 1) / 2;
  const int64_t splits = capacitance ? gram_splits(tile.width) : 1, blocks = pairs * tile.count * splits;
  if (capacitance)
    launch(gram_kernel<true, G>, blocks, kGramThreads, sizeof(Operand<float, kTileRows, false>[2]), stream, grads,
           layout, tile, n, splits, out);
  else
    launch(gram_kernel<false, G>, blocks, kGramThreads, sizeof(Operand<float, kTileRows, true>[2]), stream, grads,
           layout, tile, n, splits, out);
}

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

template void gram<float>(const Gradients<float>&, const Layout&, const Tile&, bool, int64_t, double*, Stream);
template void gram<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, bool, int64_t, double*, Stream);
template void pack<float>(const Gradients<float>&, const Layout&, const Tile&, double*, Stream);
template void pack<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, double*, Stream);
template void pack<float>(const Gradients<float>&, const Layout&, const Tile&, int, BFloat16*, Stream);
template void pack<BFloat16>(const Gradients<BFloat16>&, const Layout&, const Tile&, int, BFloat16*, Stream);

}  // namespace mfac::cuda
