"""Choice of the parameters to prune."""

import copy
import logging
import sys
import types

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mfac
from mfac import prunable_parameters
from mfac.model import layers, targets
from mfac.model.layers import Axes, register_layer


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
        ("head", ValueError, "params: 'head' matches no parameter of the model, which has embedding.weight.*more"),
        ("re:weight", ValueError, "params: 're:weight' matches no parameter"),  # from the start, not anywhere
        (["conv1.weight", "nope"], ValueError, "params: 'nope' matches no parameter"),
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


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(layers, "_TYPES", dict(layers._TYPES))


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
        ("conv", ValueError, "exclude: 'conv' matches no parameter of the model"),
        ("re:(", ValueError, "exclude: expected a regular expression"),
        (7, TypeError, "exclude: expected names of parameters or None, got 7"),
        ([7], TypeError, "exclude: expected names of parameters, got 7"),
        ("re:.*weight", ValueError, "exclude: expected to leave at least one parameter, got all of conv1.weight, "),
    ],
)
def test_bad_exclude(model, exclude, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(model, exclude=exclude)


REPARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, "0.parametrizations.weight.original1"),
    "weight_norm, old": (nn.utils.weight_norm, "0.weight_v"),
    "spectral_norm": (parametrizations.spectral_norm, "0.parametrizations.weight.original"),
    "spectral_norm, old": (nn.utils.spectral_norm, "0.weight_orig"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrized(kind):
    wrap, name = REPARAMETRIZED[kind]
    model = nn.Sequential(wrap(nn.Linear(8, 4)), nn.ReLU(), nn.Linear(4, 2))
    for params in (None, ["0.weight", "2.weight"], ["module.0.weight", "2.weight"], [name, "2.weight"]):
        chosen = prunable_parameters(model, params)
        assert list(chosen) == [name, "2.weight"]
        assert (chosen.targets[name].layer, chosen.targets[name].axes) == ("Linear", Axes(0, 1))
    assert list(prunable_parameters(model, exclude="0.weight")) == ["2.weight"]
    batches = [(torch.randn(8, 8), torch.randn(8, 2)) for _ in range(8)]
    mask = mfac.prune(model, batches, nn.functional.mse_loss, 0.5, pattern="2:4", num_grads=8, progress=False).masks
    model(batches[0][0])  # an old hook sets the weight
    assert torch.equal(model[0].weight != 0, mask[name])
    assert (mask[name].view(4, 2, 4).sum(2) == 2).all()
    (target,) = prunable_parameters(wrap(nn.ConvTranspose1d(8, 4, 3, groups=2))).targets.values()
    assert (target.layer, target.axes) == ("ConvTranspose1d", Axes(1, 0, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize(
    ("dim", "zero", "refused"),
    [(0, (0, ...), True), (1, (..., 0), True), (None, (...,), True), (0, (..., 0), False), (1, (0, ...), False)],
)
def test_nothing_is_divided_by_a_norm_of_zero(norm, dim, zero, refused):
    layer = norm(nn.Linear(3, 2), dim=dim)
    ((name, weight),) = prunable_parameters(layer).items()
    masks = {name: torch.ones(2, 3, dtype=torch.bool)}
    masks[name][zero] = False
    before, sparsity = weight.detach().clone(), float((~masks[name]).float().mean())
    if refused:
        with pytest.raises(RuntimeError, match=f"update: expected weights whose norms are not zero, got '{name}' with"):
            mfac.prune_step(layer, None, sparsity, masks=masks, criterion="magnitude")
        assert torch.equal(weight, before)
    else:
        mfac.prune_step(layer, None, sparsity, masks=masks, criterion="magnitude")
        assert layer(torch.randn(4, 3)).isfinite().all()


def test_reparametrized_recurrent_layer():
    layer = parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    chosen = prunable_parameters(layer, "re:(weight|parametrizations.*original1)")
    assert {name: target.axes for name, target in chosen.targets.items()} == dict.fromkeys(
        ["weight_ih_l0", "parametrizations.weight_hh_l0.original1"], Axes(0, 1)
    )
    assert list(prunable_parameters(layer, "weight_hh_l0")) == ["parametrizations.weight_hh_l0.original1"]


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def masked_weight_norm(layer):
    prune.random_unstructured(nn.utils.weight_norm(layer), "weight_v", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("change", "original", "message"),
    [
        (masked_weight_norm, "0.weight_v_orig", r"weight(_v)? of the Linear is masked by torch.nn.utils.prune"),
        (
            lambda layer: prune.random_unstructured(layer, "weight", 0.5),
            "0.weight_orig",
            "got '0.weight_orig': weight of the Linear is masked by torch.nn.utils.prune; call "
            r"torch.nn.utils.prune.remove\(layer, 'weight'\) first, then pass masks=\"nonzero\"",
        ),
        (
            lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
            "0.parametrizations.weight.original",
            "weight of the Linear is parametrized by Symmetric, which may not keep zeros; leave it out with exclude=",
        ),
        (
            lambda layer: parametrize.register_parametrization(
                parametrizations.spectral_norm(layer), "weight", Symmetric()
            ),
            "0.parametrizations.weight.original",
            "parametrized by _SpectralNorm, Symmetric, which",
        ),
    ],
    ids=["torch prune of weight norm", "torch prune", "own", "two"],
)
def test_refused(change, original, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    change(model[0])
    for params in (None, "__ALL__", original, "0.weight"):
        with pytest.raises(ValueError, match="model: expected parameters that can be pruned.*" + message):
            prunable_parameters(model, params)
    assert list(prunable_parameters(model, "1.weight")) == ["1.weight"]
    for exclude in (original, "0.weight", "re:0"):
        assert list(prunable_parameters(model, exclude=exclude)) == ["1.weight"]


def test_torch_prune_removed():
    layer = nn.Linear(4, 4)
    prune.random_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    assert list(prunable_parameters(layer)) == ["weight"]


def test_lazy():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"model: expected initialised parameters, got '0.weight' uninitialised; run"):
        prunable_parameters(model)
    assert list(prunable_parameters(model, "2.weight")) == ["2.weight"]
    assert list(prunable_parameters(model, exclude="0.weight")) == ["2.weight"]
    model(torch.randn(2, 4))
    assert list(prunable_parameters(model)) == ["0.weight", "2.weight"]


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
