"""Weights under weight norm, spectral norm, torch's own pruning and other parametrizations."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mfac
from mfac import prunable_parameters
from mfac.model.layers import Axes

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
