// Loads and stores of float32 vectors that may be cut off at the end of a row, with conversion from and to bfloat16.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace mfac::sparse {

using Floats = cpu::Vector<float>;
constexpr int kFloats = cpu::kLanes<float>;

// The same bits as another type of that size.
template <typename To, typename From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The nearest bfloat16, ties to even; NaN stays NaN.
inline cpu::VectorN<uint16_t, kFloats> round_bfloat16(Floats x) {
  const auto bits = cast<cpu::VectorN<uint32_t, kFloats>>(x);
  const auto rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const auto nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return __builtin_convertvector(nan ? (bits >> 16 | 0x40) : rounded, cpu::VectorN<uint16_t, kFloats>);
}

// The elements at p whose places are in [low, high), and zeros; only these are read.
template <typename T>
inline Floats load_lanes(const T* p, int64_t low, int64_t high) {
  if (low <= 0 && high >= kFloats) return cpu::load<float>(p);
  low = std::clamp<int64_t>(low, 0, kFloats), high = std::clamp<int64_t>(high, low, kFloats);
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(MFAC_VECTOR_BYTES)
  const auto mask = static_cast<__mmask16>((1u << high) - (1u << low));
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(mask, p);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, p);
    return cpu::load<float>(reinterpret_cast<const BFloat16*>(&bits));
  }
#elif defined(__AVX2__) && !defined(MFAC_VECTOR_BYTES)
  if constexpr (std::is_same_v<T, float>) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(high)), lanes);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(low)), lanes);
    return _mm256_maskload_ps(p, _mm256_andnot_si256(before, below));
  }
#endif
  T some[kFloats] = {};
  for (int64_t i = low; i < high; ++i) some[i] = p[i];
  return cpu::load<float>(some);
}

// The first `count` elements at p, and zeros.
template <typename T>
inline Floats load_partial(const T* p, int64_t count) {
  return load_lanes(p, 0, count);
}

// The places of even (odd = 0) or odd (odd = 1) elements of (a, b).
template <int odd, int... i>
inline Floats every_second(std::integer_sequence<int, i...>, Floats a, Floats b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (2 * i + odd)...);
#else  // GCC 11
  return __builtin_shuffle(a, b, cpu::VectorN<int32_t, kFloats>{(2 * i + odd)...});
#endif
}

// The first `count` elements of x to p.
template <typename T>
inline void store_partial(T* p, Floats x, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    if (count >= kFloats) return static_cast<void>(std::memcpy(p, &x, sizeof x));
    if (count <= 0) return;
#if defined(__AVX512F__) && !defined(MFAC_VECTOR_BYTES)
    return _mm512_mask_storeu_ps(p, (1u << count) - 1, x);
#endif
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
  } else {
    const auto bits = round_bfloat16(x);
    if (count >= kFloats) return static_cast<void>(std::memcpy(p, &bits, sizeof bits));
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(MFAC_VECTOR_BYTES)
    if (count <= 0) return;
    return _mm256_mask_storeu_epi16(p, (1u << count) - 1, cast<__m256i>(bits));
#endif
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

// clamp(sum + bias, low, high); NaN stays NaN, as in torch: the instructions return their second operand then.
inline Floats finish(Floats sum, float bias, float low, float high) {
  const Floats x = sum + bias;
#if defined(__AVX512F__) && !defined(MFAC_VECTOR_BYTES)
  return _mm512_maskz_min_ps(-1, Floats{} + high, _mm512_maskz_max_ps(-1, Floats{} + low, x));
#elif defined(__AVX__) && !defined(MFAC_VECTOR_BYTES)
  return _mm256_min_ps(Floats{} + high, _mm256_max_ps(Floats{} + low, x));
#else
  const Floats above = x < low ? Floats{} + low : x;
  return above > high ? Floats{} + high : above;
#endif
}

}  // namespace mfac::sparse
