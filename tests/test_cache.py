"""The cache of builds: folder, key, lock, and what is safe to load."""

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import platformdirs
import pytest
from build_bench import STUB, python

from mfac import _build
from mfac._build import cache, toolchain


@pytest.mark.parametrize("change", ["source", "header", "new file", "arch", "cpu", "torch"])
def test_key_changes(bench, change):
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
    elif change == "cpu":
        bench.monkeypatch.setattr(toolchain, "cpu", lambda: ("another processor", ""))
    else:
        bench.monkeypatch.setattr("torch.version.git_version", "another commit")
    assert _build.cache_key() != before


def test_key_needs_no_tools(bench):
    before = _build.cache_key()
    bench.monkeypatch.setenv("CXX", "/nonexistent/g++")
    bench.monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("ninja", "pybind11"):
        bench.monkeypatch.setitem(sys.modules, name, None)
    assert _build.cache_key() == before


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("MFAC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _build.cache_dir() == tmp_path / "mfac"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _build.cache_dir() == tmp_path / ".cache" / "mfac"


def test_cache_dir_without_a_home(monkeypatch, tmp_path):
    """Nothing says where home is: HOME is not set, and the user is not in the password database."""
    import pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("MFAC_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fallback = tmp_path / f"mfac-{os.getuid()}"
    assert _build.cache_dir() == fallback
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)  # of older releases
    assert _build.cache_dir() == fallback


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become a user that does not exist")
@pytest.mark.parametrize("home", [None, "/"])
def test_a_user_that_the_system_does_not_know(home):
    """As in a container that is run under a number: no name, and no home or one that cannot be written to."""
    code = """
import os, sys
from mfac._build import cache
cache.cache_dir()  # all modules are loaded before the change of user, who may not read them
os.setgid(54321)
os.setuid(54321)
os.environ.pop("HOME")
if sys.argv[1:]:
    os.environ["HOME"] = sys.argv[1]
cache.make_private(cache.cache_dir())
print(cache.cache_dir())
"""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which is closed to other users
        os.chmod(folder, 0o1777)
        env = {"TMPDIR": folder, "XDG_CACHE_HOME": "", "MFAC_CACHE_DIR": "", "HOME": "/root"}
        done = python("-c", code, *[home] * (home is not None), **env)
        found = Path(folder) / "mfac-54321"
        assert done.stdout == f"{found}\n", done.stderr
        assert (found.stat().st_uid, stat.S_IMODE(found.stat().st_mode)) == (54321, 0o700)


def test_folders_are_private(bench, tmp_path):
    bench.monkeypatch.setenv("MFAC_CACHE_DIR", str(tmp_path / "a" / "b"))
    before = os.umask(0o002)  # of distributions that give each user a group
    try:
        assert bench.load() == "built"
    finally:
        os.umask(before)
    home = tmp_path / "a" / "b" / _build.cache_key()
    for folder in (tmp_path / "a", tmp_path / "a" / "b", home):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "_C.so").stat().st_mode) == 0o755
    assert bench.load() == "cache"


@pytest.mark.parametrize("what", ["cache", "folder", "file"])
def test_what_others_may_write_to_is_not_loaded(bench, what):
    bench.load()
    path = {"cache": bench.cache, "folder": bench.home(), "file": bench.home() / "_C.so"}[what]
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | stat.S_IWOTH)
    bench.forget()
    with pytest.raises(_build.BuildError, match=rf"cache {path}: not loaded, others may write(.|\n)*chmod go-w {path}"):
        _build.load()
    path.chmod(0o755)  # of earlier versions
    assert bench.load() == "cache" and bench.compilations() == 1


def test_nothing_is_built_where_others_may_write(bench):
    bench.cache.mkdir()
    bench.cache.chmod(0o777)
    with pytest.raises(_build.BuildError, match="others may write to it"):
        bench.load()
    assert bench.compilations() == 0


def test_what_belongs_to_others_is_not_loaded(bench):
    bench.load()
    user = os.getuid()
    bench.monkeypatch.setattr(os, "getuid", lambda: user + 1)
    if user == 0:  # what is root's is trusted
        assert bench.load() == "cache"
        os.chown(bench.home(), 54321, -1)
    with pytest.raises(_build.BuildError, match=r"it belongs to user \d+, not to user(.|\n)*set MFAC_CACHE_DIR"):
        bench.load()


def test_links(bench, tmp_path):
    """A link of one's own is followed; where it leads is what counts."""
    bench.load()
    bench.cache.rename(tmp_path / "elsewhere")
    bench.cache.symlink_to(tmp_path / "elsewhere")
    assert bench.load() == "cache"
    (tmp_path / "elsewhere").chmod(0o777)
    with pytest.raises(_build.BuildError, match="others may write to it"):
        bench.load()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make files of another user")
def test_links_of_others(bench, tmp_path):
    bench.load()
    bench.cache.rename(tmp_path / "elsewhere")
    bench.cache.symlink_to(tmp_path / "elsewhere")
    os.lchown(bench.cache, 54321, -1)
    with pytest.raises(_build.BuildError, match="it belongs to user 54321"):
        bench.load()


