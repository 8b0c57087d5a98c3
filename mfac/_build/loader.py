"""Load the compiled kernels: the prebuilt module, else the one in the cache, built there if need be."""

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
_outcome: "ModuleType | BuildError | None" = None
_status: dict[str, Any] = {"origin": None, "path": None, "seconds": None, "error": None}


def load() -> ModuleType:
    """Return the compiled module, after building it where needed. Importing it registers ``torch.ops.mfac``.

    The prebuilt ``mfac._C`` is taken if it was made from these sources for this torch. Otherwise the kernels are
    compiled (once, about 30 s; from then on they are in the cache). The outcome, also a failure, holds for the
    life of the process.

    Returns:
        The module, with ``build_config()``.

    Raises:
        BuildError: Neither a prebuilt module nor a just-in-time build can be had.
    """
    global _outcome
    with _once:
        if _outcome is None:
            start = time.perf_counter()
            try:
                _outcome = _load()
            except BuildError as error:
                _outcome = error
                _status["error"] = str(error)
            _status["seconds"] = time.perf_counter() - start
    if isinstance(_outcome, BuildError):
        raise _outcome.with_traceback(None)
    return _outcome


def status() -> dict[str, Any]:
    """Return what `load` has come to so far, without building anything.

    Returns:
        origin ("prebuilt", "cache", "built", or None while nothing is loaded), path (of the module), seconds (that the
        first call of `load` took) and error (its text, or None).
    """
    return dict(_status)


def _load() -> ModuleType:
    """Return the prebuilt module, else the one in the cache, building it there if need be.

    Raises:
        BuildError: Neither can be had.
    """
    path, tried = _prebuilt()
    if path is not None:
        try:
            return _import(path, "prebuilt")
        except ImportError as error:
            tried = f"prebuilt {path}: {error}"
    if not sys.platform.startswith("linux"):
        cause = f"kernels are built on Linux only, and this is {sys.platform}"
        raise BuildError(explain([tried], cause, "set MFAC_BACKEND=reference"))
    try:
        try:
            path, origin = _build(tried)
        except CompileError as error:
            if not toolchain.cuda_plan().gpus:
                raise
            toolchain.failed_cuda_log = cache.cache_dir() / cache.cache_key() / "build.log"
            warnings.warn(
                f"mfac: there will be no CUDA kernels, only those for the CPU.\n{error}", RuntimeWarning, stacklevel=5
            )
            path, origin = _build(tried)
    except OSError as error:
        fix = "set MFAC_CACHE_DIR to a folder that you may write to, on a local disk"
        folder = cache.cache_dir()
        raise BuildError(explain([tried, f"cache {folder}: {error}"], "the cache cannot be used", fix)) from error
    try:
        return _import(path, origin)
    except ImportError as error:
        fix = f"remove {path.parent} and try again"
        raise BuildError(explain([tried, f"{path}: {error}"], "the file in the cache is damaged", fix)) from error


def _prebuilt() -> tuple[Path | None, str]:
    """Return the path of ``mfac._C`` if there is one that fits, and what to say if not.

    The file is searched for its fingerprint, not imported, because importing registers ops, which cannot be undone.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = spec.PACKAGE / f"_C{suffix}"
        if path.exists():
            if f"{spec.fingerprint()}\0".encode() in path.read_bytes():
                return path, ""
            return None, f"prebuilt {path}: made from other sources or for another torch than {spec.fingerprint()}"
    return None, "prebuilt mfac._C: none in this installation"


def _import(path: Path, origin: str) -> ModuleType:
    """Return the compiled module at `path`, imported, and note where it came from."""
    import torch  # noqa: F401  the module needs torch's libraries in the process

    found = importlib.util.spec_from_file_location("mfac._C", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    _status.update(origin=origin, path=str(path))
    return module


def _build(tried: str) -> tuple[Path, str]:
    """Return the path of the module in the cache and its origin, after compiling it under the lock if it is absent."""
    build_dir = cache.cache_dir() / cache.cache_key()
    target = build_dir / "_C.so"
    if cache.fits(build_dir):
        return target, "cache"
    cache.make_private(build_dir)
    cache.check_trusted(build_dir.parent, build_dir)
    with cache.locked(build_dir):
        if cache.fits(build_dir):  # another process has built it while this one waited
            return target, "cache"
        for leftover in build_dir.glob("build-*"):  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=build_dir, ignore_cleanup_errors=True) as folder:
            compile_kernels(Path(folder), build_dir / "build.log", tried)
            cache.store(build_dir, Path(folder) / "_C.so")
    return target, "built"
