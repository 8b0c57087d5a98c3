"""Cholesky factors of the blocks."""

import oracle
import pytest
import torch
from oracle import BACKENDS, DAMPINGS, KINDS, SHAPES, TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reproduces_the_small_matrix(shape, kind, backend):
    m, d, block_size = shape
    s = min(m, block_size, d)
    for damping in DAMPINGS:
        grads = oracle.gradients(m, d, kind)
        factor = BACKENDS[backend].block_factor(grads, damping, block_size)
        assert factor.shape == (-(-d // block_size), s, s) and factor.dtype == torch.float64
        for l, start in zip(factor, range(0, d, block_size), strict=True):
            g = grads[:, start : start + block_size].double()
            a = (g @ g.T if m < g.shape[1] else g.T @ g) + m * damping * torch.eye(min(g.shape)).double()
            n = len(a)
            assert torch.equal(l, l.tril()) and not l[n:].any() and (l.diagonal()[:n] > 0).all()
            assert oracle.error((l @ l.T)[:n, :n], a) < TOLERANCE["factor"]


@pytest.mark.parametrize("order", [1, 2, 11, 12, 13, 47, 48, 49, 97, 200])
def test_orders_around_the_tiles(order):
    """Every remainder of panel, row group and Cholesky step."""
    grads = oracle.gradients(order, order + 3)
    l = BACKENDS["compiled"].block_factor(grads, 1e-4, order + 3)[0]
    expected = grads.double() @ grads.double().T + order * 1e-4 * torch.eye(order).double()
    assert oracle.error(l @ l.T, expected) < TOLERANCE["factor"]
