"""What a build needs: compiler, ninja, pybind11, CUDA toolkit, GPUs."""

import sys
from pathlib import Path

import pytest
import torch

from mfac import _build
from mfac._build import loader, toolchain
from mfac._build.errors import CompileError


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A function that makes a CUDA toolkit of that version, for torch of CUDA 13.0 on a machine with three GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("MFAC_CUDA_ARCH", raising=False)
    monkeypatch.setattr(toolchain, "gpus_here", lambda: ("80", "90a", "999a"))
    monkeypatch.setattr(toolchain, "cuda_home", lambda: None)

    def make(version):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\ncase $1 in --version) echo release {version}, V1;; *) echo sm_80 sm_90;; esac\n")
        nvcc.chmod(0o755)
        monkeypatch.setattr(toolchain, "cuda_home", lambda: tmp_path)

    return make


def test_cuda_plan(toolkit, monkeypatch):
    """For the GPUs that are here and that nvcc knows, or those asked for."""
    assert not _build.cuda_plan().gpus and "nvcc and its headers were not found" in _build.cuda_plan().reason
    toolkit("13.0")
    assert _build.cuda_plan() == (["80", "90a"], "for 80;90a, the GPUs of this machine")
    monkeypatch.setenv("MFAC_CUDA_ARCH", "100;90a")
    assert _build.cuda_plan().gpus == ["100", "90a"]
    spec = _build.extension_spec()
    assert {"bindings.cpp", "select_smallest.cu"} <= {Path(p).name for p in spec["sources"] if "/cuda/" in p}
    assert "-gencode=arch=compute_90a,code=sm_90a" in spec["cuda_cflags"] and '-DMFAC_CUDA="100;90a"' in spec["cflags"]
    monkeypatch.setenv("MFAC_CUDA_ARCH", "none")
    assert not _build.cuda_plan().gpus
    monkeypatch.delenv("MFAC_CUDA_ARCH")
    for gpus, reason in (((), "there is no GPU here"), (("70",), "does not know the GPUs of this machine, 70")):
        monkeypatch.setattr(toolchain, "gpus_here", lambda gpus=gpus: gpus)
        assert not _build.cuda_plan().gpus and reason in _build.cuda_plan().reason


def test_the_key_of_a_cuda_build_does_not_depend_on_nvcc(toolkit, monkeypatch):
    """It depends on the GPUs that kernels are wanted for; the tools of the build are noted when nvcc is here."""
    without = _build.cache_key()
    assert toolchain.build_tools()["cuda"] is None
    toolkit("13.0")
    assert _build.cache_key() == without
    assert toolchain.build_tools()["cuda"] == [["80", "90a"], "release 13.0, V1\n"]
    monkeypatch.setenv("MFAC_CUDA_ARCH", "100")
    assert _build.cache_key() != without


def test_nvcc_of_another_cuda(toolkit):
    toolkit("12.4")
    plan, reason = _build.cuda_plan()
    assert not plan and "torch has CUDA 13.0" in reason and "is 12; set CUDA_HOME" in reason


def test_a_toolkit_needs_headers(tmp_path, monkeypatch):
    """A script named nvcc on the PATH makes torch take the folder above it for the toolkit."""
    from torch.utils import cpp_extension

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    assert _build.cuda_home() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    assert _build.cuda_home() == tmp_path.resolve()


def test_cuda_that_does_not_compile(toolkit, monkeypatch):
    """Then there are the kernels for the CPU, a warning, and the reason for whoever asks."""
    toolkit("13.0")

    def build(extension, tried):
        if _build.cuda_plan().gpus:
            raise CompileError("nvcc said no")
        return Path("_C.so"), "built"

    monkeypatch.setattr(toolchain, "failed_cuda_log", None)
    monkeypatch.setattr(loader, "_prebuilt", lambda extension: (None, "none"))
    monkeypatch.setattr(loader, "_build", build)
    monkeypatch.setattr(loader, "_import", lambda extension, path, origin: path)
    with pytest.warns(RuntimeWarning, match=r"(?s)no CUDA kernels, only those for the CPU.*nvcc said no"):
        assert loader._load("_C") == Path("_C.so")
    assert "they failed to compile, see" in _build.cuda_plan().reason


@pytest.mark.parametrize("env", [{"CXX": "/nonexistent/g++"}, {"CXX": "", "PATH": "/nonexistent"}])
def test_missing_compiler(bench, env):
    for name, value in env.items():
        bench.monkeypatch.setenv(name, value)
    assert toolchain.build_tools() is None
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler(.|\n)*apt install g\+\+"):
        _build.load()


def test_compiler_that_is_no_command(bench):
    bench.monkeypatch.setenv("CXX", "'g++")
    assert toolchain.build_tools() is None
    with pytest.raises(_build.BuildError, match=r"CXX: expected a command, got \"'g\+\+\" \(No closing quotation\)"):
        _build.load()


def test_missing_ninja(bench):
    bench.monkeypatch.setitem(sys.modules, "ninja", None)
    bench.monkeypatch.setenv("PATH", "/nonexistent")
    bench.set_compiler("")
    with pytest.raises(_build.BuildError, match=r"ninja is not installed(.|\n)*pip install ninja"):
        _build.load()


def test_missing_pybind11(bench):
    bench.monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(_build.BuildError, match=r"pybind11 is not installed(.|\n)*pip install pybind11"):
        _build.load()
