"""The report of ``mfac doctor``: what is installed, what the machine can do, and whether the compiled kernels load."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable

from mfac import __version__, _build
from mfac.checks import check_choice
from mfac.ops.backend import BACKENDS


def main() -> int:
    """Print the report, building the kernels if that has not happened yet.

    Returns:
        0 if the compiled kernels load, 1 if not, or if MFAC_BACKEND is no backend; the reason is then printed.
    """
    import torch

    backend = os.environ.get("MFAC_BACKEND", "auto")
    _row("mfac", __version__)
    for name in ("torch", "numpy", "pybind11", "ninja"):
        _row(name, _version(name))
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("platform", platform.platform())
    _row("compiler", _or_reason(lambda: " | ".join(_build.find_compiler())))
    _row("ninja path", _or_reason(_build.find_ninja))
    _row("cpu", _build.cpu()[0])
    _row("cpu capability", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    _row("cuda", _cuda())
    _row("cuda kernels", _build.cuda_plan().reason)
    _row("sources", _build.sources_root())
    _row("cache", _build.cache_dir())
    _row("backend", f"{backend} (MFAC_BACKEND)" if "MFAC_BACKEND" in os.environ else backend)
    sys.stdout.write("loading the kernels; at their first use they are compiled, which takes half a minute or more\n")
    sys.stdout.flush()
    try:
        module = _build.load()
    except _build.BuildError as error:
        _row("kernels", f"NOT LOADED\n{error}")
        return 1
    status = _build.status()
    _row("kernels", f"loaded ({status['origin']}) in {status['seconds']:.2f} s from {status['path']}")
    for key, value in module.build_config().items():
        _row(f"  {key}", ", ".join(value) or "none" if isinstance(value, list) else value)
    _row("sparse kernels", _sparse())
    try:
        check_choice("MFAC_BACKEND", backend, BACKENDS)
    except ValueError as error:
        _row("backend", f"WRONG\n{error}")
        return 1
    return 0


def _row(name: str, value: object) -> None:
    """Print one line of the report."""
    sys.stdout.write(f"{name:16} {value}\n")


def _version(name: str) -> str:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _or_reason(find: Callable[[], str]) -> str:
    """Return what `find` finds, or how to get it."""
    try:
        return find()
    except _build.BuildError as error:
        return f"not found; {str(error).splitlines()[-1].strip()}"


def _sparse() -> str:
    """Return the state of the kernels for sparse inference, which are not built for the sake of this report."""
    path = _build.built("_sparse")
    return f"built: {path}" if path else "not built yet: compiled at the first use of mfac.sparse"


def _cuda() -> str:
    """Return the state of CUDA in torch, and the devices."""
    import torch

    if not torch.cuda.is_available():
        return f"no device (torch built for {torch.version.cuda or 'cpu'})"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(devices)}"
