"""The cache of builds: its folder, the key of a build, the lock, and what is safe to load.

The cache holds a folder per key with the library (``_C.so`` or ``_sparse.so``), ``manifest.json`` (the tools that made it, and its digest), ``build.log``,
``lock`` and, during a build, ``holder`` (its process). Every attempt compiles in a fresh sub-folder and moves the finished file up in
one step, so the library exists only whole, and what a killed build leaves behind is never used and is removed by the next
one. The lock is the operating system's: it is released when its holder ends, however it ends.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import stat
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from . import spec, toolchain
from .errors import BuildError, explain

_LOGGER = logging.getLogger("mfac")
_FIRST_NOTICE = 5.0  # seconds of waiting for another process's build before saying so
_NEXT_NOTICE = 60.0  # seconds between notices after that


def cache_dir() -> Path:
    """Return the folder of all builds.

    It is $MFAC_CACHE_DIR, else the user's cache folder (on Linux $XDG_CACHE_HOME/mfac or ~/.cache/mfac). Without a home
    folder, or with one that cannot be written to, as for a user id that the system does not know, it is
    mfac-<user id> in the folder of temporary files.
    """
    if own := os.environ.get("MFAC_CACHE_DIR"):
        return Path(own).absolute()
    fallback = Path(tempfile.gettempdir()).absolute() / f"mfac-{os.getuid()}"
    try:
        path = platformdirs.user_cache_path("mfac")
    except RuntimeError:  # no home folder; older releases of platformdirs return a path with "~" instead
        return fallback
    if not path.is_absolute():
        return fallback
    return path if os.path.exists(path) or os.access(_missing(path)[-1].parent, os.W_OK | os.X_OK) else fallback


def cache_key(extension: str = "_C") -> str:
    """Return the name of a build's folder: a digest of all that must match when the compiled file is loaded.

    The tools of the build are not part of it, so that a machine without them finds the file; see `fits`.
    """
    import torch

    parts = {
        "fingerprint": spec.fingerprint(extension),
        "flags": spec.compile_flags(toolchain.gpus_wanted().gpus if extension == "_C" else []),
        "torch": [torch.version.git_version, torch.compiled_with_cxx11_abi(), torch.version.cuda],
        "python": sysconfig.get_config_var("SOABI"),
        "platform": [sysconfig.get_platform(), platform.libc_ver()],
        "cpu": toolchain.cpu() if spec.architecture() == "native" else "",
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents, accessible to the user only."""
    for missing in reversed(_missing(folder)):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)  # raises if something else has the name


def _missing(folder: Path) -> list[Path]:
    """Return those of a folder and its parents that do not exist, from the folder upwards."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def check_trusted(*paths: Path) -> None:
    """Check that nobody but the user and root can have written these files and folders; absent ones are skipped.

    Raises:
        BuildError: One of them, or the link that leads to it, belongs to another user, or others may write to it.
    """
    for path in paths:
        fault = fix = ""
        with contextlib.suppress(FileNotFoundError):
            target = path.stat()
            owners = {target.st_uid, path.lstat().st_uid} - {os.getuid(), 0}
            if owners:
                fault = f"it belongs to user {owners.pop()}, not to user {os.getuid()} or root"
                fix = "set MFAC_CACHE_DIR to a folder of your own"
            elif target.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                fault = f"others may write to it (mode {stat.S_IMODE(target.st_mode):04o})"
                fix = f"chmod go-w {path}, if you trust what is in it; or set MFAC_CACHE_DIR to a folder of your own"
        if fault:
            raise BuildError(explain([f"cache {path}: not loaded, {fault}"], "the cache is not safe to load from", fix))


def fits(build_dir: Path, extension: str = "_C") -> bool:
    """Return whether a build's folder holds a library that can be loaded as it is.

    The tools that made it must be those found here, as far as a build is possible: without a compiler, ninja or
    pybind11, or in a folder that is read-only, a library made by any tools is used, and without nvcc any CUDA part. Its
    digest must be the one noted when it was built: the loader of the system maps a truncated library into memory, and the
    process then dies of a signal.

    Raises:
        BuildError: There is one that is not safe to load, or one that is damaged and cannot be built again.
    """
    library = build_dir / f"{extension}.so"
    if not library.exists():
        return False
    check_trusted(build_dir.parent, build_dir, library)
    tools = toolchain.build_tools() if os.access(build_dir, os.W_OK) else None
    wanted = {**(tools or {}), "library": _digest(library)}
    manifest = _read_manifest(build_dir)
    if all(manifest.get(name) == value for name, value in wanted.items() if value is not None):
        return True
    if tools is not None:
        return False
    tried = f"cache {library}: its {library.stat().st_size} bytes are not those noted in manifest.json"
    fix = f"remove {build_dir} and try again"
    raise BuildError(explain([tried], "the file in the cache is damaged", fix))


def _read_manifest(build_dir: Path) -> dict[str, Any]:
    """Return what was noted about a library; empty if that is missing or damaged, as after an interrupted build."""
    try:
        manifest = json.loads((build_dir / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _digest(library: Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(library.read_bytes()).hexdigest()


def store(build_dir: Path, built: Path) -> None:
    """Move a finished library into its folder, and note the tools that made it and its digest."""
    manifest = built.with_name("manifest.json")
    manifest.write_text(json.dumps({**(toolchain.build_tools() or {}), "library": _digest(built)}, indent=1))
    built.chmod(0o755)  # whatever the umask: see `check_trusted`
    built.replace(build_dir / built.name)
    manifest.replace(build_dir / "manifest.json")  # last: a library without its manifest is only built again


@contextlib.contextmanager
def locked(build_dir: Path) -> Iterator[None]:
    """Hold the lock of a build's folder; while waiting for it, say who holds it and for how long."""
    lock, holder = filelock.FileLock(build_dir / "lock"), build_dir / "holder"
    patience = _FIRST_NOTICE
    while True:
        try:
            lock.acquire(timeout=patience, poll_interval=0.1)
            break
        except filelock.Timeout:
            pid, age = "unknown", 0.0
            with contextlib.suppress(OSError):  # the holder has just finished, or has not written it yet
                pid, age = holder.read_text().strip(), time.time() - holder.stat().st_mtime
            _LOGGER.warning("mfac: waiting for process %s to compile the kernels, %.0f s so far (lock: %s)",
                            pid, age, build_dir / "lock")  # fmt: skip
            patience = _NEXT_NOTICE
    try:
        holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
