"""Sources and flags of the extension."""

import os
from pathlib import Path

from mfac import _build


def test_architecture(monkeypatch):
    monkeypatch.delenv("MFAC_ARCH", raising=False)
    assert "-march=native" in _build.extension_spec()["cflags"]
    assert not [flag for flag in _build.extension_spec(ahead_of_time=True)["cflags"] if "march" in flag]
    monkeypatch.setenv("MFAC_ARCH", "x86-64-v3")
    for ahead_of_time in (False, True):
        assert "-march=x86-64-v3" in _build.extension_spec(ahead_of_time=ahead_of_time)["cflags"]


def test_spec_names_existing_sources_and_safe_flags():
    spec = _build.extension_spec()
    names = {Path(p).name for p in spec["sources"]}
    assert names >= {"module.cpp", "mfac.cpp"} and all(map(os.path.exists, spec["sources"]))
    assert not {"-ffast-math", "-Ofast"} & set(spec["cflags"])
    assert isinstance(_build.cuda_plan().gpus, list) and _build.cuda_plan().reason
    if not _build.cuda_plan().gpus:
        assert not [p for p in spec["sources"] if "/cuda/" in p]


def test_one_cxx_library_in_the_process(monkeypatch):
    """A compiler that has only libstdc++.a links the shared one that torch uses, not a copy."""
    assert _build.toolchain.shared_cxx_library() is None or _build.extension_spec()["ldflags"]
    monkeypatch.setattr(_build.toolchain, "_ask", lambda *command: "libstdc++.so\n")  # no path: not found
    library = _build.toolchain.shared_cxx_library()
    if library is not None:  # on Linux
        assert "libstdc++.so" in Path(library).name and Path(library).exists()


def test_fingerprint_names_sources_and_torch(bench):
    import torch

    before = _build.fingerprint()
    assert before.endswith(f"/torch-{torch.__version__}")
    (bench.sources / "a.cuh").touch()
    assert _build.fingerprint() != before


def test_sparse_inference_is_an_extension_of_its_own(bench):
    """Neither is compiled, or compiled again, for the sake of the other."""
    (bench.sources / "sparse").mkdir()
    pruning, sparse = (_build.fingerprint(name) for name in ("_C", "_sparse"))
    (bench.sources / "sparse" / "linear.cpp").touch()
    assert _build.fingerprint("_C") == pruning and _build.fingerprint("_sparse") != sparse
    sparse = _build.fingerprint("_sparse")
    (bench.sources / "block.cpp").touch()
    assert _build.fingerprint("_C") != pruning and _build.fingerprint("_sparse") == sparse
    (bench.sources / "shared.h").touch()
    assert _build.fingerprint("_sparse") != sparse
    names = {Path(p).name for p in _build.extension_spec("_sparse")["sources"]}
    assert names == {"linear.cpp"} and _build.cache_key("_C") != _build.cache_key("_sparse")
