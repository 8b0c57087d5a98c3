"""All ops: schemas, fakes, argument checks, and the choice of backend."""

import warnings

import oracle
import pytest
import torch
from oracle import BACKENDS, TOLERANCE

import mfac
from mfac import _build
from mfac.ops import backend, reference
from mfac.ops import compiled as ops
from mfac.ops.backend import select_backend

GRADS = torch.randn(6, 20)
KEPT = torch.arange(20) % 2 == 0
ARGUMENTS = {
    "block_factor": (GRADS, 1e-3, 8, KEPT),
    "inverse_diagonal": (GRADS, 1e-3, 8, None),
    "inverse_product": (GRADS, reference.block_factor(GRADS, 1e-3, 8), torch.randn(2, 20), 1e-3, 8, None),
    "joint_update": (GRADS, torch.randn(20), KEPT, 1e-3, 8),
    "joint_step": (
        GRADS,
        torch.randn(20),
        KEPT,
        1e-3,
        8,
        "highest",
        torch.zeros(3, 23).double(),
        torch.zeros(20, dtype=torch.bool),
    ),
    "independent_update": (GRADS, torch.randn(20), KEPT, torch.rand(20) + 1, 1e-3, 8, None),
    "quadratic_form": (GRADS, torch.randn(20), 1e-3, 8),
    "group_saliency": (
        GRADS,
        torch.randn(20),
        torch.arange(20).view(5, 4),
        torch.tensor([[0, 1]]),
        1e-3,
        8,
        KEPT,
        "highest",
        torch.zeros(3, 23).double(),
        torch.zeros(20, dtype=torch.bool),
    ),
    "select_smallest": (torch.randn(30), [11, 3], [20, 10], torch.randn(30)),
}


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, device):
    """Schema (what is written), fake kernel and autograd registration."""
    ops.load()
    arguments = tuple(a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in ARGUMENTS[name])
    torch.library.opcheck(getattr(torch.ops.mfac, name).default, arguments)


