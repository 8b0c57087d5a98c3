// The order of the scores of a selection as integers, for kernels and host code alike.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MFAC_HOST_DEVICE __host__ __device__
#else  // a C++ compiler: host code, and kernels under tests/emulation
#define MFAC_HOST_DEVICE
#endif

namespace mfac::cuda {

// a < b exactly if order_key(a) < order_key(b), for all but NaN; -0 and 0 have the same key.
MFAC_HOST_DEVICE inline uint32_t order_key(float score) {
  const float value = score + 0.0f;  // -0 + 0 = 0
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;  // negative: all bits flipped; else the sign bit
}

}  // namespace mfac::cuda
