"""Inverse-Fisher-vector products."""

import oracle
import pytest
import torch
from oracle import BACKENDS, DAMPINGS, KINDS, SHAPES, TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense(shape, kind, backend):
    m, d, block_size = shape
    kernels = BACKENDS[backend]
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(1))
    for damping in DAMPINGS:
        for scale in (1e-3, 1.0):
            grads = oracle.gradients(m, d, kind, scale)
            dense = oracle.fisher(grads, damping, block_size)
            if not oracle.well_posed(dense):
                continue
            exact = x.double() @ oracle.inverse(dense)
            factor = kernels.block_factor(grads, damping, block_size)
            out = kernels.inverse_product(grads, factor, x, damping, block_size)
            assert oracle.error(out, exact) < TOLERANCE["product"], (damping, scale)
            assert oracle.error(kernels.inverse_product(grads, factor, x[1], damping, block_size), out[1]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 100, 33), (65, 101, 50), (30, 100, 50)], ids=str)
def test_active(shape, backend):
    """With few active columns a block changes sides; factor and product agree on which."""
    m, d, block_size = shape
    kernels, grads = BACKENDS[backend], oracle.gradients(m, d)
    active = torch.arange(d) % 3 == 0
    active[-(d % block_size or block_size) :] = False
    exact = oracle.inverse(oracle.fisher(grads, 1e-3, block_size, active)) @ torch.ones(d, dtype=torch.float64)
    factor = kernels.block_factor(grads, 1e-3, block_size, active)
    out = kernels.inverse_product(grads, factor, torch.ones(d), 1e-3, block_size, active)
    assert oracle.error(out, exact) < TOLERANCE["product"]


def test_wrong_factor():
    grads = torch.randn(4, 10)
    expected = r"factor: expected float64 of shape \[2, 4, 4\], got Double of shape \[1, 4, 4\]"
    with pytest.raises(ValueError, match=expected):
        BACKENDS["compiled"].inverse_product(grads, torch.zeros(1, 4, 4).double(), torch.ones(10), 1e-3, 5)
