// Saliency of groups of weights that are pruned together (csrc/cpu/group_saliency.cpp): ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q for the
// subsets Q of a group, with, from the columns z of `solved`,
//
//   capacitance side   [F⁻¹]_ij = (δ_ij - z_i·z_j) / λ      z_i = L⁻¹ g_i
//   Fisher side        [F⁻¹]_ij = m z_i·z_j                 z_i = column i of L⁻¹
//
// One warp per part, the members of a group in one block. First it computes their piece of F⁻¹ into shared memory,
// lanes along the rows of z (members are near each other, so further elements of a row are in the cache). Then, subset
// by subset, a Cholesky factorisation in place, one lane per row. size²/2 dot products of length n per part; float64.
#include "../numerics.h"
#include "columns.cuh"

namespace mfac::cuda {
namespace {

// The memory of one warp: elements[size][size], factor[s][s], y[s], chosen[s].
struct Scratch {
  __device__ Scratch(double* memory, int64_t size, int64_t s)
      : elements(memory),
        factor(elements + size * size),
        y(factor + s * s),
        chosen(reinterpret_cast<int32_t*>(y + s)) {}
  double *elements, *factor, *y;
  int32_t* chosen;
};

// solved [.., rows, width], memory [parts, doubles] or null, out [parts, subsets].
__global__ void __launch_bounds__(kWarp)
    group_kernel(Parts parts, const double* __restrict__ solved, int64_t rows, int64_t width, double damping, double m,
                 bool capacitance, double* memory, int64_t doubles, double* __restrict__ out) {
  const int64_t part = blockIdx.x, size = parts.size, s = parts.subset_size;
  const int lane = threadIdx.x;
  const Scratch own(memory ? memory + part * doubles : &shared<double>(), size, s);
  const int32_t* table = parts.table + part * size;
  const float* w = parts.weights + part * size;
  const int32_t first = parts.first_column;
  const double* z = solved + (parts.owner[part] - parts.first_owner) * rows * width;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      if (table[i] < 0 || table[j] < 0) continue;
      double sum = 0;
      for (int64_t r = lane; r < rows; r += kWarp)
        sum += z[r * width + table[i] - first] * z[r * width + table[j] - first];
      sum = warp_sum(sum);
      if (capacitance) {
        sum = ((i == j ? 1 : 0) - sum) / damping;
      } else {
        sum *= m;
      }
      if (lane == 0) own.elements[i * size + j] = own.elements[j * size + i] = sum;
    }
  __syncwarp();

  for (int64_t k = 0; k < parts.subsets; ++k) {
    int count = 0;  // members of the subset that are here
    for (int64_t i = 0; i < s; ++i) {
      const int32_t place = static_cast<int32_t>(parts.members[k * s + i]);
      if (table[place] < 0) continue;
      if (lane == 0) {
        own.chosen[count] = place;
        own.y[count] = w[place];
      }
      ++count;
    }
    __syncwarp();
    for (int i = lane; i < count; i += kWarp)
      for (int j = 0; j <= i; ++j) own.factor[i * count + j] = own.elements[own.chosen[i] * size + own.chosen[j]];
    __syncwarp();
    double sum = 0;
    for (int j = 0; j < count; ++j) {
      const double diagonal = own.elements[own.chosen[j] * (size + 1)], least = capacitance ? 1 / damping : diagonal;
      const double scale = least > diagonal ? least : diagonal, floor = j > 0 ? kMinPivot * scale : 0;
      const double pivot = own.factor[j * count + j], root = sqrt(pivot > floor ? pivot : floor);
      const double y = own.y[j] / root;
      sum += y * y;
      __syncwarp();
      for (int i = j + 1 + lane; i < count; i += kWarp) {
        own.factor[i * count + j] /= root;
        own.y[i] -= own.factor[i * count + j] * y;
      }
      __syncwarp();
      for (int i = j + 1 + lane; i < count; i += kWarp)
        for (int c = j + 1; c <= i; ++c)
          own.factor[i * count + c] -= own.factor[i * count + j] * own.factor[c * count + j];
      __syncwarp();
    }
    if (lane == 0) out[part * parts.subsets + k] = 0.5 * sum;
  }
}

}  // namespace

int64_t group_saliency_bytes(int64_t size, int64_t subset_size) {
  return static_cast<int64_t>(sizeof(double)) *
         (size * size + subset_size * (subset_size + 2));  // an int counts as two
}

bool group_saliency_fits(int64_t size, int64_t subset_size) {
  return group_saliency_bytes(size, subset_size) <= shared_limit();
}

void group_saliency(const Parts& parts, const double* solved, int64_t rows, int64_t width, double damping, int64_t m,
                    bool capacitance, void* scratch, double* out, Stream stream) {
  const int64_t bytes = group_saliency_bytes(parts.size, parts.subset_size);
  launch(group_kernel, parts.count, kWarp, scratch ? 0 : bytes, stream, parts, solved, rows, width, damping,
         static_cast<double>(m), capacitance, static_cast<double*>(scratch),
         bytes / static_cast<int64_t>(sizeof(double)), out);
}

}  // namespace mfac::cuda
