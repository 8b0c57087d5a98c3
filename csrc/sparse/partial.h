// Loads and stores of float32 vectors that may be cut off at the end of a row, with conversion from and to bfloat16.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace mfac::sparse {

using Floats = cpu::Vector<float>;
constexpr int kFloats = cpu::kLanes<float>;

// The nearest bfloat16, ties to even; NaN stays NaN.
inline cpu::VectorN<uint16_t, kFloats> round_bfloat16(Floats x) {
  cpu::VectorN<uint32_t, kFloats> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const auto rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const auto nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return __builtin_convertvector(nan ? (bits >> 16 | 0x40) : rounded, cpu::VectorN<uint16_t, kFloats>);
}

// The first `count` elements at p, and zeros.
template <typename T>
inline Floats load_partial(const T* p, int64_t count) {
  if (count >= kFloats) return cpu::load<float>(p);
#if defined(__AVX512F__) && !defined(MFAC_VECTOR_BYTES)
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps((1u << count) - 1, p);
#endif
  T some[kFloats] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return cpu::load<float>(some);
}

// The first `count` elements of x to p.
template <typename T>
inline void store_partial(T* p, Floats x, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count >= kFloats) return static_cast<void>(std::memcpy(p, &x, sizeof x));
#if defined(__AVX512F__) && !defined(MFAC_VECTOR_BYTES)
    return _mm512_mask_storeu_ps(p, (1u << count) - 1, x);
#endif
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
  } else {
    const auto bits = round_bfloat16(x);
    if (count >= kFloats) return static_cast<void>(std::memcpy(p, &bits, sizeof bits));
    for (int64_t i = 0; i < count; ++i) p[i].bits = bits[i];
  }
}

// to[i] = from[i] for i < count, zero for i < round_up(count, kFloats): `to` has room for whole vectors.
template <typename T>
inline void widen_row(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kFloats) {
    const Floats x = load_partial(from + i, count - i);
    std::memcpy(to + i, &x, sizeof x);
  }
}

// to[i] = from[i] for i < count, rounded to T; `from` has whole vectors.
template <typename T>
inline void narrow_row(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kFloats) store_partial(to + i, cpu::load<float>(from + i), count - i);
}

// clamp(sum + bias, low, high); NaN stays NaN, as in torch.
inline Floats finish(Floats sum, float bias, float low, float high) {
  const Floats x = sum + bias;
  const Floats above = x < low ? Floats{} + low : x;
  return above > high ? Floats{} + high : above;
}

}  // namespace mfac::sparse
