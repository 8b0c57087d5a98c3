"""Pruner: what is refused, before anything changes."""

import math

import pytest
import torch
from test_gradual import make, make_model
from torch import nn

from mfac import GradientBuffer

BUFFER = GradientBuffer(2, {"0.weight": torch.zeros(10, 6)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": None}, ValueError, "batches, buffer: expected exactly one of them for criterion='fisher'"),
        ({"buffer": BUFFER}, ValueError, "batches, buffer: expected exactly one of them .* got both"),
        ({"buffer": BUFFER, "criterion": "magnitude"}, ValueError, "batches, buffer: expected at most one of them"),
        ({"loss_fn": 3, "criterion": "magnitude"}, TypeError, "loss_fn: expected a function or None, got 3"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a function or None, got 3"),
        ({"batches": None, "buffer": [1]}, TypeError, "buffer: expected a GradientBuffer, got list"),
        ({"batches": None, "buffer": BUFFER, "recomputations": 2}, ValueError, "recomputations: expected 1 with"),
        ({"batches": None, "buffer": BUFFER, "params": "2.weight"}, ValueError, "params: .* 0.weight, got 2.weight"),
        ({"recomputations": 0}, ValueError, "recomputations: expected an int 1 to 10000 or 'auto', got 0"),
        ({"recomputations": 1.5}, TypeError, "recomputations: expected an int or .auto., got 1.5"),
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        ({"num_grads": {0.0: 16, 0.5: 8}, "refresh": 12}, ValueError, "refresh: expected an int 1 to 8, got 12"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float64"),
        ({"sparsity": 1.5}, ValueError, r"sparsity: expected in \[0, 1\], got 1.5"),
        ({"sparsity": math.nan}, ValueError, r"sparsity: expected in \[0, 1\], got nan"),
        ({"sparsity": True}, TypeError, "sparsity: expected a number, got True"),
        ({"sparsity": "0.8"}, TypeError, "sparsity: expected a number, got '0.8'"),
        ({"sparsity": {"0.wei": 0.5}}, ValueError, "sparsity: expected names among .* got '0.wei'"),
        ({"sparsity": {"re:.": 0.5, "0.weight": 0.9}}, ValueError, "expected one key for '0.weight', got both"),
        ({"sparsity": {"0.weight": 0.3}, "initial_sparsity": 0.4}, ValueError, "initial_sparsity: .* at most .*0.4"),
        ({"initial_sparsity": -1}, ValueError, r"initial_sparsity: expected in \[0, 1\], got -1"),
        ({"initial_sparsity": "0"}, ValueError, "initial_sparsity: expected one of current, got '0'"),
        ({"start": 9}, ValueError, "end: expected >= start = 9, got 8"),
        ({"end": math.nan}, ValueError, "end: expected a finite number, got nan"),
        ({"frequency": 0}, ValueError, "frequency: expected > 0, got 0"),
        ({"schedule": "step"}, ValueError, "schedule: expected one of .* got 'step'"),
        ({"damping": -1e-5}, ValueError, "damping: expected a number in .*, got -1e-05"),
        ({"block_size": 0}, ValueError, "block_size: expected an int >= 1, None or 'auto', got 0"),
        ({"block_size": 50.0}, TypeError, "block_size: expected an int, None or 'auto', got 50.0"),
        ({"scope": "model"}, ValueError, "scope: expected one of global, layer, got 'model'"),
        ({"update": "exact"}, ValueError, "update: expected one of joint, independent, none, auto, got 'exact'"),
        ({"criterion": "taylor"}, ValueError, "criterion: expected one of fisher, magnitude, got 'taylor'"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, compiled, reference, got 'gpu'"),
        ({"params": ["nope"]}, ValueError, "params: expected names among .*, got 'nope'"),
    ],
)  # fmt: skip
def test_bad_input(unchanged, change, error, message):
    """Refused when the Pruner is made, not in the middle of the training."""
    model = make_model()
    with unchanged(model), pytest.raises(error, match=message):
        make(model, **change)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.BatchNorm1d(2)])
def test_bad_model(model):
    with pytest.raises(ValueError, match="model: expected"):
        make(model)


@pytest.mark.parametrize(("time", "error"), [("a", TypeError), (True, TypeError), (math.nan, ValueError)])
def test_bad_time(unchanged, time, error):
    model = make_model()
    pruner = make(model)
    with unchanged(model), pytest.raises(error, match=r"time: expected a .*number.*, got"):
        pruner.step(time)


def test_a_parameter_that_has_another_shape_now():
    model = make_model()
    pruner = make(model)
    pruner.step(8)
    model[0].weight = nn.Parameter(torch.ones(12, 6))
    with pytest.raises(ValueError, match=r"model: expected '0.weight' of shape \[10, 6\], as before, got \[12, 6\]"):
        pruner.step(9)
