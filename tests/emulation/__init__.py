"""Builds the CUDA ops as code for this CPU (see device.cuh) and puts them in the place of the CPU ops."""

import hashlib
import os
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from mfac import _build
from mfac.ops import compiled as ops

HERE = Path(__file__).parent
CUDA = _build.sources_root() / "cuda"
KERNELS = sorted(CUDA.glob("*.cu"))
# This folder's headers come before those of CUDA and torch.
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{HERE}", f"-I{CUDA}"]


def compile_and_link(sources, flags, library, link=()):
    """Compile C++ (also if it is called .cu) into a shared library."""
    compiler = _build.find_compiler().command
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [Path(folder) / f"{source.stem}-{i}.o" for i, source in enumerate(sources)]
        commands = [
            [compiler, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", out]
            for source, out in zip(sources, objects, strict=True)
        ]
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr[-4000:]
        subprocess.run([compiler, "-shared", *flags, *objects, *link, "-o", library], check=True)


def load():
    """Replace the CPU ops of this process by the CUDA ops, run by emulation."""
    ops.load()
    digest = hashlib.sha256(_build.cache_key().encode())
    for path in sorted(p for p in HERE.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".py")):
        digest.update(path.read_bytes())
    library = _build.cache_dir() / f"emulation-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        flags = ["-O1", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
        unfinished = library.with_suffix(f".{os.getpid()}")
        torch_libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-lc10", "-ltorch_cpu"]
        compile_and_link([*KERNELS, HERE / "bindings.cpp"], flags, unfinished, torch_libraries)
        unfinished.replace(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        torch.ops.load_library(str(library))
