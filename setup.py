"""Packaging. Needs no torch, except with MFAC_AOT=1, which compiles the kernels ahead of time as mfac._C."""

import importlib.util
import os
from pathlib import Path

from setuptools import find_packages, setup


def ahead_of_time() -> dict:
    """Return setup()'s arguments for the compiled module, from the flags that the just-in-time build uses too."""
    from torch.utils import cpp_extension

    module = importlib.util.spec_from_file_location("_mfac_build", Path("mfac", "_build.py"))
    build = importlib.util.module_from_spec(module)
    module.loader.exec_module(build)
    if build.cuda_plan()[0]:
        cpp_extension.CUDA_HOME = str(build.cuda_home())  # torch's own may have no headers
    spec = build.extension_spec(ahead_of_time=True)
    extension = (cpp_extension.CUDAExtension if build.cuda_plan()[0] else cpp_extension.CppExtension)(
        "mfac._C",
        [os.path.relpath(source) for source in spec["sources"]],
        include_dirs=spec["include_dirs"],
        extra_compile_args={"cxx": spec["cflags"], "nvcc": spec["cuda_cflags"]},
        extra_link_args=spec["ldflags"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


sources = ["mfac.csrc"] + [f"mfac.csrc.{folder.name}" for folder in sorted(Path("csrc").iterdir()) if folder.is_dir()]
setup(
    packages=[*find_packages(include=["mfac", "mfac.*"]), *sources, "mfac.recipes"],
    package_dir={"mfac": "mfac", "mfac.csrc": "csrc", "mfac.recipes": "recipes"},
    package_data={"mfac.recipes": ["*.md"]} | {name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in sources},
    include_package_data=False,
    **(ahead_of_time() if os.environ.get("MFAC_AOT") == "1" else {}),
)
