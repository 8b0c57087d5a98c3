"""The build and the loader. Most tests compile a stub, by a compiler that counts its calls and is slow on request."""

import importlib.machinery
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from mfac import _build
from mfac.cli import doctor

REPO = Path(__file__).resolve().parents[1]
STUB = """
#include <Python.h>
static PyObject* build_config(PyObject*, PyObject*) { return Py_BuildValue("{s:s}", "fingerprint", MFAC_FINGERPRINT); }
static PyMethodDef methods[] = {{"build_config", build_config, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
LOAD = """
import importlib.util, json, pathlib, sys
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.sources_root = lambda: pathlib.Path(sys.argv[2])
build._FIRST_NOTICE = 0.2
build.load()
print(json.dumps(build.status()))
"""


class Bench:
    """A stub of the sources, an empty cache, and a compiler that can be told what to do."""

    def __init__(self, folder, monkeypatch):
        self.sources, self.cache, self.calls = folder / "csrc", folder / "cache", folder / "calls"
        self.compiler, self.monkeypatch = folder / "c++", monkeypatch
        self.real = _build.find_compiler()[0]
        self.sources.mkdir()
        (self.sources / "stub.cpp").write_text(STUB)
        self.set_compiler("")
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.setenv("MFAC_CACHE_DIR", str(self.cache))
        monkeypatch.setattr(_build, "sources_root", lambda: self.sources)
        self.forget()

    def set_compiler(self, on_compile):
        """Let the compiler note each compilation and run a shell command before it."""
        lines = ["#!/bin/sh", 'case " $* " in *" -c "*)', f'echo call >> "{self.calls}"', on_compile, ";; esac"]
        new = self.compiler.with_name("new")
        new.write_text("\n".join([*lines, f'exec {self.real} "$@"']))
        new.chmod(0o755)
        new.rename(self.compiler)  # not written over: a script must not change under the shell that runs it

    def forget(self):
        """Make the loader of this process as new."""
        empty = dict.fromkeys(_build._status)
        self.monkeypatch.setattr(_build, "_outcome", None)
        self.monkeypatch.setattr(_build, "_status", empty)

    def start(self):
        """Start a process of its own group that loads."""
        command = [sys.executable, "-c", LOAD, _build.__file__, str(self.sources)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def compilations(self):
        return len(self.calls.read_text().split()) if self.calls.exists() else 0


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def files(folder):
    return {p for p in folder.rglob("*") if "__pycache__" not in p.parts}


def python(*args, **env):
    """Run this Python away from the repository's folder, with the package under test."""
    env = {**os.environ, "PYTHONPATH": str(_build.PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd="/")


def test_import_compiles_nothing_and_prints_nothing(tmp_path):
    done = python("-c", "import mfac", MFAC_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "cache").exists()


def test_load_builds_once_and_leaves_no_trace_elsewhere(bench, capfd):
    package, environment, path = files(_build.PACKAGE), dict(os.environ), list(sys.path)
    module = _build.load()
    assert module.build_config()["fingerprint"] == _build.fingerprint()
    assert _build.status()["origin"] == "built" and _build.load() is module
    bench.forget()
    assert _build.load() is not None and _build.status()["origin"] == "cache"
    assert bench.compilations() == 1
    assert (files(_build.PACKAGE), dict(os.environ), sys.path) == (package, environment, path)
    assert files(bench.sources) == {bench.sources / "stub.cpp"}
    assert {p.name for p in (bench.cache / _build.cache_key()).iterdir()} == {"_C.so", "build.log", "lock"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["source", "header", "new file", "arch", "compiler"])
def test_cache_key_changes(bench, change):
    (bench.sources / "a.h").write_text("// one\n")
    before = _build.cache_key()
    assert _build.cache_key() == before
    if change == "source":
        (bench.sources / "stub.cpp").write_text(STUB + "\n")
    elif change == "header":
        (bench.sources / "a.h").write_text("// two\n")
    elif change == "new file":
        (bench.sources / "cpu").mkdir()
        (bench.sources / "cpu" / "b.cpp").touch()
    elif change == "arch":
        bench.monkeypatch.setenv("MFAC_ARCH", "x86-64-v3")
    else:
        bench.monkeypatch.setenv("CXX", bench.real)
    assert _build.cache_key() != before


def test_architecture(monkeypatch):
    monkeypatch.delenv("MFAC_ARCH", raising=False)
    assert "-march=native" in _build.extension_spec()["cflags"]
    assert not [flag for flag in _build.extension_spec(ahead_of_time=True)["cflags"] if "march" in flag]
    monkeypatch.setenv("MFAC_ARCH", "x86-64-v3")
    for ahead_of_time in (False, True):
        assert "-march=x86-64-v3" in _build.extension_spec(ahead_of_time)["cflags"]


def test_spec_names_existing_sources_and_safe_flags():
    spec = _build.extension_spec()
    assert {Path(p).name for p in spec["sources"]} >= {"module.cpp", "mfac.cpp"} and all(
        map(os.path.exists, spec["sources"])
    )
    assert not {"-ffast-math", "-Ofast"} & set(spec["cflags"])
    assert isinstance(_build.cuda_plan()[0], list) and _build.cuda_plan()[1]
    if not _build.cuda_plan()[0]:
        assert not [p for p in spec["sources"] if "/cuda/" in p]


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A function that makes a CUDA toolkit of that version, for torch of CUDA 13.0 on a machine with three GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("MFAC_CUDA_ARCH", raising=False)
    monkeypatch.setattr(_build, "gpus_here", lambda: ("80", "90a", "999a"))
    monkeypatch.setattr(_build, "cuda_home", lambda: None)

    def make(version):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\ncase $1 in --version) echo release {version}, V1;; *) echo sm_80 sm_90;; esac\n")
        nvcc.chmod(0o755)
        monkeypatch.setattr(_build, "cuda_home", lambda: tmp_path)

    return make


