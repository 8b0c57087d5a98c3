"""The benchmarks import what there is, and `make gpu` gets as far as it can without a GPU."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfac.cli import doctor
from mfac.ops import compiled

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FILES = sorted(str(path.relative_to(BENCHMARKS)) for path in BENCHMARKS.rglob("*.py"))
IMPORT_ALL = """
import importlib, sys
from pathlib import Path
for name in sys.argv[1:]:
    path = Path(name)
    sys.path.insert(0, str(path.parent))
    importlib.import_module(path.stem)
"""


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_can_be_imported():
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    run("-c", IMPORT_ALL, *(str(BENCHMARKS / name) for name in FILES))


@pytest.mark.parametrize("name", FILES)
def test_names_taken_from_mfac(name):
    """Those that are imported within functions, too."""
    for node in ast.walk(ast.parse((BENCHMARKS / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mfac":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_gpu_names_test_files_that_there_are(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # which gpu.py extends
    for name in importlib.import_module("gpu").OPS:
        assert (BENCHMARKS.parent / name).is_file(), name


def test_gpu_without_a_gpu():
    assert "nothing to do" in run(str(BENCHMARKS / "gpu.py"))


def test_gpu_without_cuda_kernels(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "main", lambda: 0)
    monkeypatch.setattr(compiled, "load", lambda: {"cuda": False})
    monkeypatch.setattr(sys, "path", list(sys.path))  # which gpu.py extends
    assert importlib.import_module("gpu").main() == 1
    assert "the CUDA kernels are not built" in capsys.readouterr().out
