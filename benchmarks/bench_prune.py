"""A whole prune_step to 80 % on one layer of a million weights.

Floor: 2 m² flops per weight for the inverse diagonal; m² more per surviving weight for the joint update, per weight for
the independent one; one read of G for each of the two.
"""

import pytest
import torch

import mfac


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(1000, 1000, bias=False), torch.randn(256, 1_000_000) * 0.01


@pytest.mark.benchmark(group="prune_step of a million weights to 80 %")
@pytest.mark.parametrize("update", ["joint", "independent"])
def test_prune_step(measure, layer, update):
    """The error is that of the sparsity."""
    (model, grads), sparsity = layer, 0.8
    (m, d), dense = grads.shape, model.weight.detach().clone()

    def restore():
        model.load_state_dict({"weight": dense})

    result = mfac.prune_step(model, grads, sparsity, update=update)
    measure(
        lambda: mfac.prune_step(model, grads, sparsity, update=update), setup=restore,
        flops=2 * m * m * d + m * m * d * (1 - sparsity if update == "joint" else 1), bytes=2 * 4 * m * d,
        error=abs(result.sparsity - sparsity), m=m, d=d, B=2000,
    )  # fmt: skip
    restore()