def test_cuda_plan(toolkit, monkeypatch):
    """For the GPUs that are here and that nvcc knows, or those asked for."""
    assert not _build.cuda_plan()[0] and "nvcc and its headers were not found" in _build.cuda_plan()[1]
    toolkit("13.0")
    assert _build.cuda_plan() == (["80", "90a"], "for 80;90a, the GPUs of this machine")
    monkeypatch.setenv("MFAC_CUDA_ARCH", "100;90a")
    assert _build.cuda_plan()[0] == ["100", "90a"]
    spec = _build.extension_spec()
    assert {"bindings.cpp", "select_smallest.cu"} <= {Path(p).name for p in spec["sources"] if "/cuda/" in p}
    assert "-gencode=arch=compute_90a,code=sm_90a" in spec["cuda_cflags"] and '-DMFAC_CUDA="100;90a"' in spec["cflags"]
    monkeypatch.setenv("MFAC_CUDA_ARCH", "none")
    assert not _build.cuda_plan()[0]
    monkeypatch.delenv("MFAC_CUDA_ARCH")
    for gpus, reason in (((), "there is no GPU here"), (("70",), "does not know the GPUs of this machine, 70")):
        monkeypatch.setattr(_build, "gpus_here", lambda gpus=gpus: gpus)
        assert not _build.cuda_plan()[0] and reason in _build.cuda_plan()[1]


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

    def build(tried):
        if _build.cuda_plan()[0]:
            raise _build.BuildError("nvcc said no")
        return Path("_C.so"), "built"

    monkeypatch.setattr(_build, "_no_cuda", None)
    monkeypatch.setattr(_build, "_prebuilt", lambda: (None, "none"))
    monkeypatch.setattr(_build, "_build", build)
    monkeypatch.setattr(_build, "_import", lambda path, origin: path)
    with pytest.warns(RuntimeWarning, match=r"(?s)no CUDA kernels, only those for the CPU.*nvcc said no"):
        assert _build._load() == Path("_C.so")
    assert "they failed to compile, see" in _build.cuda_plan()[1]


def test_two_processes_compile_once(bench):
    bench.set_compiler("sleep 2")
    processes = [bench.start(), bench.start()]
    results = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    origins = [json.loads(out)["origin"] for out, _ in results]
    assert sorted(origins) == ["built", "cache"] and bench.compilations() == 1
    builder, waiter = origins.index("built"), origins.index("cache")
    assert f"waiting for process {processes[builder].pid} " in results[waiter][1]
    assert results[builder][1] == ""


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_build_killed_half_way_is_done_again(bench, whole_group):
    bench.set_compiler("sleep 60")
    process = bench.start()
    while not bench.compilations():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    home = bench.cache / _build.cache_key()
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.wait()
    (leftover,) = home.glob("build-*")
    assert (leftover / "lock").exists()  # torch's own lock, which would make torch wait for ever
    assert (home / "lock").read_text() == f"{process.pid}\n" and not (home / "_C.so").exists()
    bench.set_compiler("")
    start = time.monotonic()
    _build.load()
    assert _build.status()["origin"] == "built" and time.monotonic() - start < 30
    assert not list(home.glob("build-*"))
    if not whole_group:
        os.killpg(process.pid, signal.SIGKILL)


