"""Load the compiled kernels: the prebuilt module, else the one in the cache, built there if need be.

Each extension of `spec.EXTENSIONS` is loaded at its own first use, and at most once per process.
"""

import importlib.machinery
import importlib.util
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from . import cache, spec, toolchain
from .errors import BuildError, CompileError, explain
from .jit import compile_kernels

_once = threading.Lock()
_outcomes: "dict[str, ModuleType | BuildError]" = {}
_status: dict[str, dict[str, Any]] = {}
_UNTRIED = {"origin": None, "path": None, "seconds": None, "error": None}


def load(extension: str = "_C") -> ModuleType:
    """Return a compiled module, after building it where needed.

    Importing it registers ``torch.ops.mfac`` (``_C``) or ``torch.ops.mfac_sparse`` (``_sparse``). The prebuilt module,
    such as ``mfac._C``, is taken if it was made from these sources for this torch. Otherwise the kernels are compiled
    (once, about 30 s; from then on they are in the cache). The outcome, also a failure, holds for the life of the process.

    Args:
        extension: One of `spec.EXTENSIONS`.

    Returns:
        The module, with ``build_config()``.

    Raises:
        BuildError: Neither a prebuilt module nor a just-in-time build can be had.
    """
    with _once:
        if extension not in _outcomes:
            start = time.perf_counter()
            state = _status.setdefault(extension, dict(_UNTRIED))
            try:
                _outcomes[extension] = _load(extension)
            except BuildError as error:
                _outcomes[extension] = error
                state["error"] = str(error)
            state["seconds"] = time.perf_counter() - start
        outcome = _outcomes[extension]
    if isinstance(outcome, BuildError):
        raise outcome.with_traceback(None)
    return outcome


def status(extension: str = "_C") -> dict[str, Any]:
    """Return what `load` has come to so far, without building anything.

    Args:
        extension: One of `spec.EXTENSIONS`.

    Returns:
        origin ("prebuilt", "cache", "built", or None while nothing is loaded), path (of the module), seconds (that the
        first call of `load` took) and error (its text, or None).
    """
    return dict(_status.get(extension, _UNTRIED))


def built(extension: str = "_C") -> Path | None:
    """Return the path of a compiled module that `load` would find, without building or loading anything.

    Args:
        extension: One of `spec.EXTENSIONS`.

    Returns:
        The path in the package or in the cache, or None.
    """
    path, _ = _prebuilt(extension)
    if path is None:
        path = cache.cache_dir() / cache.cache_key(extension) / f"{extension}.so"
    return path if path.exists() else None


def _load(extension: str) -> ModuleType:
    """Return the prebuilt module of an extension, else the one in the cache, building it there if need be.

    Raises:
        BuildError: Neither can be had.
    """
    path, tried = _prebuilt(extension)
    if path is not None:
        try:
            return _import(extension, path, "prebuilt")
        except ImportError as error:
            tried = f"prebuilt {path}: {error}"
    if not sys.platform.startswith("linux"):
        cause = f"kernels are built on Linux only, and this is {sys.platform}"
        raise BuildError(explain([tried], cause, "set MFAC_BACKEND=reference"))
    try:
        try:
            path, origin = _build(extension, tried)
        except CompileError as error:
            if not spec.extension_gpus(extension):
                raise
            toolchain.failed_cuda_log = cache.cache_dir() / cache.cache_key() / "build.log"
            warnings.warn(
                f"mfac: there will be no CUDA kernels, only those for the CPU.\n{error}", RuntimeWarning, stacklevel=5
            )
            path, origin = _build(extension, tried)
    except OSError as error:
        fix = "set MFAC_CACHE_DIR to a folder that you may write to, on a local disk"
        folder = cache.cache_dir()
        raise BuildError(explain([tried, f"cache {folder}: {error}"], "the cache cannot be used", fix)) from error
    try:
        return _import(extension, path, origin)
    except ImportError as error:
        fix = f"remove {path.parent} and try again"
        raise BuildError(explain([tried, f"{path}: {error}"], "the file in the cache is damaged", fix)) from error


def _prebuilt(extension: str) -> tuple[Path | None, str]:
    """Return the path of an extension in the installed package, such as ``mfac._C``, if there is one that fits, and what to say if not.

    The file is searched for its fingerprint, not imported, because importing registers ops, which cannot be undone.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = spec.PACKAGE / f"{extension}{suffix}"
        if path.exists():
            wanted = spec.fingerprint(extension)
            if f"{wanted}\0".encode() in path.read_bytes():
                return path, ""
            return None, f"prebuilt {path}: made from other sources or for another torch than {wanted}"
    return None, f"prebuilt mfac.{extension}: none in this installation"


def _import(extension: str, path: Path, origin: str) -> ModuleType:
    """Return the compiled module at `path`, imported, and note where it came from."""
    import torch  # noqa: F401  the module needs torch's libraries in the process

    found = importlib.util.spec_from_file_location(f"mfac.{extension}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    _status[extension].update(origin=origin, path=str(path))
    return module


def _build(extension: str, tried: str) -> tuple[Path, str]:
    """Return the path of the module in the cache and its origin, after compiling it under the lock if it is absent."""
    build_dir = cache.cache_dir() / cache.cache_key(extension)
    target = build_dir / f"{extension}.so"
    if cache.fits(build_dir, extension):
        return target, "cache"
    cache.make_private(build_dir)
    cache.check_trusted(build_dir.parent, build_dir)
    with cache.locked(build_dir):
        if cache.fits(build_dir, extension):  # another process has built it while this one waited
            return target, "cache"
        for leftover in build_dir.glob("build-*"):  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=build_dir, ignore_cleanup_errors=True) as folder:
            compile_kernels(extension, Path(folder), build_dir / "build.log", tried)
            cache.store(build_dir, Path(folder) / f"{extension}.so")
    return target, "built"
