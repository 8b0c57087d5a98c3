// The Python module. The ops register themselves with torch; the module only says how it was built, and which bfloat16
// instructions the CPU kernels use.
#include "build_config.h"
#include "cpu/bf16.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of mfac. Importing it registers torch.ops.mfac.";
  m.def(
      "build_config",
      [] {
        auto config = mfac::build_config();
        config["cpu_bf16"] = mfac::cpu::kPathNames[static_cast<int>(mfac::cpu::bf16_path())];  // chosen at run time
        config["cuda"] = MFAC_CUDA;  // GPU architectures, ';' between them
        return config;
      },
      "Return how this module was compiled: compiler, flags, C++ standard, SIMD sets, bfloat16 instructions in use, "
      "OpenMP, torch version.");
}
