"""Diagonal of the inverse Fisher: the published recursion, the reference, the kernel.

Floor: m B d flops for the lower triangle of the Gram matrix and as many for the triangular solve, one read of G.
"""

import pytest
import torch

from mfac import ops, reference

WAYS = {
    "textbook recursion": reference.recursion_inverse_diagonal,
    "reference": reference.inverse_diagonal,
    "compiled": ops.inverse_diagonal,
}
DAMPING = 1e-5


@pytest.fixture(scope="module")
def grads():
    return torch.randn(256, 200_000, generator=torch.Generator().manual_seed(0)) * 0.01


@pytest.mark.benchmark(group="inverse diagonal, m=256, B=2000, d=200,000")
@pytest.mark.parametrize("way", WAYS)
def test_inverse_diagonal(measure, grads, way):
    m, d, block_size = *grads.shape, 2000
    head = grads[:, : 2 * block_size]
    exact = reference.recursion_inverse_diagonal(head.double(), DAMPING, block_size)
    error = float((WAYS[way](head, DAMPING, block_size) / exact - 1).abs().max())
    measure(
        lambda: WAYS[way](grads, DAMPING, block_size),
        flops=2 * m * m * d, bytes=4 * m * d, error=error, rounds=3, m=m, d=d, B=block_size,
    )  # fmt: skip
