"""Pruner.hold: masks of others that an update goes on from."""

import pytest
import torch
from torch import nn

from mfac import Pruner


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_of_another_pruner_are_gone_on_from(scope):
    """An update starts from them, counts them, and keeps them; none is made if they hold enough."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    data = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(8)]
    first = Pruner(model, sparsity=0.5, end=1, criterion="magnitude", scope=scope)
    first.step(1)
    settings = {"num_grads": 8, "recomputations": 4, "scope": scope, "progress": False}
    for sparsity, updates in ((0.75, 1), (0.5, 0)):
        pruner = Pruner(model, data, nn.functional.mse_loss, sparsity=sparsity, end=1, **settings)
        assert (pruner.due(-1), pruner.due(0)) == (False, True)
        pruner.hold(first.masks)
        assert pruner.sparsity == 0.5
        pruner.step(1)
        assert (len(pruner.results), pruner.sparsity, pruner.finished) == (updates, sparsity, True)
        assert not any(bool((mask & ~first.masks[name]).any()) for name, mask in pruner.masks.items())


def test_masks_to_hold_that_do_not_fit_are_refused():
    model = nn.Linear(4, 2)
    pruner = Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
    with pytest.raises(ValueError, match=r"masks\['weight'\]: expected bool of shape \[2, 4\]"):
        pruner.hold({"weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="masks: expected names among weight, got 'bias'"):
        pruner.hold({"bias": torch.ones(2, dtype=torch.bool)})
    pruner.hold({"weight": torch.ones(2, 4, dtype=torch.bool)})  # none pruned: nothing is held
    assert pruner.masks == {}


def test_a_missing_group_is_pruned():
    """Weights that are held leave one group of 2:4 to prune: half of that is not within its rounding."""
    kept = torch.tensor([[True, True, False, False] * 15 + [True] * 4])
    model = nn.Linear(64, 1)
    pruner = Pruner(model, sparsity=0.5, end=1, criterion="magnitude", pattern="2:4")
    pruner.hold({"weight": kept})
    pruner.step()
    assert pruner.finished and pruner.sparsity == 0.5
    assert ((model.weight[0].view(16, 4) != 0).sum(1) == 2).all()
