"""Find, build and load the compiled kernels.

One function, `extension_spec`, gives sources and flags to both builds: the just-in-time build of `load`, which is the
usual one, and the ahead-of-time build of setup.py (``MFAC_AOT=1``). This file imports nothing of mfac: setup.py loads
it by its path, and it is also the program that compiles, in a process of its own (`_compile_here`): hence one file,
somewhat long.

The cache holds a folder per key with ``_C.so``, ``build.log`` and ``lock``. Every attempt compiles in a fresh
sub-folder and moves the finished file up in one step, so ``_C.so`` exists only whole, and what a killed build leaves
behind is never used and is swept by the next one. The lock is the operating system's: it goes when its holder goes.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = Path(__file__).resolve().parent
_LOGGER = logging.getLogger("mfac")
_FIRST_NOTICE = 5.0  # seconds of waiting for another process's build before saying so
_NEXT_NOTICE = 60.0  # seconds between notices after that
_EXCERPT = 25  # lines of compiler output in an error

_CAUSES = [  # pattern in the compiler's output, likely cause, fix
    (r"Python\.h: No such", "Python's headers are missing", "install them (Debian, Ubuntu: apt install python3-dev)"),
    (r"No space left on device", "the disk is full", "make room, or set MFAC_CACHE_DIR to another disk"),
    (r"Killed|annot allocate memory|memory exhausted", "memory ran out", "set MAX_JOBS=1: one file at a time"),
    (r"unrecognized command.line option|C\+\+\d\d or later", "the compiler is too old", "install GCC 11 or newer"),
    (r"unsupported GNU version", "this nvcc does not work with this g++", "set CXX to an older g++"),
    (r"Unsupported gpu architecture", "nvcc does not know $MFAC_CUDA_ARCH", "change or unset MFAC_CUDA_ARCH"),
    (r"bad value .*-march|unknown target CPU", "the compiler does not know $MFAC_ARCH", "change or unset MFAC_ARCH"),
]

_once = threading.Lock()
_outcome: "ModuleType | BuildError | None" = None
_no_cuda: "Path | None" = None  # the log of a build that failed with the CUDA kernels and is done without
_status: dict[str, Any] = {"origin": None, "path": None, "seconds": None, "error": None}


class BuildError(RuntimeError):
    """The compiled kernels cannot be had here; the text says what was tried, the likely cause and the fix."""


def _text(tried: list[str], cause: str, fix: str, output: str = "") -> str:
    """Return the text of a `BuildError`."""
    lines = ["the compiled kernels of mfac cannot be built or loaded", "  tried:"]
    lines += [f"    {line}" for line in tried] + [f"  likely cause: {cause}", f"  fix: {fix}"]
    return "\n".join(lines) + output


def sources_root() -> Path:
    """Return the folder of the C++ sources: ``csrc`` in the installed package, or beside it in a source checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def fingerprint() -> str:
    """Return a name for what a build is made from: a digest of sources and headers, and the version of torch."""
    import torch

    root, digest = sources_root(), hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".cuh"}):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"mfac-{digest.hexdigest()[:16]}/torch-{torch.__version__}"


@functools.cache
def _ask(*command: str) -> str:
    """Return what a program prints, asked once in a process: `cuda_plan` is needed several times for a load."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit: that of torch, /usr/local/cuda or what the nvcc of the PATH is in.

    One without headers does not count: nvcc on the PATH may be a script, and torch takes the folder above it.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    candidates = [CUDA_HOME, "/usr/local/cuda"]
    if found := shutil.which("nvcc"):
        if top := re.search(r"^#\$ TOP=(.*)$", _ask(found, "--dryrun", "-c", "x.cu"), re.MULTILINE):
            candidates.append(top[1].strip())
    for folder in (Path(c).resolve() for c in candidates if c):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime_api.h").exists():
            return folder
    return None


@functools.cache
def gpus_here() -> tuple[str, ...]:
    """Return the architectures of the GPUs in this machine, as nvcc names them.

    The driver's program is asked, since torch would start CUDA in this process, which work on the CPU does not need.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True).stdout
        versions = re.findall(r"^(\d+)\.(\d+)$", answer, re.MULTILINE)
    except OSError:
        import torch

        try:
            versions = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        except RuntimeError:  # in a process forked from one that uses CUDA
            versions = []
    found = {(int(major), int(minor)) for major, minor in versions}
    return tuple(f"{major}{minor}" + "a" * (major >= 9) for major, minor in sorted(found))