def test_failed_compilation_is_one_readable_error(bench):
    bench.set_compiler("echo 'stub.cpp:2:10: fatal error: Python.h: No such file or directory'; exit 1")
    with pytest.raises(_build.BuildError) as first:
        _build.load()
    tried, likely = ["prebuilt mfac._C: none", "just-in-time build"], ["headers are missing", "apt install python3-dev"]
    for part in [*tried, *likely, "build.log", "stub.cpp:2:10: fatal error"]:
        assert part in str(first.value)
    with pytest.raises(_build.BuildError) as second:
        _build.load()
    assert second.value is first.value and bench.compilations() == 1
    assert _build.status()["error"] == str(first.value) and _build.status()["origin"] is None


@pytest.mark.parametrize("env", [{"CXX": "/nonexistent/g++"}, {"CXX": "", "PATH": "/nonexistent"}])
def test_missing_compiler(bench, env):
    for name, value in env.items():
        bench.monkeypatch.setenv(name, value)
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler(.|\n)*apt install g\+\+"):
        _build.load()


def test_missing_ninja(bench):
    bench.monkeypatch.setitem(sys.modules, "ninja", None)
    bench.monkeypatch.setenv("PATH", "/nonexistent")
    bench.set_compiler("")
    with pytest.raises(_build.BuildError, match=r"ninja is not installed(.|\n)*pip install ninja"):
        _build.load()


def test_unusable_cache(bench, tmp_path):
    (tmp_path / "file").touch()
    bench.monkeypatch.setenv("MFAC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(_build.BuildError, match=r"Not a directory(.|\n)*set MFAC_CACHE_DIR"):
        _build.load()


def test_damaged_file_in_the_cache(bench):
    home = bench.cache / _build.cache_key()
    home.mkdir(parents=True)
    (home / "_C.so").write_bytes(b"not a library")
    with pytest.raises(_build.BuildError, match=rf"damaged(.|\n)*remove {home}"):
        _build.load()


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("MFAC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _build.cache_dir() == Path("/somewhere/mfac")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _build.cache_dir() == Path.home() / ".cache" / "mfac"


def test_prebuilt_must_fit(bench, tmp_path):
    bench.monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    assert "none in this installation" in _build._prebuilt()[1]
    path = tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"..." + _build.fingerprint().encode() + b"\0...")
    assert _build._prebuilt() == (path, "")
    (bench.sources / "stub.cpp").write_text(STUB + "\n")
    assert _build._prebuilt()[0] is None and "other sources" in _build._prebuilt()[1]


def copy_of_the_repository(folder):
    for name in ("mfac", "csrc", "recipes"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, folder)
    (folder / "README.md").touch()
    return folder


def pip(*args, **env):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, args)]
    subprocess.run(command, check=True, env={**os.environ, **env})


def test_installed_package_has_its_sources_and_works_elsewhere(tmp_path):
    repo, site = copy_of_the_repository(tmp_path / "repo"), tmp_path / "site"
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, repo)
    (wheel,) = tmp_path.glob("mfac-*-py3-none-any.whl")
    for folder in ("csrc", "recipes"):
        shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(f"mfac/{folder}/")}
        assert shipped == {f"mfac/{p.relative_to(REPO)}" for p in (REPO / folder).rglob("*") if p.is_file()}
    pip("install", "--no-deps", "--target", site, wheel)
    before = files(site)
    for path in [site, *before]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    code = "from mfac import _build; _build.load(); print(_build.sources_root(), _build.fingerprint())"
    done = python("-c", code, PYTHONPATH=str(site))  # the same sources as this checkout's: one build serves both
    assert done.stdout.split() == [str(site / "mfac" / "csrc"), _build.fingerprint()], done.stderr
    assert files(site) == before


def test_ahead_of_time_wheel(bench, tmp_path):
    repo, site = copy_of_the_repository(tmp_path / "repo"), tmp_path / "site"
    shutil.rmtree(repo / "csrc")
    shutil.copytree(bench.sources, repo / "csrc")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, repo, MFAC_AOT="1")
    (wheel,) = tmp_path.glob("mfac-*.whl")
    assert not wheel.name.endswith("none-any.whl")
    pip("install", "--no-deps", "--target", site, wheel)
    done = python(
        "-c", "from mfac import _build; _build.load(); print(_build.status()['origin'])", PYTHONPATH=str(site)
    )
    assert done.stdout == "prebuilt\n", done.stderr
    assert not bench.cache.exists()


def test_doctor_reports_success(capsys):
    assert doctor.main() == 0
    report = capsys.readouterr().out
    for part in (
        "torch  ",
        "compiler  ",
        "cpu capability",
        "cuda kernels",
        "cache  ",
        "kernels          loaded",
        "openmp",
    ):
        assert part in report


def test_doctor_reports_failure(bench, capsys):
    bench.monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert "NOT LOADED" in report and "no C++ compiler" in report and "apt install g++" in report
