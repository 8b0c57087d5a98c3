"""Choice of the parameters to prune."""

import pytest
from torch import nn

from mfac import prunable_parameters


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.head = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


WEIGHTS = ["conv1.weight", "conv2.weight", "conv3.weight", "head.0.weight", "head.2.weight"]


@pytest.fixture
def model():
    return Everything()


def test_default(model):
    chosen = prunable_parameters(model)
    assert list(chosen) == WEIGHTS
    assert chosen["head.2.weight"] is model.head[2].weight


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("__ALL_PRUNABLE__", WEIGHTS),
        ("head.0.weight", ["head.0.weight"]),
        (["head.2.weight", "conv1.bias", "head.2.weight"], ["conv1.bias", "head.2.weight"]),  # order of the model, once
        ("re:head", ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]),
        ("re:.*[.]weight$", ["embedding.weight", *WEIGHTS[:2], "norm.weight", *WEIGHTS[2:]]),
        (["re:norm", "__ALL_PRUNABLE__"], [*WEIGHTS[:2], "norm.weight", "norm.bias", *WEIGHTS[2:]]),
        ((name for name in WEIGHTS[:1]), WEIGHTS[:1]),
    ],
)
def test_by_name(model, params, names):
    assert list(prunable_parameters(model, params)) == names


def test_all(model):
    assert list(prunable_parameters(model, "__ALL__")) == [name for name, _ in model.named_parameters()]


def test_tied_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(prunable_parameters(model)) == ["0.weight"]
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5)
    head.weight = embedding.weight
    assert list(prunable_parameters(nn.Sequential(embedding, head))) == ["0.weight"]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("head", ValueError, "params: 'head' matches no parameter of the model, which has embedding.weight.*more"),
        ("re:weight", ValueError, "params: 're:weight' matches no parameter"),  # from the start, not anywhere
        (["conv1.weight", "nope"], ValueError, "params: 'nope' matches no parameter"),
        ([], ValueError, "params: expected at least one name"),
        ("re:(", ValueError, r"params: 're:\(' is not a regular expression"),
        ([3], TypeError, "params: expected names of parameters, got 3"),
        ([["conv1.weight"]], TypeError, "params: expected names of parameters"),
        (7, TypeError, "params: expected names of parameters or None, got 7"),
    ],
)
def test_bad_params(model, params, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(model, params)


@pytest.mark.parametrize(
    ("model", "params", "error", "message"),
    [
        (nn.ReLU(), None, ValueError, "model: expected a module with parameters"),
        (nn.ReLU(), "__ALL__", ValueError, "model: expected a module with parameters"),
        (nn.BatchNorm1d(3), None, ValueError, "model: expected at least one Linear or ConvNd layer"),
        (nn.BatchNorm1d(3), "__ALL_PRUNABLE__", ValueError, "'__ALL_PRUNABLE__' matches no parameter"),
        ({"weight": 1}, None, TypeError, "model: expected a torch.nn.Module, got dict"),
    ],
)
def test_bad_model(model, params, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(model, params)
