"""The CPU kernels as a shared library without torch (standalone.cpp), and the flags to build it with."""

import ctypes
import os
import subprocess
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("standalone.cpp")
SANITIZE = os.environ.get("MFAC_SANITIZE", "")  # what -fsanitize is given


class Kernels:
    """The functions of standalone.cpp with torch tensors in and out."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.run_joint_update.restype = self.library.run_quadratic_form.restype = c_double
        self.library.run_joint_step.restype = c_double
        self.library.run_select_smallest.restype = c_int64
        self.library.set_products.restype = c_bool

    @classmethod
    def build(cls, folder, arch, source=SOURCE):
        library = folder / "kernels.so"
        flags = ["-std=c++20", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
        flags += ["-O1", "-g", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else ["-O2"]
        command = [os.environ.get("CXX", "g++"), *flags, *arch.split(), str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return library

    def set_products(self, path, terms=0):
        """Use the bfloat16 instructions of that name, also for float32 gradients as so many terms; False if absent."""
        return self.library.set_products(path.encode(), c_int(terms))

    def call(self, name, grads, damping, block_size, *rest):
        assert grads.is_contiguous()
        head = (c_bool(grads.dtype == torch.bfloat16), c_void_p(grads.data_ptr()), *map(c_int64, grads.shape))
        tail = [a if isinstance(a, c_int64) else c_void_p(None if a is None else a.data_ptr()) for a in rest]
        return getattr(self.library, f"run_{name}")(*head, c_double(damping), c_int64(block_size), *tail)
