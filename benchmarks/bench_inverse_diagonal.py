"""Diagonal of the inverse Fisher: the published recursion, the reference, the kernel.

Floor: m B d flops for the lower triangle of the Gram matrix and as many for the triangular solve, one read of G.
"""

import pytest
from conftest import DAMPING, B

from mfac import ops, reference

WAYS = {
    "textbook recursion": reference.recursion_inverse_diagonal,
    "reference": reference.inverse_diagonal,
    "compiled": ops.inverse_diagonal,
}


@pytest.fixture(scope="module")
def exact(grads):
    """The first two blocks in float64, by the recursion."""
    return reference.recursion_inverse_diagonal(grads[:, : 2 * B].double(), DAMPING, B)


@pytest.mark.benchmark(group="inverse diagonal")
@pytest.mark.parametrize("way", WAYS)
def test_inverse_diagonal(measure, grads, exact, way):
    m, d = grads.shape
    error = float((WAYS[way](grads[:, : 2 * B], DAMPING, B) / exact - 1).abs().max())
    measure(lambda: WAYS[way](grads, DAMPING, B), flops=2 * m * m * d, bytes=4 * m * d, error=error, m=m, d=d, B=B)