def cuda_plan() -> tuple[list[str], str]:
    """Return the GPU architectures that CUDA kernels are built for here, and why these or why none.

    They are those of the GPUs in this machine, or $MFAC_CUDA_ARCH, as in ``"80;90a"``, a build for others, or
    ``"none"``.
    """
    import torch

    if torch.version.cuda is None:
        return [], "none: this torch is built without CUDA"
    if (own := os.environ.get("MFAC_CUDA_ARCH")) == "none":
        return [], "none: MFAC_CUDA_ARCH=none"
    if _no_cuda:
        return [], f"none: they failed to compile, see {_no_cuda}"
    home = cuda_home()
    if home is None:
        return [], f"none: torch has CUDA {torch.version.cuda}, but nvcc and its headers were not found; set CUDA_HOME"
    nvcc = home / "bin" / "nvcc"
    version = re.search(r"release (\d+)", _ask(str(nvcc), "--version"))
    if version is None or version[1] != torch.version.cuda.partition(".")[0]:
        found = version[1] if version else "another program"
        return [], f"none: torch has CUDA {torch.version.cuda}, but {nvcc} is {found}; set CUDA_HOME to a matching one"
    if own:
        return own.split(";"), f"for {own} (MFAC_CUDA_ARCH)"
    if not gpus_here():
        return [], "none: there is no GPU here; MFAC_CUDA_ARCH=90a, say, builds for one elsewhere"
    known = _ask(str(nvcc), "--list-gpu-code").split()
    served = [gpu for gpu in gpus_here() if f"sm_{gpu.rstrip('a')}" in known]
    if not served:
        return [], f"none: {nvcc} does not know the GPUs of this machine, {';'.join(gpus_here())}"
    return served, f"for {';'.join(served)}, the GPUs of this machine"


def architecture(ahead_of_time: bool = False) -> str:
    """Return the value for ``-march``: $MFAC_ARCH, else "native" just in time and "" (portable) ahead of time."""
    return os.environ.get("MFAC_ARCH") or ("" if ahead_of_time else "native")


def extension_spec(ahead_of_time: bool = False) -> dict[str, list[str]]:
    """Return sources and flags of the extension, the same for both kinds of build.

    The C++ standard is absent on purpose: torch adds the one that its headers need. OpenMP is compiled in but, with
    GCC, not linked: the symbols come from the runtime that torch brings, so that both share one pool of threads.

    Args:
        ahead_of_time: True for setup.py; the default ``-march`` is then the portable one.

    Returns:
        sources (absolute paths), include_dirs, cflags (not quoted for a shell), cuda_cflags (for nvcc) and ldflags.

    Raises:
        BuildError: There is no compiler, or pybind11 is not installed.
    """
    import torch

    try:
        import pybind11
    except ImportError as error:
        raise BuildError(_text([f"pybind11: {error}"], "pybind11 is not installed", "pip install pybind11")) from error

    root, arch, gpus = sources_root(), architecture(ahead_of_time), cuda_plan()[0]
    flags = ["-O3", "-ffp-contract=fast", "-fopenmp", "-Wall", "-Wextra", "-g0"] + ([f"-march={arch}"] if arch else [])
    macros = {
        "MFAC_FLAGS": json.dumps(" ".join(flags)),
        "MFAC_AHEAD_OF_TIME": int(ahead_of_time),
        "MFAC_FINGERPRINT": json.dumps(fingerprint()),
        "MFAC_TORCH_VERSION": json.dumps(torch.__version__),
        "MFAC_CUDA": json.dumps(";".join(gpus)),
    }
    sources = [*root.glob("*.cpp"), *(root / "cpu").glob("*.cpp")]
    if gpus:
        sources += [*(root / "cuda").glob("*.cpp"), *(root / "cuda").glob("*.cu")]
    return {
        "sources": [str(p) for p in sorted(sources)],
        "include_dirs": [str(root), *[str(root / "cuda")] * bool(gpus), pybind11.get_include()],
        "cflags": flags + [f"-D{name}={value}" for name, value in macros.items()],
        "cuda_cflags": ["-O3", *(f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus)],
        "ldflags": ["-fopenmp"] if "clang" in find_compiler()[1] else [],
    }


