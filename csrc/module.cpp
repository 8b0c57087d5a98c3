// The Python module. The ops register themselves with torch; the module only says how it was built, and which bfloat16
// instructions the CPU kernels use.
#include <pybind11/pybind11.h>

#include "cpu/bf16.h"

namespace py = pybind11;

namespace {

#ifdef __clang__
constexpr const char* kCompiler = "clang " __VERSION__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

#ifdef _OPENMP
constexpr long kOpenMP = _OPENMP;  // yyyymm of the OpenMP specification
#else
constexpr long kOpenMP = 0;
#endif

// The instruction sets that the compiler was allowed to use, of those that matter to the kernels.
py::list simd() {
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

py::dict build_config() {
  py::dict config;
  config["compiler"] = kCompiler;
  config["flags"] = MFAC_FLAGS;
  config["cxx_standard"] = static_cast<long>(__cplusplus);
  config["simd"] = simd();
  config["cpu_bf16"] = mfac::cpu::kPathNames[static_cast<int>(mfac::cpu::bf16_path())];  // chosen at run time
  config["openmp"] = kOpenMP;
  config["cuda"] = MFAC_CUDA;  // GPU architectures, ';' between them
  config["ahead_of_time"] = static_cast<bool>(MFAC_AHEAD_OF_TIME);
  config["torch"] = MFAC_TORCH_VERSION;
  config["fingerprint"] = MFAC_FINGERPRINT;  // digest of the sources, and torch's version; mfac/_build looks for it
  return config;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of mfac. Importing it registers torch.ops.mfac.";
  m.def("build_config", &build_config,
        "Return how this module was compiled: compiler, flags, C++ standard, SIMD sets, bfloat16 instructions in use, "
        "OpenMP, torch version.");
}
