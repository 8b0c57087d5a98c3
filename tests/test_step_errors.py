"""prune_step refuses bad input by name, and nothing has changed then."""

import math

import pytest
import torch
from test_step import BACKENDS, LAYERS, D, make_model
from torch import nn

from mfac import GradientBuffer, prune_step

G = torch.ones(4, D)
ONES = {name: torch.ones(shape, dtype=torch.bool) for name, shape in LAYERS.items()}
ROW = {name: torch.ones(shape) for name, shape in LAYERS.items()}
WITH_NAN = torch.where(torch.arange(4)[:, None] == 2, math.nan, G)
WITH_INF = torch.where(torch.arange(D) == 5, math.inf, G)
OTHER = GradientBuffer(2, {"0.weight": torch.zeros(8, 5)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        # sparsity
        ({"sparsity": -0.1}, ValueError, r"sparsity: expected in \[0, 1\], got -0.1"),
        ({"sparsity": 1.01}, ValueError, r"sparsity: expected in \[0, 1\], got 1.01"),
        ({"sparsity": math.nan}, ValueError, "sparsity: .* got nan"),
        ({"sparsity": True}, TypeError, "sparsity: expected a number, got True"),
        ({"sparsity": "0.5"}, TypeError, "sparsity: expected a number, got '0.5'"),
        ({"sparsity": None}, TypeError, "sparsity: expected a number, got None"),
        ({"sparsity": {}}, ValueError, "sparsity: expected at least one entry"),
        ({"sparsity": {"0.weight": 2.0}}, ValueError, r"sparsity\['0.weight'\]: expected in \[0, 1\], got 2.0"),
        ({"sparsity": {"0.weight": None}}, TypeError, r"sparsity\['0.weight'\]: expected a number"),
        ({"sparsity": {"1.weight": 0.5}}, ValueError, "sparsity: expected names among 0.* got '1.weight'"),
        ({"sparsity": {"re:.*": 0.5, "2.weight": 0.9}}, ValueError, r"one key for '2.weight', got both 're:\.\*'"),
        ({"sparsity": {0: 0.5}}, TypeError, "expected names of parameters, got 0"),
        # settings
        ({"damping": 0}, ValueError, "damping: expected a number in .*, got 0"),
        ({"damping": -1.0}, ValueError, "damping: expected a number in .*, got -1.0"),
        ({"damping": math.nan}, ValueError, "damping: .* got nan"),
        ({"damping": math.inf}, ValueError, "damping: .* got inf"),
        ({"damping": "1e-7"}, ValueError, "damping: expected a number .*, as in '1e-2[*]mean', got '1e-7'"),
        ({"block_size": "all"}, ValueError, "block_size: expected an int, None or 'auto', got 'all'"),
        ({"substeps": 0}, ValueError, "substeps: expected an int 1 to 10000 or 'auto', got 0"),
        ({"substeps": 1.0}, TypeError, "substeps: expected an int or 'auto', got 1.0"),
        ({"pattern": "4:2"}, ValueError, "pattern: expected N:M with 1 <= N < M"),
        ({"block_size": 0}, ValueError, "block_size: expected an int >= 1, None or 'auto', got 0"),
        ({"block_size": 2e3}, TypeError, "block_size: expected an int, None or 'auto', got 2000.0"),
        ({"scope": "model"}, ValueError, "scope: expected one of global, layer, got 'model'"),
        ({"update": None}, ValueError, "update: expected one of joint, independent, none, auto, got None"),
        ({"criterion": "taylor"}, ValueError, "criterion: expected one of fisher, magnitude, got 'taylor'"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of auto, compiled, reference, got 'cuda'"),
        ({"params": "0.wei"}, ValueError, "params: expected names among .*, got '0.wei'"),
        ({"params": "0.weight"}, ValueError, r"grads: expected \[m, 40\] for these parameters, got shape \[4, 72\]"),
        # gradients
        ({"grads": None}, ValueError, "grads: expected gradients for criterion='fisher', got None"),
        ({"grads": G[:0]}, ValueError, r"grads: expected \[m, d\] with m >= 1 .* got shape \[0, 72\]"),
        ({"grads": G[0]}, ValueError, r"grads: .* got shape \[72\]"),
        ({"grads": G[:, 1:]}, ValueError, r"grads: expected \[m, 72\] for these parameters, got shape \[4, 71\]"),
        ({"grads": G.double()}, TypeError, "grads: expected float32 or bfloat16, got torch.float64"),
        ({"grads": G.to("meta")}, ValueError, "grads: expected on cpu like the model, or on the CPU, got meta"),
        ({"grads": WITH_NAN}, ValueError, "grads: expected finite .* in 1 rows, the first 2"),
        ({"grads": WITH_INF}, ValueError, "grads: expected finite .* in 4 rows, the first 0"),
        ({"grads": 3}, TypeError, "grads: expected a GradientBuffer, a tensor or a list of dicts, got int"),
        ({"grads": GradientBuffer(2, ROW)}, ValueError, "grads: expected at least one gradient, got an empty Gradient"),
        ({"grads": OTHER, "params": "__ALL_PRUNABLE__"}, ValueError, "grads: expected the parameters 0.* of 0"),
        ({"grads": []}, ValueError, "grads: expected at least one gradient"),
        ({"grads": [ROW, G]}, TypeError, r"grads\[1\]: expected a dict .* got Tensor"),
        ({"grads": [ROW, {"0.weight": ROW["0.weight"]}]}, ValueError, r"\[1\]: .* none of 2.weight"),
        ({"grads": [ROW | {"x": G}]}, ValueError, r"grads\[0\]: expected names among 0.weight, 2.weight, got 'x'"),
        ({"grads": [ROW | {"2.weight": torch.ones(8, 4)}]}, ValueError, r"shape \[4, 8\] for '2.weight', got \[8, 4\]"),
        ({"grads": [ROW | {"2.weight": 3}]}, TypeError, "expected a tensor for '2.weight', got int"),
        ({"grads": [ROW, ROW | {"2.weight": torch.full((4, 8), math.nan)}]}, ValueError, r"grads\[1\]: expected fin"),
        # masks
        ({"masks": [ONES]}, TypeError, "masks: expected name -> bool tensor, 'nonzero' or None, got list"),
        ({"masks": {"0.bias": ONES["0.weight"]}}, ValueError, "masks: expected names among 0.* got '0.bias'"),
        ({"masks": {"0.weight": ONES["2.weight"]}}, ValueError, r"masks\['0.weight'\]: .* of shape \[8, 5\], got"),
        ({"masks": {"0.weight": ROW["0.weight"]}}, ValueError, r"masks\['0.weight'\]: .* got torch.float32"),
        ({"masks": {"0.weight": True}}, ValueError, r"masks\['0.weight'\]: expected bool .* got bool"),
        ({"masks": {"0.weight": ONES["0.weight"].to("meta")}}, ValueError, r"with data, got .* meta"),
        (
            {"masks": {"0.weight": ~ONES["0.weight"]}, "sparsity": 0.3},
            ValueError,
            "sparsity: expected at least 40 of 72 weights .* got 0.3, which is 22",
        ),
        (
            {"masks": {"0.weight": ~ONES["0.weight"]}, "sparsity": {"2.weight": 0.3, "0.weight": 0.9}},
            ValueError,
            "sparsity: expected at least 40 of 40 weights .* got 0.9, which is 36",
        ),
    ],
)  # fmt: skip
def test_bad_input(unchanged, change, error, message):
    model = make_model()
    model(torch.randn(2, 5)).sum().backward()
    model[1].eval()
    args = {"grads": G, "sparsity": 0.5} | change
    masks = [mask for mask in ONES.values()]
    with unchanged(model, G, *masks), pytest.raises(error, match=message):
        prune_step(model, **args)


def bad_weight(value):
    model = make_model()
    model[2].weight.data[1, 1] = value
    return model


def two_devices():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, device="meta"))


