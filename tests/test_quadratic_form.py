"""Predicted loss increase of a step."""

import oracle
import pytest
import torch
from oracle import BACKENDS, KINDS, SHAPES, TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense(shape, kind, backend):
    m, d, block_size = shape
    grads, x = oracle.gradients(m, d, kind), torch.randn(d)
    exact = 0.5 * x.double() @ oracle.fisher(grads, 1e-4, block_size) @ x.double()
    out = BACKENDS[backend].quadratic_form(grads, x, 1e-4, block_size)
    assert out.dtype == torch.float64 and out.shape == ()
    assert abs(float(out / exact) - 1) < TOLERANCE["form"]
    assert float(BACKENDS[backend].quadratic_form(grads, torch.zeros(d), 1e-4, block_size)) == 0