def find_compiler() -> tuple[str, str]:
    """Return the C++ compiler's command ($CXX, else c++ or g++ of the PATH) and the first line of its ``--version``.

    Raises:
        BuildError: There is none, or it does not run.
    """
    command = shlex.split(os.environ.get("CXX", "")) or ["c++" if shutil.which("c++") else "g++"]
    command[0] = shutil.which(command[0]) or command[0]
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        fix = "install g++ (Debian, Ubuntu: apt install g++; conda: conda install gxx), or set CXX to a C++ compiler"
        tried = f"C++ compiler {shlex.join(command)} (CXX={os.environ.get('CXX', '')}): {error}"
        raise BuildError(_text([tried], "no C++ compiler (g++) was found", fix)) from error
    return shlex.join(command), done.stdout.partition("\n")[0]


def find_ninja() -> str:
    """Return the path of ninja: the one of pip's package, else the one on the PATH.

    A virtual environment's Python that is run without activation has pip's ninja, but not on its PATH.

    Raises:
        BuildError: There is none.
    """
    folders = os.environ.get("PATH", os.defpath)
    with contextlib.suppress(ImportError):
        import ninja

        folders = os.pathsep.join([ninja.BIN_DIR, folders])
    found = shutil.which("ninja", path=folders)
    if found is None:
        raise BuildError(_text([f"ninja: not in {folders}"], "ninja is not installed", "pip install ninja"))
    return found


def cpu() -> tuple[str, str]:
    """Return the processor's model and its instruction sets, in the kernel's words."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return model[1] if model else platform.machine(), flags[1] if flags else ""


def cache_dir() -> Path:
    """Return the folder of all builds: $MFAC_CACHE_DIR, else $XDG_CACHE_HOME/mfac, else ~/.cache/mfac."""
    if own := os.environ.get("MFAC_CACHE_DIR"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mfac"


def cache_key() -> str:
    """Return the name of this build's folder: a digest of all that the compiled file depends on.

    Raises:
        BuildError: There is no compiler, or pybind11 is not installed.
    """
    spec = extension_spec()
    import pybind11
    import torch

    parts = {
        "flags": [spec["cflags"], spec["cuda_cflags"], spec["ldflags"]],  # with the fingerprint of sources and torch
        "torch": [torch.version.git_version, torch.compiled_with_cxx11_abi()],
        "python": sysconfig.get_config_var("SOABI"),
        "pybind11": pybind11.__version__,
        "compiler": find_compiler(),
        "platform": [sysconfig.get_platform(), platform.libc_ver()],
        "cpu": cpu() if architecture() == "native" else "",
        "cuda": cuda_plan(),
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


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
        raise BuildError(_text([tried], cause, "set MFAC_BACKEND=reference"))
    try:
        try:
            path, origin = _build(tried)
        except BuildError as error:
            global _no_cuda
            if not cuda_plan()[0]:
                raise
            _no_cuda = cache_dir() / cache_key() / "build.log"
            warnings.warn(
                f"mfac: there will be no CUDA kernels, only those for the CPU.\n{error}", RuntimeWarning, stacklevel=5
            )
            path, origin = _build(tried)
    except OSError as error:
        fix = "set MFAC_CACHE_DIR to a folder that you may write to, on a local disk"
        raise BuildError(_text([tried, f"cache {cache_dir()}: {error}"], "the cache cannot be used", fix)) from error
    try:
        return _import(path, origin)
    except ImportError as error:
        fix = f"remove {path.parent} and try again"
        raise BuildError(_text([tried, f"{path}: {error}"], "the file in the cache is damaged", fix)) from error


def _prebuilt() -> tuple[Path | None, str]:
    """Return the path of ``mfac._C`` if there is one that fits, and what to say if not.

    The file is searched for its fingerprint, not imported, because importing registers ops, which cannot be undone.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = PACKAGE / f"_C{suffix}"
        if path.exists():
            if f"{fingerprint()}\0".encode() in path.read_bytes():
                return path, ""
            return None, f"prebuilt {path}: made from other sources or for another torch than {fingerprint()}"
    return None, "prebuilt mfac._C: none in this installation"


