"""The just-in-time build: a child process compiles, and a failure becomes one readable error."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from . import spec, toolchain
from .errors import CompileError, explain

_LOGGER = logging.getLogger("mfac")
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


def compile_kernels(extension: str, folder: Path, log: Path, tried: str) -> None:
    """Compile the library of an extension into `folder` in a child process, which keeps this one's environment and output clean.

    Args:
        extension: One of `spec.EXTENSIONS`.
        folder: An empty folder.
        log: The file that the compiler's output goes to.
        tried: What was tried before, for the error.

    Raises:
        BuildError: There is no compiler, ninja or pybind11.
        CompileError: The compiler failed; the text has the part of its output that matters.
    """
    job = json.dumps({"sys_path": sys.path, "folder": str(folder), "name": extension, **spec.extension_spec(extension)})
    ninja, compiler = toolchain.find_ninja(), toolchain.find_compiler().command
    env = {**os.environ, "CXX": compiler}
    env["PATH"] = os.pathsep.join([str(Path(ninja).parent), os.environ.get("PATH", os.defpath)])
    if spec.extension_gpus(extension):
        env["CUDA_HOME"] = str(toolchain.cuda_home())
    env.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))  # ninja would start two more
    what = "kernels" if extension == "_C" else "kernels for sparse inference"
    notice = f"mfac: compiling {what} (once; half a minute on two free cores, more with those for CUDA) ..."
    if _LOGGER.isEnabledFor(logging.INFO):
        _LOGGER.info(notice)
    elif sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"{notice}\n")
    with log.open("w") as out:
        command = [sys.executable, str(Path(__file__).with_name("jit_child.py"))]
        done = subprocess.run(command, input=job, text=True, stdout=out, stderr=subprocess.STDOUT, env=env)
    if done.returncode == 0 and (folder / f"{extension}.so").exists():
        return
    output = log.read_text(errors="replace")
    cause, fix = next(
        ((cause, fix) for pattern, cause, fix in _CAUSES if re.search(pattern, output)),
        ("in the compiler's output below", "set CXX to another compiler, or report this with the output"),
    )
    rows = output.splitlines()
    first = next((max(0, i - 3) for i, row in enumerate(rows) if "error:" in row), max(0, len(rows) - _EXCERPT))
    excerpt = "".join(f"\n    {row[:400]}" for row in rows[first : first + _EXCERPT])
    attempt = f"just-in-time build with {compiler}: exit status {done.returncode}"
    raise CompileError(explain([tried, attempt], cause, fix, f"\n  compiler output, from {log}:{excerpt}"))
