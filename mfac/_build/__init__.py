"""Find, build and load the compiled kernels.

`toolchain` finds what a build needs, `spec` says what is built and how, `jit` runs the build in a process of its own
(`jit_child`), `cache` keeps the results and `loader` loads them. Imports within this package are relative, because setup.py
imports `spec` without importing mfac.
"""

from .cache import cache_dir, cache_key, make_private
from .errors import BuildError
from .loader import built, load, status
from .spec import PACKAGE, extension_spec, fingerprint, sources_root
from .toolchain import cpu, cuda_home, cuda_plan, find_compiler, find_ninja

__all__ = [
    "PACKAGE",
    "BuildError",
    "built",
    "cache_dir",
    "cache_key",
    "cpu",
    "cuda_home",
    "cuda_plan",
    "extension_spec",
    "find_compiler",
    "find_ninja",
    "fingerprint",
    "load",
    "make_private",
    "sources_root",
    "status",
]
