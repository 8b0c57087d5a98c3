"""Canonical names, and what may be written for them."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import mfac
from mfac.model.names import NameTable, named_parameters


def two_layers():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))


NAMES = ["0.weight", "0.bias", "1.weight"]


class DistributedDataParallel(nn.Module):  # by its name, as torch's own needs a process group
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Holder(nn.Module):
    """Has an attribute `module` without being a wrapper."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "plain": lambda model: model,
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "several": lambda model: AveragedModel(nn.DataParallel(torch.compile(model))),
    "compiled layer": lambda model: nn.Sequential(torch.compile(model[0]), model[1]),
    "checkpointed layer": lambda model: nn.Sequential(checkpoint_wrapper(model[0]), torch.compile(model[1])),
    "compiled checkpoint": lambda model: torch.compile(nn.Sequential(checkpoint_wrapper(model[0]), model[1])),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_canonical(wrapper):
    model = WRAPPERS[wrapper](two_layers())
    named, raw = named_parameters(model), dict(model.named_parameters())
    assert list(named) == NAMES
    assert all(a is b for a, b in zip(named.values(), raw.values(), strict=True))
    table = NameTable.of_model(model)
    for name, written in zip(named, raw, strict=True):
        assert table.find(name) == table.find(written) == table.find(f"module.{name}") == [name]
        assert table.find(f"module._orig_mod.{name}") == [name]  # of another wrapper
    assert table.find("re:0") == table.find("re:module[.]0") == NAMES[:2]
    assert table.find("2.weight") == table.find("re:2") == []


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "DistributedDataParallel"])
def test_pruned_through_wrappers(wrapper):
    """The same masks whatever the model is wrapped in, under the same names."""
    torch.manual_seed(0)
    model = two_layers()
    expected = mfac.prune_step(model, torch.randn(8, 18, generator=torch.Generator().manual_seed(1)), 0.5).masks
    torch.manual_seed(0)
    model = WRAPPERS[wrapper](two_layers())
    masks = mfac.prune_step(model, torch.randn(8, 18, generator=torch.Generator().manual_seed(1)), 0.5).masks
    assert list(masks) == list(expected) == ["0.weight", "1.weight"]
    assert all(torch.equal(masks[name].cpu(), expected[name]) for name in masks)
    assert all(torch.equal(named_parameters(model)[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "checkpointed layer"])
def test_training_loop_in_a_wrapper(wrapper):
    """A buffer that is made from the plain model is fed by the wrapped one, and the Pruner holds its masks."""
    plain = two_layers()
    buffer = mfac.GradientBuffer(4, mfac.prunable_parameters(plain))
    model = WRAPPERS[wrapper](plain)
    pruner = mfac.Pruner(model, sparsity=0.5, buffer=buffer, start=1, end=3)
    for step in range(4):
        model.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        assert buffer.append(model)
        pruner.step(step)
    assert list(pruner.masks) == ["0.weight", "1.weight"] and pruner.sparsity == 0.5
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
    pruner.apply_masks()
    assert all(torch.equal(named_parameters(model)[name] == 1, mask) for name, mask in pruner.masks.items())


def test_an_attribute_called_module():
    model = Holder(two_layers())
    assert list(named_parameters(model)) == [f"module.{name}" for name in NAMES]
    table = NameTable.of_model(nn.DataParallel(model))
    assert table.find("module.0.weight") == table.find("module.module.0.weight") == ["module.0.weight"]
    assert table.find("0.weight") == ["module.0.weight"]  # the only one


def test_two_that_differ_by_a_wrapper_only():
    model = nn.ModuleDict({"a": Holder(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    model["a"].weight = nn.Parameter(torch.ones(2))
    table = NameTable.of_model(model)
    assert table.find("a.weight") == ["a.weight"]
    assert table.find("a.module.weight") == ["a.module.weight"]
    assert table.find("module.a.weight") == []  # either


def test_canonical_names_that_collide():
    model = Holder(nn.Linear(2, 2, bias=False))
    model._orig_mod = nn.Module()
    model._orig_mod.module = nn.Linear(2, 2, bias=False)
    assert list(named_parameters(model)) == ["module.weight", "_orig_mod.module.weight"]


def test_aliases():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.DataParallel(nn.ModuleDict({"embedding": embedding, "head": head}))
    table = NameTable.of_model(model)
    for written in ("embedding.weight", "head.weight", "module.head.weight", "re:head", "re:module[.]head"):
        assert table.find(written) == ["embedding.weight"]


def test_a_shared_module():
    layer = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert list(named_parameters(model)) == ["0.weight"]
    assert NameTable.of_model(model).find("2.weight") == ["0.weight"]


def test_reparametrized():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.utils.spectral_norm(nn.Linear(3, 3)))
    table = NameTable.of_model(model)
    assert table.find("0.weight") == table.find("module.0.weight") == ["0.parametrizations.weight.original1"]
    assert table.find("1.weight") == ["1.weight_orig"]
    assert table.translate("masks", {"0.weight": 1, "1.weight_orig": 2}) == {
        "0.parametrizations.weight.original1": 1,
        "1.weight_orig": 2,
    }


def test_translate():
    model = two_layers()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in nn.DataParallel(model).named_parameters()}
    for wrapper in (WRAPPERS["plain"], WRAPPERS["several"]):
        translated = NameTable.of_model(wrapper(model)).translate("masks", masks)
        assert list(translated) == NAMES
        assert translated["0.weight"] is masks["module.0.weight"]
    assert NameTable(NAMES).translate("masks", {}) == {}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"0.weights": 1}, ValueError, "masks: expected names among 0.weight, 0.bias, 1.weight, got '0.weights'"),
        ({"re:0": 1}, ValueError, "masks: expected names among .*, got 're:0'"),
        ({3: 1}, TypeError, "masks: expected names of parameters as keys, got 3"),
        (
            {"0.weight": 1, "module.0.weight": 2},
            ValueError,
            "masks: expected one entry for '0.weight', got both '0.weight' and 'module.0.weight'",
        ),
    ],
)
def test_bad_keys(values, error, message):
    with pytest.raises(error, match=message):
        NameTable.of_model(two_layers()).translate("masks", values)


