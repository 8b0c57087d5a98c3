"""The CUDA kernels: what nvcc makes of them, and what they do when a CPU runs them, under sanitizers.

That every op gives the right numbers is the business of the op's own tests, which MFAC_EMULATE_CUDA=1 runs with these
kernels (`make cuda-check` does both).
"""

import os
import re
import shutil
import subprocess

import emulation
import pytest

NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
NEEDS_NVCC = pytest.mark.skipif(NVCC is None, reason="no nvcc")
TARGETS = ["80", "90a", "100"]
OLDEST = "75"  # without tensor cores for float64, where it may spill
FAULTS = {  # what standalone.cpp does wrong if asked: who finds it, and what is said
    "race": ("thread", "data race"),
    "race between blocks": ("thread", "data race"),
    "overflow": ("address,undefined", "out of bounds|heap-buffer-overflow"),
    "barrier": ("address,undefined", r"__syncthreads\(\) was not reached by all threads"),
}


@NEEDS_NVCC
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", emulation.KERNELS, ids=lambda path: path.stem)
def test_compiles_without_spills(source, target):
    """No warning, no register spilled, no array in local memory."""
    flags = ["-std=c++17", "-O3", f"-I{emulation.CUDA}", f"-gencode=arch=compute_{target},code=sm_{target}"]
    flags += ["-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
    done = subprocess.run([NVCC, *flags, "-c", source, "-o", os.devnull], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert frames and all(frame == ("0", "0", "0") for frame in frames), done.stderr[-4000:]


@NEEDS_NVCC
@pytest.mark.parametrize("source", emulation.KERNELS, ids=lambda path: path.stem)
def test_compiles_for_the_oldest(source):
    flags = ["-std=c++17", "-O1", f"-I{emulation.CUDA}", f"-gencode=arch=compute_{OLDEST},code=sm_{OLDEST}"]
    done = subprocess.run([NVCC, *flags, "-c", source, "-o", os.devnull], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "kernels"
    command = ["g++", *emulation.FLAGS, "-O1", "-g", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    done = subprocess.run([*command, emulation.HERE / "standalone.cpp", "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, path


def test_kernels_under_sanitizers(program):
    done = subprocess.run([program[1]], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "0 failures\n", done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(program, fault):
    """Otherwise the test above proves nothing."""
    sanitizer, message = FAULTS[fault]
    if program[0] == sanitizer:
        done = subprocess.run([program[1], fault], capture_output=True, text=True)
        assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-2000:]
