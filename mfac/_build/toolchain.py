"""What a build needs and what it is made for: compiler, ninja, pybind11, CUDA toolkit, processor and GPUs."""

import contextlib
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BuildError, explain

# The log of a build with CUDA kernels that failed; this process then does without them.
failed_cuda_log: "Path | None" = None


class Compiler(NamedTuple):
    """The C++ compiler: the command that runs it, and the first line of its ``--version``."""

    command: str
    version: str


class Pybind11(NamedTuple):
    """The version of pybind11 and the folder of its headers."""

    version: str
    include: str


class CudaPlan(NamedTuple):
    """The GPU architectures of the CUDA kernels, as nvcc names them, and why these or why none."""

    gpus: list[str]
    reason: str


@functools.cache
def _ask(*command: str) -> str:
    """Return what a program prints; each command runs once per process, as `cuda_plan` is called several times."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def find_compiler() -> Compiler:
    """Return the C++ compiler: $CXX, else c++ or g++ on the PATH.

    Raises:
        BuildError: There is none, it does not run, or $CXX is not a command.
    """
    own = os.environ.get("CXX", "")
    try:
        command = shlex.split(own) or ["c++" if shutil.which("c++") else "g++"]
    except ValueError as error:
        fix = "set CXX to a C++ compiler, or unset it"
        raise BuildError(explain([f"CXX: expected a command, got {own!r} ({error})"], "CXX is wrong", fix)) from error
    command[0] = shutil.which(command[0]) or command[0]
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        fix = "install g++ (Debian, Ubuntu: apt install g++; conda: conda install gxx), or set CXX to a C++ compiler"
        tried = f"C++ compiler {shlex.join(command)} (CXX={own}): {error}"
        raise BuildError(explain([tried], "no C++ compiler (g++) was found", fix)) from error
    return Compiler(shlex.join(command), done.stdout.partition("\n")[0])


def shared_cxx_library() -> str | None:
    """Return the path of libstdc++.so to name to the linker, or None if the compiler finds a shared one by itself.

    A compiler that has only the static library would put a second copy of it into the extension, beside the one that
    torch uses; with two copies, throwing an error crashes. The shared one that torch has loaded is linked instead.
    """
    maps = Path("/proc/self/maps")
    found = _ask(*shlex.split(find_compiler().command), "-print-file-name=libstdc++.so").strip()
    if Path(found).is_absolute() or not maps.exists():
        return None
    import torch  # noqa: F401  # loads it

    loaded = re.search(r"\s(/\S*/libstdc\+\+\.so\S*)$", maps.read_text(), re.MULTILINE)
    return loaded[1] if loaded else None


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
        raise BuildError(explain([f"ninja: not in {folders}"], "ninja is not installed", "pip install ninja"))
    return found


def find_pybind11() -> Pybind11:
    """Return the pybind11 that is installed.

    Raises:
        BuildError: It is not installed.
    """
    try:
        import pybind11
    except ImportError as error:
        raise BuildError(
            explain([f"pybind11: {error}"], "pybind11 is not installed", "pip install pybind11")
        ) from error
    return Pybind11(pybind11.__version__, pybind11.get_include())


def build_tools() -> dict[str, Any] | None:
    """Return what a build would be made with now, or None if one is not possible here.

    Returns:
        compiler (command and version), pybind11 (version) and cuda (GPU architectures and nvcc's version, or None if
        CUDA kernels cannot be built), as JSON values.
    """
    try:
        compiler, pybind11 = find_compiler(), find_pybind11().version
        find_ninja()
    except BuildError:
        return None
    gpus = cuda_plan().gpus
    cuda = [gpus, _ask(str(cuda_home() / "bin" / "nvcc"), "--version")] if gpus else None
    return {"compiler": list(compiler), "pybind11": pybind11, "cuda": cuda}


def cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit: that of torch, /usr/local/cuda or the one that nvcc on the PATH belongs to.

    A folder without headers does not count: nvcc on the PATH may be a script, and torch takes the folder above it.
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

    nvidia-smi is asked first, because torch would initialize CUDA in this process, which work on the CPU does not need.
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


def gpus_wanted() -> CudaPlan:
    """Return the GPU architectures that CUDA kernels are wanted for, whether or not nvcc is here, and why these or none.

    They are $MFAC_CUDA_ARCH, as in ``"80;90a"``, or ``"none"``; by default those of the GPUs in this machine.
    """
    import torch

    if torch.version.cuda is None:
        return CudaPlan([], "none: this torch is built without CUDA")
    own = os.environ.get("MFAC_CUDA_ARCH")
    if own == "none":
        return CudaPlan([], "none: MFAC_CUDA_ARCH=none")
    if failed_cuda_log:
        return CudaPlan([], f"none: they failed to compile, see {failed_cuda_log}")
    if own:
        return CudaPlan(own.split(";"), f"for {own} (MFAC_CUDA_ARCH)")
    if not gpus_here():
        return CudaPlan([], "none: there is no GPU here; MFAC_CUDA_ARCH=90a, say, builds for one elsewhere")
    return CudaPlan(list(gpus_here()), f"for {';'.join(gpus_here())}, the GPUs of this machine")


def cuda_plan() -> CudaPlan:
    """Return the GPU architectures that CUDA kernels are built for here, and why these or why none.

    They are those of `gpus_wanted` that the installed nvcc knows ($MFAC_CUDA_ARCH is passed on as it is).
    """
    import torch

    wanted = gpus_wanted()
    if not wanted.gpus:
        return wanted
    home = cuda_home()
    if home is None:
        return CudaPlan(
            [], f"none: torch has CUDA {torch.version.cuda}, but nvcc and its headers were not found; set CUDA_HOME"
        )
    nvcc = home / "bin" / "nvcc"
    version = re.search(r"release (\d+)", _ask(str(nvcc), "--version"))
    if version is None or version[1] != torch.version.cuda.partition(".")[0]:
        found = version[1] if version else "another program"
        return CudaPlan(
            [], f"none: torch has CUDA {torch.version.cuda}, but {nvcc} is {found}; set CUDA_HOME to a matching one"
        )
    if os.environ.get("MFAC_CUDA_ARCH"):
        return wanted
    known = _ask(str(nvcc), "--list-gpu-code").split()
    served = [gpu for gpu in wanted.gpus if f"sm_{gpu.rstrip('a')}" in known]
    if not served:
        return CudaPlan([], f"none: {nvcc} does not know the GPUs of this machine, {';'.join(wanted.gpus)}")
    return CudaPlan(served, f"for {';'.join(served)}, the GPUs of this machine")


def cpu() -> tuple[str, str]:
    """Return the processor's model and its instruction sets, as the kernel reports them."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return model[1] if model else platform.machine(), flags[1] if flags else ""
