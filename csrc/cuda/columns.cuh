// Device functions that all kernels share: element types, and the columns of a block.
#pragma once

#include <device.cuh>

#include "kernels.h"

namespace mfac::cuda {

// Threads per block, unless stated otherwise: the 64 K registers then allow each thread the 255 that it can use.
constexpr int kThreads = 256;
constexpr int kWarp = 32;                    // threads of a warp on all GPUs
constexpr unsigned kAllLanes = 0xffffffffu;  // mask of a full warp

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// The nearest bfloat16 of a finite number, ties to even.
__device__ inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

__device__ inline int64_t block_begin(const Layout& layout, int64_t block) { return block * layout.block_size; }

__device__ inline int64_t block_width(const Layout& layout, int64_t block) {
  const int64_t rest = layout.d - block_begin(layout, block);
  return rest < layout.block_size ? rest : layout.block_size;
}

__device__ inline int64_t listed(const Layout& layout, int64_t block) {
  return layout.columns ? layout.offsets[block + 1] - layout.offsets[block] : block_width(layout, block);
}

// Position in [0, d) of the i-th column that is listed for a block, or -1 beyond their number.
__device__ inline int64_t column(const Layout& layout, int64_t block, int64_t i) {
  if (i >= listed(layout, block)) return -1;
  return block_begin(layout, block) + (layout.columns ? layout.columns[layout.offsets[block] + i] : i);
}

__device__ inline double warp_sum(double x) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

}  // namespace mfac::cuda
