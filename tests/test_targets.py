"""Choice of the parameters to prune."""

import copy
import logging

import pytest
import torch
from torch import nn

import mfac
from mfac import prunable_parameters
from mfac.model import targets
from mfac.model.layers import Axes


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


def test_memory_that_two_parameters_share():
    """They would be pruned one after the other; parameters that lie side by side in one tensor do not share any."""
    state = nn.Linear(3, 3).state_dict()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 3))
    for layer in (model[0], model[2]):
        layer.load_state_dict(state, assign=True)
    message = "expected parameters with memory of their own, got '0.weight' and '2.weight', which share it"
    for params in (None, "2.weight"):
        with pytest.raises(ValueError, match=message):
            prunable_parameters(model, params)
    assert list(prunable_parameters(model, "1.weight")) == ["1.weight"]
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    assert list(prunable_parameters(model)) == ["0.weight", "1.weight"]
    flat, begin = torch.randn(100), 0
    for p in model.parameters():
        p.data, begin = flat[begin : begin + p.numel()].view_as(p), begin + p.numel()
    assert list(prunable_parameters(model)) == ["0.weight", "1.weight"]
    model[1].weight.data = flat[8:14].view(2, 3)  # the last number of the first weight
    with pytest.raises(ValueError, match=r"got '0.weight' and '1.weight', which share it"):
        prunable_parameters(model, "1.weight")


def test_tied_layers_with_other_axes():
    model = nn.Sequential(nn.Linear(3, 3), nn.ConvTranspose1d(3, 3, 1), nn.Linear(3, 3))
    assert prunable_parameters(model).targets["1.weight"].axes == Axes(1, 0)
    shared = nn.Parameter(torch.randn(3, 3, 1))
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ConvTranspose1d(3, 3, 1), nn.Conv1d(3, 3, 1))
    for layer in model:
        layer.weight = shared
    assert prunable_parameters(model).targets["0.weight"].axes is None


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("head", ValueError, "params: expected names among embedding.weight.*more.*, got 'head', which matches none"),
        ("re:weight", ValueError, "params: expected names among .*, got 're:weight'"),  # from the start, not anywhere
        (["conv1.weight", "nope"], ValueError, "params: expected names among .*, got 'nope'"),
        ([], ValueError, "params: expected at least one name"),
        ("re:(", ValueError, r"params: expected a regular expression after re:, got 're:\('"),
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
        (nn.BatchNorm1d(3), "__ALL_PRUNABLE__", ValueError, "model: expected at least one .* mfac.register_layer"),
        ({"weight": 1}, None, TypeError, "model: expected a torch.nn.Module, got dict"),
    ],
)
def test_bad_model(model, params, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(model, params)


def test_frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    for params in (None, "__ALL_PRUNABLE__"):
        chosen = prunable_parameters(model, params)
        assert list(chosen) == ["1.weight"]
        assert chosen.left_out == {"0.weight": "frozen (requires_grad is False)"}
    for params in (["0.weight", "1.weight"], "re:.*weight", ["0.weight", "__ALL_PRUNABLE__"]):
        chosen = prunable_parameters(model, params)
        assert list(chosen) == ["0.weight", "1.weight"]
        assert chosen.left_out == {}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"left out \(0.weight, 1.weight: frozen .*\); name them in params"):
        prunable_parameters(model)
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(8)]
    result = mfac.prune(model, batches, nn.functional.mse_loss, 0.5, params="0.weight", num_grads=8, progress=False)
    assert (list(result.masks), result.sparsity) == (["0.weight"], 0.5)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("embedding", [nn.Embedding(8, 4), nn.EmbeddingBag(8, 4)])