def _import(path: Path, origin: str) -> ModuleType:
    """Return the compiled module at `path`, imported, and note where it came from."""
    import torch  # noqa: F401  the module needs torch's libraries in the process

    spec = importlib.util.spec_from_file_location("mfac._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _status.update(origin=origin, path=str(path))
    return module


def _build(tried: str) -> tuple[Path, str]:
    """Return the path of the module in the cache and its origin, after compiling it under the lock if it is absent."""
    home = cache_dir() / cache_key()
    target = home / "_C.so"
    if target.exists():
        return target, "cache"
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / "lock"):
        if target.exists():  # another process has built it while this one waited
            return target, "cache"
        for leftover in home.glob("build-*"):  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=home, ignore_cleanup_errors=True) as folder:
            _compile(Path(folder), home / "build.log", tried)
            os.replace(Path(folder) / "_C.so", target)
    return target, "built"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a build; say so, and for whom, where that means a long wait."""
    import fcntl  # not on Windows

    with path.open("a+") as file:
        notice = time.monotonic() + _FIRST_NOTICE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > notice:
                    holder, age = path.read_text().strip() or "unknown", time.time() - path.stat().st_mtime
                    _LOGGER.warning("mfac: waiting for process %s to compile the kernels, %.0f s so far (lock: %s)",
                                    holder, age, path)  # fmt: skip
                    notice = time.monotonic() + _NEXT_NOTICE
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _compile(folder: Path, log: Path, tried: str) -> None:
    """Compile into `folder` in a child process, which keeps this one's environment and output clean.

    Raises:
        BuildError: The compiler failed; the text has the part of its output that matters.
    """
    spec, ninja, compiler = extension_spec(), find_ninja(), find_compiler()[0]
    env = {**os.environ, "CXX": compiler}
    env["PATH"] = os.pathsep.join([str(Path(ninja).parent), os.environ.get("PATH", os.defpath)])
    if cuda_plan()[0]:
        env["CUDA_HOME"] = str(cuda_home())
    env.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))  # ninja would start two more
    notice = "mfac: compiling kernels (once; half a minute on two free cores, more with those for CUDA) ..."
    if _LOGGER.isEnabledFor(logging.INFO):
        _LOGGER.info(notice)
    elif sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"{notice}\n")
    job = json.dumps({"sys_path": sys.path, "folder": str(folder), **spec})
    with log.open("w") as out:
        command = [sys.executable, __file__]
        done = subprocess.run(command, input=job, text=True, stdout=out, stderr=subprocess.STDOUT, env=env)
    if done.returncode == 0 and (folder / "_C.so").exists():
        return
    output = log.read_text(errors="replace")
    cause, fix = next(
        ((cause, fix) for pattern, cause, fix in _CAUSES if re.search(pattern, output)),
        ("in the compiler's output below", "set CXX to another compiler, or report this with the output"),
    )
    rows = output.splitlines()
    first = next((max(0, i - 3) for i, row in enumerate(rows) if "error:" in row), max(0, len(rows) - _EXCERPT))
    excerpt = "".join(f"\n    {row[:400]}" for row in rows[first : first + _EXCERPT])
    tried_too = f"just-in-time build with {compiler}: exit status {done.returncode}"
    raise BuildError(_text([tried, tried_too], cause, fix, f"\n  compiler output, from {log}:{excerpt}"))


def _compile_here() -> int:
    """Return 0 after compiling what standard input describes: the child's part of `_compile`."""
    job = json.load(sys.stdin)
    sys.path[:] = job["sys_path"]
    from torch.utils import cpp_extension

    try:
        cpp_extension.load(
            "_C",
            job["sources"],
            extra_cflags=[shlex.quote(flag) for flag in job["cflags"]],
            extra_cuda_cflags=job["cuda_cflags"],
            extra_ldflags=job["ldflags"],
            extra_include_paths=job["include_dirs"],
            build_directory=job["folder"],
            verbose=True,
        )
    except (RuntimeError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_compile_here())
