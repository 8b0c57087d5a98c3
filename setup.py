"""Packaging. Needs no torch, except with MFAC_AOT=1, which compiles mfac._C and mfac._sparse ahead of time."""

import importlib
import os
import sys
import types
from pathlib import Path

from setuptools import find_packages, setup


def ahead_of_time() -> dict:
    """Return setup()'s arguments for the compiled modules, from the flags that the just-in-time build uses too."""
    from torch.utils import cpp_extension

    # spec and toolchain without the rest of mfac, whose dependencies are not needed for a build.
    package = sys.modules["_mfac_build"] = types.ModuleType("_mfac_build")
    package.__path__ = [os.path.abspath(os.path.join("mfac", "_build"))]
    toolchain = importlib.import_module("_mfac_build.toolchain")
    gpus = toolchain.cuda_plan().gpus
    if gpus:
        cpp_extension.CUDA_HOME = str(toolchain.cuda_home())  # torch's own may have no headers
    build = importlib.import_module("_mfac_build.spec")
    extensions = []
    for name in build.EXTENSIONS:
        spec = build.extension_spec(name, ahead_of_time=True)
        kind = cpp_extension.CUDAExtension if build.extension_gpus(name) else cpp_extension.CppExtension
        if spec["sources"]:
            extensions.append(
                kind(
                    f"mfac.{name}",
                    [os.path.relpath(source) for source in spec["sources"]],
                    include_dirs=spec["include_dirs"],
                    extra_compile_args={"cxx": spec["cflags"], "nvcc": spec["cuda_cflags"]},
                    extra_link_args=spec["ldflags"],
                )
            )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


sources = ["mfac.csrc"] + [f"mfac.csrc.{folder.name}" for folder in sorted(Path("csrc").iterdir()) if folder.is_dir()]
setup(
    packages=[*find_packages(include=["mfac", "mfac.*"]), *sources, "mfac.recipes"],
    package_dir={"mfac": "mfac", "mfac.csrc": "csrc", "mfac.recipes": "recipes"},
    package_data={"mfac": ["py.typed"], "mfac.recipes": ["*.md"]}
    | {name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in sources},
    include_package_data=False,
    **(ahead_of_time() if os.environ.get("MFAC_AOT") == "1" else {}),
)
