"""Joint update."""

import oracle
import pytest
import torch
from oracle import BACKENDS, DAMPINGS, KINDS, SHAPES, TOLERANCE

from mfac.ops import compiled as ops
from mfac.ops import reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense(shape, kind, backend):
    """At every density the update is F_SS⁻¹ F_SQ w_Q and the returned loss ½ δᵀFδ."""
    m, d, block_size = shape
    generator = torch.Generator().manual_seed(1)
    for damping in DAMPINGS:
        for density in (0.0, 0.1, 0.7, 1.0):
            grads = oracle.gradients(m, d, kind)
            dense = oracle.fisher(grads, damping, block_size)
            if not oracle.well_posed(dense):
                continue
            weights = torch.randn(d, generator=generator)
            kept = torch.rand(d, generator=generator) < density
            step = oracle.joint_step(dense, weights, kept)
            out = weights.clone()
            loss = BACKENDS[backend].joint_update(grads, out, kept, damping, block_size)
            assert not out[~kept].any()
            assert oracle.error(out, weights + step) < TOLERANCE["update"], (damping, density)
            exact = 0.5 * step @ dense @ step
            # Where δ_S almost undoes the removal, the minimum is a rest of rounding: measured against what was at
            # stake.
            stake = 0.5 * torch.where(kept, 0.0, weights.double()) @ dense @ torch.where(kept, 0.0, weights.double())
            assert abs(float(loss) - float(exact)) <= TOLERANCE["loss"] * max(float(exact), 1e-6 * float(stake))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_before(backend):
    """Weights that are zero already add nothing; blocks with nothing to prune keep their bits."""
    grads, weights = oracle.gradients(16, 120), torch.randn(120)
    kept = torch.ones(120, dtype=torch.bool)
    kept[:10] = False
    weights[:5] = 0
    out = weights.clone()
    BACKENDS[backend].joint_update(grads, out, kept, 1e-3, 40)
    assert torch.equal(out[40:], weights[40:])
    dense = oracle.fisher(grads, 1e-3, 40)
    assert oracle.error(out, weights + oracle.joint_step(dense, weights, kept)) < TOLERANCE["update"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_any_stride(backend):
    grads, base = oracle.gradients(16, 60), torch.randn(120)
    kept = torch.arange(60) % 4 == 0
    expected, out = base[::2].clone(), base.clone()
    BACKENDS[backend].joint_update(grads, expected, kept, 1e-3, 25)
    BACKENDS[backend].joint_update(grads, out[::2], kept, 1e-3, 25)
    assert torch.equal(out[::2], expected) and torch.equal(out[1::2], base[1::2])


@pytest.mark.parametrize("pruned", ["last tenth", "largest"])
def test_few_columns_dominate(pruned):
    """Near the largest condition number at which float32 products are used, errors of A are not independent here."""
    torch.manual_seed(0)
    m, d = 256, 560
    grads = torch.randn(m, d) * torch.arange(1, d + 1) ** -2.4
    kept = torch.arange(d) < d - 56 if pruned == "last tenth" else torch.arange(d) > 0
    weights = torch.randn(d).masked_fill(kept, 0)
    damping = float(grads[:, kept].double().square().sum()) / (190 * m * m)
    expected, found = weights.double(), weights.clone()
    reference.joint_update(grads.double(), expected, kept, damping, d)
    ops.joint_update(grads, found, kept, damping, d)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("m", [1, 8])
def test_gradients_that_are_not_finite(m):
    grads, kept, weights = torch.randn(m, 6), torch.arange(6) < 5, torch.randn(6)
    before = weights.clone()
    grads[0, 5] = torch.inf  # a pruned column, which no factor has
    unfit = (
        r"grads: expected (rows whose block 0 .*|finite numbers in the columns that are pruned,) got NaN or infinity"
    )
    with pytest.raises(RuntimeError, match=unfit):
        ops.joint_update(grads, weights, kept, 0.1, 6)
    assert torch.equal(weights, before)
    with pytest.raises(RuntimeError, match=r"grads: expected rows whose block 0 .* got NaN or infinity"):
        ops.inverse_diagonal(grads, 0.1, 6)