def complex_model():
    return nn.Sequential(nn.Linear(5, 8, dtype=torch.complex64), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Sequential(), ValueError, "model: expected a module with parameters, got one without any"),
        (lambda: nn.BatchNorm1d(4), ValueError, "model: expected at least one Linear or ConvNd layer"),
        (lambda: bad_weight(math.nan), ValueError, "model: expected finite weights, got NaN or infinity in '2.weight'"),
        (
            lambda: bad_weight(-math.inf),
            ValueError,
            "model: expected finite weights, got NaN or infinity in '2.weight'",
        ),
        (complex_model, TypeError, "model: expected floating point parameters, got torch.complex64 for '0.weight'"),
    ],
)
def test_bad_model(unchanged, make, error, message):
    model = make()
    with unchanged(model), pytest.raises(error, match=message):
        prune_step(model, G, 0.5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (two_devices(), "model: expected parameters on one device, got cpu, meta"),
        (make_model().to("meta"), "model: expected parameters with data, got them on the meta device"),
    ],
)
def test_bad_devices(model, message):
    with pytest.raises(ValueError, match=message):
        prune_step(model, G, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_of_the_model_type(unchanged, backend):
    """60,000 + 30,000 is no float16: refused before anything is written, though the first layer would have fitted."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)).half()
    model[0].weight.data = torch.tensor([[1.0, 0.5]]).half()
    model[1].weight.data = torch.tensor([[60000.0], [30000.0]]).half()
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match=r"update: expected finite .*; raise the damp"),
    ):
        prune_step(model, torch.ones(1, 4), 0.5, scope="layer", block_size=2, backend=backend)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        prune_step({}, G, 0.5)
