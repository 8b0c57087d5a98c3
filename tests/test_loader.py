"""The loader. Most tests compile a stub, by a compiler that counts its calls and is slow on request."""

import importlib.machinery
import json
import os
import signal
import sys
import time

import pytest
from build_bench import STUB, files, python

from mfac import _build
from mfac._build import cache, loader, spec


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
    assert {p.name for p in (bench.home()).iterdir()} == {"_C.so", "build.log", "lock", "manifest.json"}
    assert capfd.readouterr() == ("", "")


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
    home = bench.home()
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.wait()
    (leftover,) = home.glob("build-*")
    assert (leftover / "lock").exists()  # torch's own lock, which would make torch wait for ever
    assert (home / "holder").read_text() == f"{process.pid}\n" and not (home / "_C.so").exists()
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


def test_unusable_cache(bench, tmp_path):
    (tmp_path / "file").touch()
    bench.monkeypatch.setenv("MFAC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(_build.BuildError, match=r"Not a directory(.|\n)*set MFAC_CACHE_DIR"):
        _build.load()


def test_damaged_file_in_the_cache(bench):
    home = bench.home()
    home.mkdir(parents=True)
    library = home / "_C.so"
    library.write_bytes(b"not a library")
    cache.store(home, library)
    with pytest.raises(_build.BuildError, match=rf"damaged(.|\n)*remove {home}"):
        _build.load()


def test_prebuilt_must_fit(bench, tmp_path):
    bench.monkeypatch.setattr(spec, "PACKAGE", tmp_path)
    assert "none in this installation" in loader._prebuilt("_C")[1]
    path = tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    path.write_bytes(b"..." + _build.fingerprint().encode() + b"\0...")
    assert loader._prebuilt("_C") == (path, "")
    (bench.sources / "stub.cpp").write_text(STUB + "\n")
    assert loader._prebuilt("_C")[0] is None and "other sources" in loader._prebuilt("_C")[1]