def test_tied_to_an_embedding(embedding):
    model = nn.ModuleDict({"embedding": embedding, "middle": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
    model["head"].weight = embedding.weight
    chosen = prunable_parameters(model)
    assert list(chosen) == ["middle.weight"]
    assert chosen.left_out == {"embedding.weight": f"tied to an {type(embedding).__name__}"}
    for params in ("embedding.weight", "head.weight", "re:head[.]w", "module.head.weight"):
        chosen = prunable_parameters(model, params)
        assert list(chosen) in (["embedding.weight"], ["embedding.weight", "head.bias"])
        assert chosen.targets["embedding.weight"].axes == Axes(0, 1)  # of the Linear
    assert prunable_parameters(model, "__ALL__").targets["embedding.weight"].layer == "Linear"
    with pytest.raises(ValueError, match=r"left out \(embedding.weight: tied to an Embedding"):
        prunable_parameters(nn.ModuleDict({name: model[name] for name in ("embedding", "head")}))


def test_exclude(model):
    assert list(prunable_parameters(model, exclude="re:conv")) == WEIGHTS[3:]
    assert list(prunable_parameters(model, "re:head", exclude=["re:.*bias", "head.0.weight"])) == ["head.2.weight"]
    chosen = prunable_parameters(model, "__ALL__", exclude=["__ALL_PRUNABLE__"])
    assert list(chosen)[:3] == ["embedding.weight", "conv1.bias", "norm.weight"]
    assert list(chosen.left_out) == WEIGHTS
    assert list(prunable_parameters(model, exclude="norm.bias")) == WEIGHTS  # not chosen anyway
    assert list(prunable_parameters(nn.DataParallel(model), exclude="module.conv1.weight")) == WEIGHTS[1:]


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("conv", ValueError, "exclude: expected names among .*, got 'conv'"),
        ("re:(", ValueError, "exclude: expected a regular expression"),
        (7, TypeError, "exclude: expected names of parameters or None, got 7"),
        ([7], TypeError, "exclude: expected names of parameters, got 7"),
        ("re:.*weight", ValueError, "exclude: expected to leave at least one parameter, got all of conv1.weight, "),
    ],
)
def test_bad_exclude(model, exclude, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(model, exclude=exclude)


def test_lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"model: expected initialised parameters, got '0.weight' uninitialised; run"):
        prunable_parameters(model)
    assert list(prunable_parameters(model, "2.weight")) == ["2.weight"]
    assert list(prunable_parameters(model, exclude="0.weight")) == ["2.weight"]
    model(torch.randn(2, 4))
    assert list(prunable_parameters(model)) == ["0.weight", "2.weight"]


def test_table():
    model = nn.ModuleDict({"embedding": nn.Embedding(1000, 4), "first": nn.Linear(4, 4), "head": nn.Linear(4, 1000)})
    model["head"].weight = model["embedding"].weight
    assert str(prunable_parameters(model)).splitlines() == [
        "name          layer   shape   weights",
        "first.weight  Linear  [4, 4]       16",
        "total                              16",
        "left out:",
        "  embedding.weight: tied to an Embedding",
    ]
    assert str(prunable_parameters(model, ["head.weight", "head.bias", "first.weight"])).splitlines() == [
        "name              layer   shape      weights",
        "embedding.weight  Linear  [1000, 4]    4,000",
        "first.weight      Linear  [4, 4]          16",
        "head.bias         Linear  [1000]       1,000",
        "total                                  5,016",
    ]


def test_logged_once(caplog):
    targets._log_once.cache_clear()
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.Linear(4, 6), nn.Linear(4, 2))
    with caplog.at_level(logging.INFO, "mfac"):
        prunable_parameters(model)
        assert not caplog.records
        model[1].requires_grad_(False)
        model[2].weight = model[0].weight
        for _ in range(2):
            prunable_parameters(model)
        text = "not pruned: 0.weight: tied to an Embedding; 1.weight: frozen (requires_grad is False)"
        assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
            ("mfac", "INFO", text)
        ]
        prunable_parameters(model, exclude="1.bias")
        assert len(caplog.records) == 1
        prunable_parameters(model[1:3])
        assert len(caplog.records) == 2


def test_copies():
    """What is returned is a dict like any other, with its own targets in a deep copy."""
    chosen = prunable_parameters(nn.Linear(4, 3))
    assert chosen == {"weight": chosen["weight"]}
    copied = copy.deepcopy(chosen)
    assert copied["weight"] is copied.targets["weight"].parameter is not chosen["weight"]
    assert mfac.GradientBuffer(2, chosen).names == ["weight"]
