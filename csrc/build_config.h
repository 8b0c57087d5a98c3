// How an extension was built, as a dictionary: the part that all extensions share. Included by one file of each.
#pragma once

#include <pybind11/pybind11.h>

namespace mfac {

namespace py = pybind11;

#ifdef __clang__
inline constexpr const char* kCompiler = "clang " __VERSION__;
#else
inline constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

#ifdef _OPENMP
inline constexpr long kOpenMP = _OPENMP;  // yyyymm of the OpenMP specification
#else
inline constexpr long kOpenMP = 0;
#endif

// The instruction sets that the compiler was allowed to use, of those that matter to the kernels.
inline py::list simd() {
  py::list sets;
#ifdef __AVX2__
  sets.append("avx2");
#endif
#ifdef __FMA__
  sets.append("fma");
#endif
#ifdef __AVX512F__
  sets.append("avx512f");
#endif
#ifdef __AVX512BF16__
  sets.append("avx512bf16");
#endif
#ifdef __AMX_BF16__
  sets.append("amx-bf16");
#endif
#ifdef __ARM_NEON
  sets.append("neon");
#endif
#ifdef __ARM_FEATURE_SVE
  sets.append("sve");
#endif
  return sets;
}

inline py::dict build_config() {
  py::dict config;
  config["compiler"] = kCompiler;
  config["flags"] = MFAC_FLAGS;
  config["cxx_standard"] = static_cast<long>(__cplusplus);
  config["simd"] = simd();
  config["openmp"] = kOpenMP;
  config["ahead_of_time"] = static_cast<bool>(MFAC_AHEAD_OF_TIME);
  config["torch"] = MFAC_TORCH_VERSION;
  config["fingerprint"] = MFAC_FINGERPRINT;  // digest of the sources, and torch's version; mfac/_build looks for it
  return config;
}

}  // namespace mfac
