"""One inverse-Fisher-vector product with the factors at hand. Floor: 4 m d flops, one read of G."""

import pytest
import torch
from conftest import DAMPING, B

from mfac import ops, reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.fixture(scope="module")
def factor(grads):
    return ops.block_factor(grads, DAMPING, B)


@pytest.mark.benchmark(group="inverse product")
@pytest.mark.parametrize("way", WAYS)
def test_inverse_product(measure, grads, factor, way):
    (m, d), x = grads.shape, torch.linspace(-1, 1, grads.shape[1])
    g = grads[:, :B].double()
    exact = torch.linalg.solve(g.T @ g / m + DAMPING * torch.eye(B).double(), x[:B].double())
    out = WAYS[way].inverse_product(grads, factor, x, DAMPING, B)[:B]
    measure(
        lambda: WAYS[way].inverse_product(grads, factor, x, DAMPING, B),
        flops=4 * m * d, bytes=4 * m * d, error=float((out - exact).norm() / exact.norm()), m=m, d=d, B=B,
    )  # fmt: skip