def test_another_compiler_builds_again(bench):
    assert bench.load() == "built" and bench.load() == "cache"
    manifest = json.loads((bench.home() / "manifest.json").read_text())
    assert manifest["compiler"][0] == str(bench.compiler) and set(manifest) == {
        "compiler",
        "pybind11",
        "cuda",
        "library",
    }
    bench.monkeypatch.setenv("CXX", bench.real)
    assert bench.load() == "built" and bench.load() == "cache"
    (bench.home() / "manifest.json").unlink()  # a build was killed at its last step
    assert bench.load() == "built"


def truncate(library, size):
    """Cut a library by putting a shorter copy in its place: the file itself is mapped into this process."""
    copy = library.with_name("copy")
    copy.write_bytes(library.read_bytes()[:size])
    copy.replace(library)


@pytest.mark.parametrize("size", [5000, -1])
def test_a_truncated_library_is_built_again(bench, size):
    """Loading it would kill the process."""
    bench.load()
    truncate(bench.home() / "_C.so", size)
    assert bench.load() == "built" and bench.load() == "cache"


@pytest.mark.parametrize("manifest", ["as written", "[]", None])
def test_a_truncated_library_without_tools(bench, manifest):
    bench.load()
    truncate(bench.home() / "_C.so", 5000)
    path = bench.home() / "manifest.json"
    if manifest is None:
        path.unlink()
    elif manifest == "[]":
        path.write_text(manifest)
    bench.monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(
        _build.BuildError, match=rf"its 5000 bytes are not(.|\n)*is damaged(.|\n)*remove {bench.home()} and"
    ):
        bench.load()


def test_a_damaged_manifest(bench):
    bench.load()
    for data in (b"1", b"{", b"\xff\xfe", b"", b"[]"):
        (bench.home() / "manifest.json").write_bytes(data)
        assert not cache.fits(bench.home())
    assert bench.load() == "built" and bench.load() == "cache"


@pytest.mark.parametrize("missing", ["compiler", "quote", "ninja", "pybind11"])
def test_a_warm_cache_needs_no_tools(bench, missing):
    bench.load()
    if missing == "ninja":
        bench.monkeypatch.setitem(sys.modules, "ninja", None)
        bench.monkeypatch.setenv("PATH", "/nonexistent")
    elif missing == "pybind11":
        bench.monkeypatch.setitem(sys.modules, "pybind11", None)
    else:
        bench.monkeypatch.setenv("CXX", "'g++" if missing == "quote" else "/nonexistent/g++")
    assert bench.load() == "cache"


def test_a_cached_cuda_build_needs_no_nvcc(bench):
    tools = {"compiler": ["c++", "1"], "pybind11": "2", "cuda": [["90a"], "release 13.0"]}
    bench.monkeypatch.setattr(toolchain, "build_tools", lambda: tools)
    bench.load()
    tools["cuda"] = None  # nvcc has gone
    assert bench.load() == "cache"
    tools["cuda"] = [["90a"], "release 13.1"]
    assert bench.load() == "built"


def test_a_warm_cache_in_a_process_without_tools(tmp_path):
    """The kernels themselves: a copy of the built ones is loaded and used where there is no compiler, ninja or nvcc."""
    _build.load()
    home = tmp_path / _build.cache_key()
    shutil.copytree(Path(_build.status()["path"]).parent, home)
    code = """
import torch
from mfac import _build, ops
from mfac.ops.backend import select_backend
backend = select_backend("compiled")
backend.block_factor(torch.ones(2, 8), 1.0, 4)
print(_build.status()["origin"], _build.toolchain.build_tools())
"""
    nothing = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++", "MFAC_CACHE_DIR": str(tmp_path)}
    done = python("-c", code, **nothing)
    assert done.stdout == "cache None\n", done.stderr


def test_lock_says_whom_it_waits_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_FIRST_NOTICE", 0.1)
    code = "import sys, pathlib, time; from mfac._build import cache\n"
    code += "with cache.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    env = {**os.environ, "PYTHONPATH": str(_build.PACKAGE.parent)}
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    assert holder.stdout.readline() == b"held\n"
    os.utime(tmp_path / "holder", (time.time() - 100,) * 2)
    threading.Timer(1, holder.send_signal, [signal.SIGKILL]).start()
    with caplog.at_level(logging.WARNING, "mfac"), cache.locked(tmp_path):  # the lock of a killed process is free
        assert (tmp_path / "holder").read_text() == f"{os.getpid()}\n"
    holder.wait()
    assert f"waiting for process {holder.pid} to compile the kernels, 100 s so far" in caplog.text
    assert not (tmp_path / "holder").exists()


def test_a_stale_lock_is_survived(tmp_path):
    (tmp_path / "lock").write_text("1\n")
    (tmp_path / "holder").write_text("1\n")
    start = time.monotonic()
    with cache.locked(tmp_path):
        pass
    assert time.monotonic() - start < 1
