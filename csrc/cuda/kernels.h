// Entry points of the CUDA kernels: raw pointers to device memory, sizes and a stream, no torch and no CUDA header.
// Each is defined in the .cu file of its name or of the op it belongs to. All are asynchronous.
//
// Products of bfloat16 matrices are left to cuBLAS (batches.h). A tile is a set of blocks of one side, with a range of
// their listed columns. `gram` and the float64 diagonal read G in place; `pack` copies its columns for cuBLAS, padded
// with zeros to one width.
#pragma once

#include <cstdint>

struct CUstream_st;  // a cudaStream_t points to it

namespace mfac::cuda {

using Stream = CUstream_st*;

struct BFloat16 {
  uint16_t bits;
};

// G [m, d], rows `stride` elements apart.
template <typename G>
struct Gradients {
  const G* data;
  int64_t m, d, stride;
};

// The partition of d columns into blocks, and a list of some columns of each.
struct Layout {
  int64_t d, block_size;
  // Those of block b are at [offsets[b], offsets[b + 1]), relative to its first column; null: all columns.
  const int32_t* columns = nullptr;
  const int64_t* offsets = nullptr;  // [blocks + 1]
};

// Some blocks, and the range [first, first + width) of the columns that are listed for each.
struct Tile {
  const int32_t* ids;  // [count]: the blocks
  int64_t count, first, width;
};

// Bytes that the temporaries of an op should not exceed on the current GPU.
int64_t temporaries_bytes();

// out[tile.count, m, tile.width] = the listed columns, zero-padded. As bfloat16: out[parts, tile.count, m, tile.width],
// each term the rounding error of the ones before; one term is 8 bits of a number, two are 16.
template <typename G>
void pack(const Gradients<G>& grads, const Layout& layout, const Tile& tile, double* out, Stream stream);
template <typename G>
void pack(const Gradients<G>& grads, const Layout& layout, const Tile& tile, int parts, BFloat16* out, Stream stream);

// out[splits, tile.count, n, n] = G Gᵀ (capacitance side; n = m) or GᵀG (n = tile.width) of the listed columns, on and
// below the diagonal, float64. For wide tiles of the capacitance side it is a sum of `splits` terms, each of a range of
// columns that is deep enough that adding up the terms costs little.
constexpr int64_t kGramSplit = 8192;
constexpr int64_t gram_splits(int64_t width) {
  return width <= 2 * kGramSplit ? 1 : (width + kGramSplit - 1) / kGramSplit;
}
template <typename G>
void gram(const Gradients<G>& grads, const Layout& layout, const Tile& tile, bool capacitance, int64_t n, double* out,
          Stream stream);

// l[count, n, n] = lower Cholesky factors of a[count, n, n] + ridge I, zero above the diagonal; only the lower triangle
// of a is read. inverse[count, n, n], unless null, L⁻¹. Orders up to kMaxOrder. A matrix that rounding made indefinite
// gets a jitter on its diagonal: `rounding` times its trace at first, the rounding error of a, then ten times as much
// at each further attempt. After kFactorAttempts, failed[0] becomes 1 + ids[i]; ids[count] are the matrices' blocks.
constexpr int64_t kMaxOrder = 512;  // beyond, one block of threads per matrix is too few
void cholesky(const double* a, int64_t count, int64_t n, double ridge, double rounding, const int32_t* ids, double* l,
              double* inverse, int32_t* failed, Stream stream);

// out of the columns of a tile = their elements of diag F⁻¹ on the capacitance side, from w[tile.count, m, m] = L⁻¹.
template <typename G>
void capacitance_diagonal(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* w,
                          double damping, float* out, Stream stream);

// The same of either side, from solved[tile.count, rows, tile.width]: L⁻¹ G on the capacitance side, where m < columns
// in use, else L⁻¹.
template <typename G, typename T>
void diagonal_of_solved(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const T* solved,
                        int64_t rows, double damping, bool capacitance, float* out, Stream stream);

// t[k, tile.count, m] = G x of each block by itself, for x[k, d]. For wide blocks it is a sum of `splits` terms,
// t[splits, k, count, m].
int64_t row_splits(int64_t width);
template <typename G>
void multiply_rows(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* x, int64_t k,
                   double* t, Stream stream);

// out[k, d] = Gᵀ t in all columns of the blocks of a tile, for t[k, tile.count, m].
template <typename G>
void multiply_columns(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* t, int64_t k,
                      double* out, Stream stream);

// x[k, count, n] <- (L Lᵀ)⁻¹ x for l[count, n, n].
void cholesky_solve(const double* l, int64_t count, int64_t n, int64_t k, double* x, Stream stream);

// out[k, d] = F⁻¹ x in the listed columns of blocks on the capacitance side, with l[tile.count, m, m], if a block fits
// in the shared memory of a block of threads; otherwise does nothing and returns false.
template <typename G>
bool inverse_product(const Gradients<G>& grads, const Layout& layout, const Tile& tile, const double* l,
                     const double* x, int64_t k, double damping, double* out, Stream stream);

// packed[k, tile.count, tile.width] = the listed columns of x[k, d], zero-padded; and back, times a factor.
void gather(const Layout& layout, const Tile& tile, const double* x, int64_t k, double* packed, Stream stream);
void scatter(const Layout& layout, const Tile& tile, const double* packed, int64_t k, double factor, double* x,
             Stream stream);

// out[parts, subsets] = saliencies of the subsets of parts, a part being the members of a group that lie in one block.
// table[parts, size] are their columns of solved[.., rows, width], plus first_column, or -1; owner[parts] - first_owner
// is the matrix of `solved`.
struct Parts {
  const int32_t *table, *owner;
  int32_t first_column, first_owner;
  const float* weights;    // [parts, size]
  int64_t count, size;     // parts, places in a group
  const int64_t* members;  // [subsets, subset_size] in [0, size)
  int64_t subsets, subset_size;
};
int64_t group_saliency_bytes(int64_t size, int64_t subset_size);  // of scratch memory for one part
// Whether that fits in shared memory; `scratch` is then null, else [parts, group_saliency_bytes].
bool group_saliency_fits(int64_t size, int64_t subset_size);
void group_saliency(const Parts& parts, const double* solved, int64_t rows, int64_t width, double damping, int64_t m,
                    bool capacitance, void* scratch, double* out, Stream stream);

// The steps of a selection among n scores; select_smallest.h has their order. Keys: order_key.h.
struct Bounds {
  uint32_t low, high;  // keys, both included
};
struct Found {
  unsigned long long below, inside;  // how many keys are below `low`, and how many in bounds
  unsigned long long nan;            // the position of the first NaN, or n
};
constexpr int64_t kRadixBins = 2048;  // 11 bits of a key at a time: three passes; 8 KiB of counts per block of threads
// sample[count]: scores at fixed but irregular positions.
void sample_scores(const float* scores, int64_t n, int64_t count, float* sample, Stream stream);
// Counts into found[1], initially {0, 0, n}, and copies the keys in bounds to inside[capacity] as far as there is room.
void count_scores(const float* scores, int64_t n, Bounds bounds, uint32_t* inside, int64_t capacity, Found* found,
                  Stream stream);
// cut[3]: the k-th smallest (k >= 1) of n keys, or of the keys in bounds of n scores if `keys` is null; the number of
// keys equal to it; the number of those among the k smallest. histogram[kRadixBins + 2] is scratch.
void find_cut(const uint32_t* keys, const float* scores, int64_t n, Bounds bounds, int64_t k,
              unsigned long long* histogram, unsigned long long* cut, Stream stream);
// kept = key > threshold, and of the keys equal to it all but the first `pruned_ties`; weights, unless null, become
// zero where pruned. If all or none of the ties are pruned, ties_before is null and pruned_ties > n or 0; otherwise
// ties_before[tie_chunks(n)] is the exclusive prefix sum of the output of count_ties.
int64_t tie_chunks(int64_t n);
void count_ties(const float* scores, int64_t n, uint32_t threshold, int32_t* tie_counts, Stream stream);
void write_mask(const float* scores, int64_t n, uint32_t threshold, int64_t pruned_ties, const int64_t* ties_before,
                bool* kept, float* weights, Stream stream);

}  // namespace mfac::cuda
