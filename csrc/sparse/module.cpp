// The Python module of the inference kernels. The ops register themselves with torch.
#include "../build_config.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Sparse inference kernels of mfac. Importing it registers torch.ops.mfac_sparse.";
  m.def("build_config", &mfac::build_config,
        "Return how this module was compiled: compiler, flags, C++ standard, SIMD sets, OpenMP, torch version.");
}