def test_without_a_model():
    names = ["a.weight", "a.bias", "b.module.weight"]
    table = NameTable(names)
    assert table.find("a.weight") == table.find("module._orig_mod.a.weight") == ["a.weight"]
    assert table.find("b.weight") == ["b.module.weight"]
    assert table.find("re:a") == table.find("re:module[.]a") == names[:2]
    assert table.find("re:.*weight$") == [names[0], names[2]]
    assert table.find("a") == table.find("re:weight") == []
    with pytest.raises(TypeError, match="sparsity: expected names of parameters, got 3"):
        table.find(3, "sparsity")
    with pytest.raises(ValueError, match=r"params: expected a regular expression after re:, got 're:\('"):
        table.find("re:(")


def test_buffers_with_names_of_the_wrapped_model():
    """They take over the canonical names at first use; a state with either names can be loaded."""
    model = nn.DataParallel(two_layers())
    params = dict(reversed(list(model.named_parameters())))
    batches = [(torch.randn(5, 4), torch.randn(5, 2)) for _ in range(4)]
    mse, options = nn.functional.mse_loss, {"progress": False}
    plain = mfac.GradientBuffer(4, dict(reversed(named_parameters(model).items())))
    expected = mfac.collect_gradients(model, batches, mse, 4, buffer=plain, **options)
    buffer = mfac.GradientBuffer(4, params)
    raw = buffer.state_dict()
    assert mfac.collect_gradients(model, batches, mse, 4, buffer=buffer, **options) is buffer
    assert torch.equal(buffer.tensor, expected.tensor) and buffer.names == NAMES[::-1] and not buffer.unreached
    again = mfac.GradientBuffer(4, params)
    again.load_state_dict(buffer.state_dict())
    assert again.names == NAMES[::-1]
    again.load_state_dict(raw)
    mse(model(batches[0][0]), batches[0][1]).backward()
    assert again.append(model) and again.names == NAMES[::-1] and not again.unreached
    with pytest.raises(ValueError, match=r"model: expected a parameter 'module.1.weight', got none of that name"):
        mfac.GradientBuffer(4, params).append(model.module[0])
    doubled = mfac.GradientBuffer(4, {"0.weight": params["module.0.weight"]} | params)
    with pytest.raises(ValueError, match=r"buffer: expected one entry per parameter, got 0.weight, module.1.weight"):
        doubled.append(model)


def test_names_that_stand_for_two():
    """The raw name of one parameter is the canonical name of another."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "module": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    assert list(mfac.prunable_parameters(model, "module.a.weight")) == ["module.a.weight"]
    wrapped = nn.DataParallel(model)
    assert list(mfac.prunable_parameters(wrapped)) == ["a.weight", "module.a.weight"]
    message = "expected names of one parameter each, got 'module.a.weight', which in the wrapped model is that of 'a.w"
    with pytest.raises(ValueError, match=f"params: {message}"):
        mfac.prunable_parameters(wrapped, ["module.a.weight"])
    with pytest.raises(ValueError, match=f"masks: {message}"):
        NameTable.of_model(wrapped).translate("masks", {"module.a.weight": 1})
    table = NameTable.of_model(wrapped)
    assert table.find("a.weight") == ["a.weight"] and table.find("module.module.a.weight") == ["module.a.weight"]
