"""Inverse-Fisher-vector products with the factors at hand, of one vector and of eight.

Floor: 4 m d flops each, one read of G.
"""

import pytest
import torch
from conftest import DAMPING, B

from mfac.ops import compiled as ops
from mfac.ops import reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.fixture(scope="module")
def factor(grads):
    return ops.block_factor(grads, DAMPING, B)


@pytest.mark.parametrize(
    ("k", "way"),
    [
        pytest.param(k, way, id=way, marks=pytest.mark.benchmark(group=f"inverse product, vectors: {k}"))
        for k in (1, 8)
        for way in WAYS
    ],
)
def test_inverse_product(measure, grads, factor, k, way):
    (m, d), x = grads.shape, torch.linspace(-1, 1, k * grads.shape[1]).view(k, -1)
    g = grads[:, :B].double()
    exact = torch.linalg.solve(g.T @ g / m + DAMPING * torch.eye(B).double(), x[:, :B].double().T).T
    out = WAYS[way].inverse_product(grads, factor, x, DAMPING, B)[:, :B]
    measure(
        lambda: WAYS[way].inverse_product(grads, factor, x, DAMPING, B),
        flops=4 * m * d * k, bytes=4 * m * d, error=float((out - exact).norm() / exact.norm()),
        by=way, targets={"reads": 1.6} if way == "compiled" and k == 1 else {},
    )  # fmt: skip
