"""The inference ops: schemas, fakes, argument checks, and the choice of backend."""

import inspect
import warnings

import pytest
import sparse_oracle as oracle
import torch

from mfac import _build
from mfac.ops import backend as choice
from mfac.sparse import backend, compiled, reference
from mfac.sparse.backend import select_backend

WEIGHT = oracle.sparse_weight((9, 6), 0.5)
ROWS, BLOCKS = oracle.compress(WEIGHT, "rows"), oracle.compress(WEIGHT, "blocks")
ARGUMENTS = {
    "linear": (torch.randn(3, 6), *ROWS, torch.randn(9), [9, 6], "relu"),
    "conv2d": (torch.randn(2, 6, 5, 4), *BLOCKS, None, [9, 6], [1, 1], [2, 1], [0, 1], "none"),
    "depthwise_conv2d": (torch.randn(2, 3, 5, 4), torch.randn(3, 1, 3, 3), torch.randn(3), 2, "relu6"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.mfac_sparse, name).default, ARGUMENTS[name])


def test_every_op_has_a_reference_of_the_same_signature():
    assert set(compiled._FAKES) == set(ARGUMENTS)
    for name in ARGUMENTS:
        signatures = [list(inspect.signature(getattr(m, name)).parameters) for m in (compiled, reference)]
        assert signatures[0] == signatures[1]


def changed(t, place, value):
    t = t.clone()
    t[place] = value
    return t


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.randn(3, 6).double()}, TypeError, "x: expected float32 or bfloat16, got Double"),
        ({0: torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., inputs\], got a scalar"),
        ({6: [9, 32767]}, ValueError, r"shape: expected \[N, K\] with N < 2\^31 and K < 32767, got \[9, 32767\]"),
        ({0: torch.randn(3, 7)}, ValueError, "x: expected 6 inputs per output, got 7"),
        ({0: torch.randn(3, 5), 6: [9, 5]}, ValueError, r"columns: expected numbers in \[0, 5\], got 0 to 6"),
        ({0: torch.randn(2, 0), 6: [9, 0]}, ValueError, r"columns: expected numbers in \[0, 0\], got 0 to 6"),
        ({0: torch.randn(1, 5), 6: [9, 5]}, ValueError, r"columns: expected numbers in \[0, 5\], got 0 to 6"),
        ({1: ROWS[0].bfloat16()}, TypeError, "values: expected Float, got BFloat16"),
        ({1: ROWS[0][:, :3]}, ValueError, "values: expected a contiguous tensor on the CPU"),
        ({1: ROWS[0][:, :3].contiguous()}, ValueError, r"values: expected shape \[steps, 4\], got"),
        ({2: ROWS[1].int()}, TypeError, "columns: expected Short, got Int"),
        ({2: ROWS[1][1:]}, ValueError, "columns: expected shape"),
        ({2: changed(ROWS[1], (0, 0), -1)}, ValueError, r"columns: expected numbers in \[0, 6\], got -1 to 6"),
        ({0: torch.randn(6), 2: changed(ROWS[1], (0, 0), -1)}, ValueError, "columns: expected numbers in"),
        ({0: torch.randn(6), 2: changed(ROWS[1], (0, 0), 7)}, ValueError, "columns: expected numbers in"),
        ({3: ROWS[2][1:]}, ValueError, r"pointers: expected shape \[4\], got \[3\]"),
        ({3: changed(ROWS[2], 3, 99)}, ValueError, "pointers: expected 0 to .*, got 0 to 99"),
        ({3: changed(ROWS[2], 1, 99)}, ValueError, "pointers: expected non-decreasing numbers, got 99 before"),
        ({4: changed(ROWS[3], 0, 9)}, ValueError, "order: expected -1 or rows below 9 in their windows of 128"),
        ({5: torch.randn(8)}, ValueError, r"bias: expected shape \[9\], got \[8\]"),
        ({5: torch.randn(9).bfloat16()}, TypeError, "bias: expected Float like x, got BFloat16"),
        ({6: [-1, 6], 5: None}, ValueError, r"shape: expected .*, got \[-1, 6\]"),
        ({7: "gelu"}, ValueError, "activation: expected 'none', 'relu' or 'relu6', got 'gelu'"),
    ],
)
def test_wrong_arguments_of_linear(change, error, message):
    arguments = [change.get(i, a) for i, a in enumerate(ARGUMENTS["linear"])]
    with pytest.raises(error, match=message):
        compiled.linear(*arguments)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("conv2d", {0: torch.randn(6, 5, 4)}, ValueError, r"x: expected shape \[n, channels, height, width\], got"),
        ("conv2d", {0: torch.randn(2, 5, 5, 4)}, ValueError, "x: expected 6 inputs per output, got 5"),
        ("conv2d", {7: [0, 1]}, ValueError, r"kernel: expected numbers >= 1, got \[0, 1\]"),
        ("conv2d", {8: [0, 1]}, ValueError, r"stride: expected numbers >= 1, got \[0, 1\]"),
        ("conv2d", {9: [0, -1]}, ValueError, r"padding: expected numbers >= 0, got \[0, -1\]"),
        ("conv2d", {7: [9, 9]}, ValueError, r"x: expected height and width of at least the kernel's \[9, 9\], got"),
        ("depthwise_conv2d", {1: torch.randn(3, 1, 5, 5)}, ValueError, r"weight: expected shape \[3, 1, 3, 3\], got"),
        ("depthwise_conv2d", {3: 3}, ValueError, "stride: expected 1 or 2, got 3"),
        ("depthwise_conv2d", {2: torch.randn(4)}, ValueError, r"bias: expected shape \[3\], got \[4\]"),
    ],
)
def test_wrong_arguments_of_convolutions(name, change, error, message):
    arguments = [change.get(i, a) for i, a in enumerate(ARGUMENTS[name])]
    with pytest.raises(error, match=message):
        getattr(compiled, name)(*arguments)


@pytest.fixture
def broken_build(monkeypatch):
    def fail(extension="_C"):
        raise _build.BuildError("no compiler here")

    compiled.load.cache_clear()
    choice.warn_once.cache_clear()
    monkeypatch.setattr(_build, "load", fail)
    yield
    compiled.load.cache_clear()
    choice.warn_once.cache_clear()


def test_auto_falls_back_with_one_warning(broken_build):
    with pytest.warns(RuntimeWarning, match=r"(?s)gain nothing from zeros.*no compiler here"):
        assert select_backend() is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend() is reference


def test_compiled_never_falls_back(broken_build, monkeypatch):
    with pytest.raises(_build.BuildError, match="no compiler here"):
        select_backend("compiled")
    monkeypatch.setenv("MFAC_BACKEND", "compiled")
    with pytest.raises(_build.BuildError, match="no compiler here"):
        select_backend()


def test_environment_chooses(monkeypatch):
    monkeypatch.setenv("MFAC_BACKEND", "reference")
    assert select_backend() is reference and select_backend("compiled") is compiled
    with pytest.raises(ValueError, match="backend: expected one of auto, compiled, reference, got 'quick'"):
        select_backend("quick")


def test_the_compiled_path_is_there():
    """The tests must not pass on the reference alone."""
    assert select_backend() is compiled and backend.backend_name(compiled) == "compiled"
