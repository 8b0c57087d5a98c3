"""Independent update, as published."""

import oracle
import pytest
import torch
from oracle import BACKENDS, DAMPINGS, KINDS, SHAPES, TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense(shape, kind, restricted, backend):
    """w - F⁻¹u with u_i = w_i / [F⁻¹]_ii on the pruned weights, zero there."""
    m, d, block_size = shape
    grads = oracle.gradients(m, d, kind)
    active = torch.arange(d) % 3 != 0 if restricted else None
    weights = torch.randn(d) if active is None else torch.randn(d) * active
    kept = torch.arange(d) % 2 == 0 if active is None else active & (torch.arange(d) % 2 == 0)
    for damping in DAMPINGS:
        dense = oracle.fisher(grads, damping, block_size, active)
        if not oracle.well_posed(dense):
            continue
        inverse = oracle.inverse(dense)
        diagonal = BACKENDS[backend].inverse_diagonal(grads, damping, block_size, active)
        u = torch.where(kept, 0.0, weights.double() / inverse.diagonal())
        out = weights.clone()
        BACKENDS[backend].independent_update(grads, out, kept, diagonal, damping, block_size, active)
        assert not out[~kept].any()
        assert oracle.error(out, torch.where(kept, weights - inverse @ u, 0.0)) < TOLERANCE["update"], damping


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_weight_is_the_joint_update(backend):
    """For a single weight both are Optimal Brain Surgeon."""
    grads, weights = oracle.gradients(20, 30), torch.randn(30)
    kept = torch.arange(30) != 4
    kernels, joint, out = BACKENDS[backend], weights.clone(), weights.clone()
    kernels.joint_update(grads, joint, kept, 1e-3, 30)
    kernels.independent_update(grads, out, kept, kernels.inverse_diagonal(grads, 1e-3, 30), 1e-3, 30)
    assert oracle.error(out, joint) < TOLERANCE["update"]
