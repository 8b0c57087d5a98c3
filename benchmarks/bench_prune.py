"""A whole prune_step to 80 % on one layer of a million weights.

Floor: 2 m² d flops for the inverse diagonal, m² for each surviving weight in the joint update, one read of G for each.
"""

import pytest
import torch

import mfac
from mfac import ops


@pytest.mark.benchmark(group="prune_step to 80 %, m=256, B=2000, d=1,000,000")
@pytest.mark.parametrize("update", ["joint", "independent"])
def test_prune_step(measure, update):
    ops.load()
    m, d, sparsity = 256, 1_000_000, 0.8
    model, grads = torch.nn.Linear(1000, 1000, bias=False), torch.randn(m, d) * 0.01
    update_flops = m * m * d * ((1 - sparsity) if update == "joint" else 1)
    measure(
        lambda: mfac.prune_step(model, grads, sparsity, update=update),
        flops=2 * m * m * d + update_flops, bytes=2 * 4 * m * d, rounds=3, m=m, d=d, B=2000,
    )  # fmt: skip
