"""Types of layers and the axes of their weights."""

import sys
import types

import oracle
import pytest
import torch
from torch import nn

import mfac
from mfac import prunable_parameters
from mfac.model import layers
from mfac.model.layers import Axes, register_layer


@pytest.fixture
def conv1d(monkeypatch):
    """The Conv1D of GPT-2, weight [in, out]; transformers itself is not needed."""

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return Conv1D


@pytest.mark.parametrize(
    ("layer", "name", "shape", "axes"),
    [
        (nn.Linear(4, 3), "weight", [3, 4], Axes(0, 1)),
        (nn.Conv1d(4, 6, 3), "weight", [6, 4, 3], Axes(0, 1)),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", [6, 2, 3, 3], Axes(0, 1, 2)),
        (nn.Conv3d(4, 6, 1), "weight", [6, 4, 1, 1, 1], Axes(0, 1)),
        (nn.ConvTranspose1d(4, 6, 3), "weight", [4, 6, 3], Axes(1, 0)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", [4, 3, 3, 3], Axes(1, 0, 2)),
        (nn.ConvTranspose3d(4, 6, 1), "weight", [4, 6, 1, 1, 1], Axes(1, 0)),
    ],
    ids=str,
)
def test_axes(layer, name, shape, axes):
    target = prunable_parameters(layer).targets[name]
    assert (target.name, target.parameter, target.layer) == (name, layer.weight, type(layer).__name__)
    assert list(target.parameter.shape) == shape
    assert target.axes == axes
    assert prunable_parameters(layer, "bias").targets["bias"].axes is None


def test_multihead_attention():
    chosen = prunable_parameters(nn.MultiheadAttention(8, 2))
    assert list(chosen) == ["in_proj_weight", "out_proj.weight"]
    assert {target.axes for target in chosen.targets.values()} == {Axes(0, 1)}
    chosen = prunable_parameters(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    assert list(chosen) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert chosen.targets["k_proj_weight"].axes == Axes(0, 1)


def test_conv1d_of_transformers(conv1d):
    model = nn.Sequential(conv1d(6, 8), nn.ReLU(), nn.Linear(6, 3))
    chosen = prunable_parameters(model)
    assert list(chosen) == ["0.weight", "2.weight"]
    assert (chosen.targets["0.weight"].layer, chosen.targets["0.weight"].axes) == ("Conv1D", Axes(1, 0))
    mask = mfac.prune_step(model, oracle.gradients(20, 48 + 18), pattern="2:4").masks["0.weight"]
    assert (mask.view(2, 4, 6).sum(1) == 2).all()  # along the inputs, down a column


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2), nn.GRUCell(4, 3), nn.RNN(4, 3)])
def test_recurrent_layers(layer):
    weights = [name for name, _ in layer.named_parameters() if "weight" in name]
    with pytest.raises(
        ValueError, match=r"left out \(weight_ih.*pruned only if named in params\); name them in params"
    ):
        prunable_parameters(layer)
    model = nn.ModuleDict({"recurrent": layer, "head": nn.Linear(3, 2)})
    chosen = prunable_parameters(model)
    assert list(chosen) == ["head.weight"]
    assert list(chosen.left_out) == [f"recurrent.{name}" for name in weights]
    chosen = prunable_parameters(layer, "re:weight")
    assert list(chosen) == weights
    assert {(target.layer, target.axes) for target in chosen.targets.values()} == {(type(layer).__name__, Axes(0, 1))}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(layers, "_TYPES", dict(layers._TYPES))


class Table(nn.Module):
    """[in, out], and the weight may be missing."""

    def __init__(self, table=True):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 3)) if table else None


class Subtable(Table):
    pass


class Scaled(nn.Linear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = nn.Parameter(torch.randn(2, 2))


def test_registered_layers(registry):
    model = nn.Sequential(Table(), Subtable(), Table(None), nn.Linear(3, 2))
    assert list(prunable_parameters(model)) == ["3.weight"]
    register_layer(Table, "table", outputs=1, inputs=0)
    chosen = prunable_parameters(model)
    assert list(chosen) == ["0.table", "1.table", "3.weight"]
    assert [(t.layer, t.axes) for t in chosen.targets.values()][:2] == [("Table", Axes(1, 0)), ("Subtable", Axes(1, 0))]
    register_layer(Subtable, "table")  # the most derived counts
    assert [t.axes for t in prunable_parameters(model).targets.values()] == [Axes(1, 0), Axes(0, 1), Axes(0, 1)]
    register_layer(Table, "table", outputs=0, inputs=1)  # replaced
    assert prunable_parameters(model).targets["0.table"].axes == Axes(0, 1)
    assert list(prunable_parameters(Scaled(3, 2))) == ["weight"]
    register_layer(Scaled, "scale")
    assert list(prunable_parameters(Scaled(3, 2))) == ["scale"]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((dict,), {}, TypeError, "cls: expected a subclass of torch.nn.Module, got <class 'dict'>"),
        ((nn.Linear(2, 2),), {}, TypeError, r"cls: expected a subclass of torch.nn.Module, got Linear\("),
        ((Table, 3), {}, TypeError, "weight: expected the name of an attribute, got 3"),
        ((Table,), {"outputs": 1}, ValueError, "inputs: expected another axis than that of the outputs, got 1"),
        ((Table,), {"outputs": -1}, ValueError, "outputs: expected an int >= 0, got -1"),
        ((Table,), {"inputs": -1}, ValueError, "inputs: expected an int >= 0, got -1"),
        ((Table,), {"inputs": 1.0}, TypeError, "inputs: expected an int, got 1.0"),
    ],
)
def test_bad_registrations(registry, arguments, options, error, message):
    before = dict(layers._TYPES)
    with pytest.raises(error, match=message):
        register_layer(*arguments, **options)
    assert before == layers._TYPES