def test_every_op_has_a_reference_of_the_same_signature():
    import inspect

    assert set(ops._FAKES) == set(ARGUMENTS)
    for name in ARGUMENTS:
        parameters = [list(inspect.signature(getattr(module, name)).parameters) for module in (ops, reference)]
        assert parameters[0] == parameters[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.randn(20)}, ValueError, r"grads: expected \[m, d\] with m >= 1 gradients, got shape \[20\]"),
        ({0: torch.randn(0, 20)}, ValueError, r"grads: expected \[m, d\] with m >= 1 gradients, got shape \[0, 20\]"),
        ({0: torch.randn(6, 20).double()}, TypeError, "grads: expected float32 or bfloat16, got Double"),
        ({1: torch.randn(19)}, ValueError, r"weights: expected shape \[20\], got \[19\]"),
        ({1: torch.randn(20).double()}, TypeError, "weights: expected Float, got Double"),
        ({2: torch.ones(20)}, TypeError, "kept: expected Bool, got Float"),
        ({3: 0.0}, ValueError, "damping: expected a number in .*, got 0"),
        ({3: float("nan")}, ValueError, "damping: expected a number in .*, got nan"),
        ({4: 0}, ValueError, "block_size: expected >= 1, got 0"),
    ],
)
def test_wrong_arguments(change, error, message):
    ops.load()
    arguments = [change.get(i, a) for i, a in enumerate(ARGUMENTS["joint_update"])]
    before = arguments[1].clone()
    with pytest.raises(error, match=message):
        ops.joint_update(*arguments)
    assert torch.equal(arguments[1], before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("shape", [(50, 301, 100), (65, 101, 50), (5, 20_000, 20_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(shape, dtype, precision):
    """A lower one costs no more than the table says."""
    (m, d, block_size), damping = shape, 1e-1
    grads, weights, kept = torch.randn(m, d).to(dtype), torch.randn(d), torch.rand(d) < 0.4
    groups, subsets = torch.randperm(d)[: d // 4 * 4].view(-1, 4), torch.tensor([[0, 1], [2, 3]])
    tolerance = TOLERANCE["diagonal" if precision == "highest" else precision]
    kernels = BACKENDS["compiled"]
    got, right = [], []
    for module, out in ((kernels, got), (reference, right)):
        diagonal = module.inverse_diagonal(grads, damping, block_size, None, precision)
        joint, independent = weights.clone(), weights.clone()
        loss = module.joint_update(grads, joint, kept, damping, block_size, precision)
        exact = reference.inverse_diagonal(grads, damping, block_size)
        module.independent_update(grads, independent, kept, exact, damping, block_size, None, precision)
        cost = module.group_saliency(grads, weights, groups, subsets, damping, block_size, None, precision)
        out += [diagonal, joint, loss, independent, cost]
    for one, other in zip(got, right, strict=True):
        assert oracle.error(one, other) < tolerance


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("kind", ["collinear", "near parallel"])
def test_low_precision_and_hard_gradients(kind, precision):
    """Rounding makes the small matrix indefinite; what comes out is positive and finite, if not precise."""
    grads = oracle.gradients(60, 200, kind)
    for damping in (1e-8, 1e-5, 1e-2):
        out = BACKENDS["compiled"].inverse_diagonal(grads, damping, 200, None, precision)
        assert bool(torch.isfinite(out).all()) and float(out.min()) > 0


def test_precision_by_another_name():
    with pytest.raises(ValueError, match="precision: expected 'highest', 'high' or 'medium', got 'tf32'"):
        ops.inverse_diagonal(GRADS, 1e-3, 8, None, "tf32")


def test_no_columns():
    grads = torch.randn(3, 0)
    ops.load()
    assert ops.inverse_diagonal(grads, 1e-3, 5).shape == (0,)
    assert ops.block_factor(grads, 1e-3, 5).shape[0] == 0
    assert float(ops.joint_update(grads, torch.empty(0), torch.empty(0, dtype=torch.bool), 1e-3, 5)) == 0


@pytest.fixture
def broken_build(monkeypatch):
    def fail(extension):
        raise _build.BuildError("no compiler here")

    ops.load.cache_clear()
    backend.warn_once.cache_clear()
    monkeypatch.setattr(_build, "load", fail)
    yield
    ops.load.cache_clear()
    backend.warn_once.cache_clear()


def test_auto_falls_back_with_one_warning(broken_build):
    with pytest.warns(RuntimeWarning, match=r"(?s)slower reference path.*no compiler here"):
        assert select_backend("auto") is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto") is reference


def test_compiled_never_falls_back(broken_build, monkeypatch):
    with pytest.raises(_build.BuildError, match="no compiler here"):
        select_backend("compiled")
    monkeypatch.setenv("MFAC_BACKEND", "compiled")
    with pytest.raises(_build.BuildError, match="no compiler here"):
        mfac.prune_step(torch.nn.Linear(4, 4), torch.randn(3, 16))


def test_environment_chooses(monkeypatch):
    monkeypatch.setenv("MFAC_BACKEND", "reference")
    assert select_backend() is reference
    assert select_backend("compiled") is ops  # an argument wins
    monkeypatch.setenv("MFAC_BACKEND", "fast")
    with pytest.raises(ValueError, match="MFAC_BACKEND: expected one of auto, compiled, reference, got 'fast'"):
        select_backend()
    with pytest.raises(ValueError, match="backend: expected one of auto, compiled, reference, got 'quick'"):
        select_backend("quick")


def test_other_devices_take_the_reference():
    with pytest.raises(RuntimeError, match="backend: expected a device with compiled kernels, got meta"):
        select_backend("compiled", "meta")
    backend.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiled kernels for meta"):
        assert select_backend("auto", "meta") is reference


def test_the_compiled_path_is_there():
    """The tests must not pass on the reference alone."""
    ops.load()
    assert select_backend("auto") is ops
