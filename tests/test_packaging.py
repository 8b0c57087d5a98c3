"""The distribution: what a wheel holds, and that an installed copy works away from the repository."""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile

from build_bench import REPO, files, python

from mfac import __version__, _build, extras


def test_one_name_of_the_distribution():
    """The package index knows another project as mfac: hints must not install that."""
    assert f'name = "{extras.DISTRIBUTION}"' in (REPO / "pyproject.toml").read_text()
    sources = [*REPO.glob("mfac/**/*.py"), REPO / "README.md"]
    assert not [p for p in sources if re.search(r"pip install '?mfac(\[|\b[^-])", p.read_text())]


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
    (wheel,) = tmp_path.glob("mfac_pruning-*-py3-none-any.whl")
    for folder in ("csrc", "recipes"):
        shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(f"mfac/{folder}/")}
        assert shipped == {f"mfac/{p.relative_to(REPO)}" for p in (REPO / folder).rglob("*") if p.is_file()}
    assert "mfac/py.typed" in zipfile.ZipFile(wheel).namelist()
    pip("install", "--no-deps", "--target", site, wheel)
    before = files(site)
    for path in [site, *before]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    code = "from mfac import _build; _build.load(); print(_build.sources_root(), _build.fingerprint())"
    done = python("-c", code, PYTHONPATH=str(site))  # the same sources as this checkout's: one build serves both
    command = python(site / "bin" / "mfac", "--version", PYTHONPATH=str(site))
    assert command.stdout == f"mfac {__version__}\n", command.stderr
    assert done.stdout.split() == [str(site / "mfac" / "csrc"), _build.fingerprint()], done.stderr
    assert files(site) == before


def test_ahead_of_time_wheel(bench, tmp_path):
    repo, site = copy_of_the_repository(tmp_path / "repo"), tmp_path / "site"
    shutil.rmtree(repo / "csrc")
    shutil.copytree(bench.sources, repo / "csrc")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, repo, MFAC_AOT="1")
    (wheel,) = tmp_path.glob("mfac_pruning-*.whl")
    assert not wheel.name.endswith("none-any.whl")
    pip("install", "--no-deps", "--target", site, wheel)
    done = python(
        "-c", "from mfac import _build; _build.load(); print(_build.status()['origin'])", PYTHONPATH=str(site)
    )
    assert done.stdout == "prebuilt\n", done.stderr
    assert not bench.cache.exists()
