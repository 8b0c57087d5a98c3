"""The public API under `mypy --strict`, as a user of the installed package sees it, and in a run."""

import os
import shutil
import subprocess
import sys

import pytest
from build_bench import REPO, python

PROGRAM = REPO / "tests" / "typing" / "user_program.py"


def mypy(site, program):
    """Return the finished process; mfac is found in `site`, and errors inside of it are not reported."""
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(site / "cache")]
    command = [sys.executable, "-m", "mypy", *options, str(program)]
    return subprocess.run(command, capture_output=True, text=True, cwd=site, env={**os.environ, "MYPYPATH": str(site)})


def test_user_program_is_typed(tmp_path):
    pytest.importorskip("mypy")
    shutil.copytree(REPO / "mfac", tmp_path / "mfac", ignore=shutil.ignore_patterns("__pycache__"))
    done = mypy(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(PROGRAM.read_text().replace("reached: float = result.sparsity", "reached: str = result.sparsity"))
    done = mypy(tmp_path, wrong)
    assert done.returncode == 1 and 'variable has type "str"' in done.stdout, done.stdout + done.stderr


def test_user_program_runs(tmp_path):
    program = f"import os, runpy; os.chdir({str(tmp_path)!r}); runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned.json").exists()
