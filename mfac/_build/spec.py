"""What is built and how: sources, flags and fingerprint.

There are two extensions, each compiled at its own first use: ``_C``, the kernels of pruning, and ``_sparse``, those of
sparse inference. One function, `extension_spec`, serves both, and both builds: the just-in-time build of `loader`, which is
the usual one, and the ahead-of-time build of setup.py (``MFAC_AOT=1``), which imports this module without mfac.
"""

import hashlib
import json
import os
from pathlib import Path

from . import toolchain

PACKAGE = Path(__file__).resolve().parents[1]
EXTENSIONS = ("_C", "_sparse")


def sources_root() -> Path:
    """Return the folder of the C++ sources: ``csrc`` in the installed package, or beside it in a source checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def _ingredients(extension: str) -> list[Path]:
    """Return the files that an extension is made from, sources and headers, sorted."""
    root = sources_root()
    files = sorted(p for p in root.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"})
    if extension == "_C":
        return [p for p in files if root / "sparse" not in p.parents]
    shared = (root, root / "cpu")
    return [p for p in files if root / "sparse" in p.parents or (p.parent in shared and p.suffix == ".h")]


def fingerprint(extension: str = "_C") -> str:
    """Return a name for what a build is made from: a digest of sources and headers, and the version of torch."""
    import torch

    root, digest = sources_root(), hashlib.sha256()
    for path in _ingredients(extension):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"mfac{extension.removesuffix('_C').replace('_', '-')}-{digest.hexdigest()[:16]}/torch-{torch.__version__}"


def architecture(ahead_of_time: bool = False) -> str:
    """Return the value for ``-march``: $MFAC_ARCH, else "native" just in time and "" (portable) ahead of time."""
    return os.environ.get("MFAC_ARCH") or ("" if ahead_of_time else "native")


def compile_flags(gpus: list[str], ahead_of_time: bool = False) -> tuple[list[str], list[str]]:
    """Return the flags for the C++ compiler, without macros, and for nvcc: all that does not depend on the tools.

    The C++ standard is absent on purpose: torch adds the one that its headers need.
    """
    arch = architecture(ahead_of_time)
    flags = ["-O3", "-ffp-contract=fast", "-fopenmp", "-Wall", "-Wextra", "-g0"] + ([f"-march={arch}"] if arch else [])
    return flags, ["-O3", *(f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus)]


def extension_gpus(extension: str) -> list[str]:
    """Return the GPU architectures that an extension is built for here; only ``_C`` has CUDA kernels."""
    return toolchain.cuda_plan().gpus if extension == "_C" else []


def extension_spec(extension: str = "_C", ahead_of_time: bool = False) -> dict[str, list[str]]:
    """Return sources and flags of an extension, the same for both kinds of build.

    OpenMP is compiled in but, with GCC, not linked: the symbols come from the runtime that torch brings, so that both
    share one pool of threads.

    Args:
        extension: One of `EXTENSIONS`.
        ahead_of_time: True for setup.py; the default ``-march`` is then the portable one.

    Returns:
        sources (absolute paths), include_dirs, cflags (not quoted for a shell), cuda_cflags (for nvcc) and ldflags.

    Raises:
        BuildError: There is no compiler, or pybind11 is not installed.
    """
    import torch

    root, gpus = sources_root(), extension_gpus(extension)
    flags, cuda_flags = compile_flags(gpus, ahead_of_time)
    macros = {
        "MFAC_FLAGS": json.dumps(" ".join(flags)),
        "MFAC_AHEAD_OF_TIME": int(ahead_of_time),
        "MFAC_FINGERPRINT": json.dumps(fingerprint(extension)),
        "MFAC_TORCH_VERSION": json.dumps(torch.__version__),
        "MFAC_CUDA": json.dumps(";".join(gpus)),
    }
    folders = {"_C": [root, root / "cpu"], "_sparse": [root / "sparse"]}[extension]
    sources = [source for folder in folders for source in folder.glob("*.cpp")]
    library = toolchain.shared_cxx_library()
    if gpus:
        sources += [*(root / "cuda").glob("*.cpp"), *(root / "cuda").glob("*.cu")]
    return {
        "sources": [str(p) for p in sorted(sources)],
        "include_dirs": [str(root), *[str(root / "cuda")] * bool(gpus), toolchain.find_pybind11().include],
        "cflags": flags + [f"-D{name}={value}" for name, value in macros.items()],
        "cuda_cflags": cuda_flags,
        "ldflags": ["-fopenmp"] * ("clang" in toolchain.find_compiler().version) + ([library] if library else []),
    }
