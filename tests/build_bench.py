"""A stub of the C++ sources and a compiler that can be told what to do, for the tests of the build and the loader."""

import os
import subprocess
import sys
from pathlib import Path

from mfac import _build
from mfac._build import loader, spec

REPO = Path(__file__).resolve().parents[1]
STUB = """
#include <Python.h>
static PyObject* build_config(PyObject*, PyObject*) { return Py_BuildValue("{s:s}", "fingerprint", MFAC_FINGERPRINT); }
static PyMethodDef methods[] = {{"build_config", build_config, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
LOAD = """
import json, pathlib, sys
from mfac import _build
from mfac._build import cache, spec
spec.sources_root = lambda: pathlib.Path(sys.argv[1])
cache._FIRST_NOTICE = 0.2
_build.load()
print(json.dumps(_build.status()))
"""


class Bench:
    """A stub of the sources, an empty cache, and a compiler that counts its calls and is slow on request."""

    def __init__(self, folder, monkeypatch):
        self.sources, self.cache, self.calls = folder / "csrc", folder / "cache", folder / "calls"
        self.compiler, self.monkeypatch = folder / "c++", monkeypatch
        self.real = _build.find_compiler().command
        self.sources.mkdir()
        (self.sources / "stub.cpp").write_text(STUB)
        self.set_compiler("")
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.setenv("MFAC_CACHE_DIR", str(self.cache))
        monkeypatch.setattr(spec, "sources_root", lambda: self.sources)
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
        self.monkeypatch.setattr(loader, "_outcomes", {})
        self.monkeypatch.setattr(loader, "_status", {})

    def load(self):
        """Load as a new process would, and return the origin of the module."""
        self.forget()
        _build.load()
        return _build.status()["origin"]

    def start(self, **env):
        """Start a process of its own group that loads."""
        command, pipe = [sys.executable, "-c", LOAD, str(self.sources)], subprocess.PIPE
        env = {**os.environ, "PYTHONPATH": str(_build.PACKAGE.parent), **env}
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=env, cwd="/")

    def home(self):
        """Return the folder of the build."""
        return self.cache / _build.cache_key()

    def compilations(self):
        """Return how often the compiler has compiled a file."""
        return len(self.calls.read_text().split()) if self.calls.exists() else 0


def files(folder):
    """Return all files and folders below a folder, without those of the interpreter."""
    return {p for p in folder.rglob("*") if "__pycache__" not in p.parts}


def python(*args, **env):
    """Run this Python away from the repository's folder, with the package under test."""
    env = {**os.environ, "PYTHONPATH": str(_build.PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd="/")
