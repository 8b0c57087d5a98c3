"""Capacitance matrices that are kept between sub-steps; group_saliency and the update share what either has made."""

import itertools

import oracle
import pytest
import torch
from oracle import DAMPINGS, KINDS, TOLERANCE
from test_joint_step import room, sub_steps

import mfac
from mfac.ops import compiled as ops
from mfac.ops import memory
from mfac.ops.offload import PagedOps

pytestmark = pytest.mark.skipif(oracle.DEVICE != "cpu" or oracle.emulated(), reason="the CUDA ops keep nothing")
SINGLE, EXACT = 1, 2  # Products of csrc/cpu/block.h


def step(grads, weights, kept, damping, block_size, carried=(None, None)):
    return ops.joint_step(grads, weights, kept, damping, block_size, "highest", *carried)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [*DAMPINGS, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(20, 130, 50), (33, 250, 150), (1, 9, 9), (60, 200, 200)], ids=str)
@pytest.mark.parametrize("share", [0.7, 0.9, 0.98])
def test_against_dense(shape, damping, kind, share):
    """Sub-steps from dense that stay on the capacitance side as long as the density allows."""
    m, d, block_size = shape
    grads, start = oracle.gradients(m, d, kind), torch.randn(d)
    dense = oracle.fisher(grads, damping, block_size)
    if not oracle.well_posed(dense):
        return
    weights, carried = start.clone(), room(m, d, block_size)
    step(grads, weights, torch.ones(d, dtype=torch.bool), damping, block_size, carried)
    assert torch.equal(weights, start)
    for kept in sub_steps(d, 5, share):
        _, diagonal = step(grads, weights, kept, damping, block_size, carried)
        assert oracle.error(weights, start + oracle.joint_step(dense, start, kept)) < TOLERANCE["update"]
        exact = torch.full((d,), 1 / damping, dtype=torch.float64)
        exact[kept] = oracle.inverse(dense[kept][:, kept]).diagonal()
        assert float((diagonal / exact - 1).abs().max()) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_against_none(dtype, precision):
    """At a usual damping a difference of matrices is as good as one made anew."""
    m, d, block_size = 130, 1000, 500
    grads, weights = oracle.gradients(m, d).to(dtype), torch.randn(d)
    anew, carried = weights.clone(), room(m, d, block_size)
    for kept in sub_steps(d, 4, 0.85):
        loss, diagonal = ops.joint_step(grads, weights, kept, 3e-2, block_size, precision, *carried)
        right, exact = ops.joint_step(grads, anew, kept, 3e-2, block_size, precision)
        assert bool((carried[0][:, 0] > 0).all()) and torch.equal(carried[1], kept)
        assert oracle.error(weights, anew) < 1e-6 and oracle.error(diagonal, exact) < 1e-6
        assert float(loss) == pytest.approx(float(right), rel=1e-6)


def test_rounding_errors_add_up():
    """Those of the first matrix stay, while the trace falls."""
    grads, weights, carried = oracle.gradients(32, 400), torch.randn(400), room(32, 400, 200)
    before = torch.zeros(2)
    for kept in sub_steps(400, 4, 0.9):
        step(grads, weights, kept, 1e-1, 200, carried)
        anew = room(32, 400, 200)
        step(grads, weights, kept, 1e-1, 200, anew)
        assert bool((carried[0][:, 1] > before).all()) and bool((carried[0][:, 1] >= anew[0][:, 1]).all())
        before = carried[0][:, 1].clone()


@pytest.mark.parametrize(
    ("large", "scale", "products", "again"),
    [(80, 1e3, SINGLE, True), (20, 1e3, EXACT, False), (20, 1e9, EXACT, True)],
)
def test_cancellation(large, scale, products, again):
    """Nearly all of the trace goes at once. Where rounding errors are what is left, the matrix is made anew."""
    m, d = 40, 200
    grads, kept = oracle.gradients(m, d), torch.arange(d) >= large
    grads[:, :large] *= scale
    weights, carried, anew = torch.where(kept, torch.randn(d), 1e-3 / scale), room(m, d, d), room(m, d, d)
    step(grads, weights, torch.ones(d, dtype=torch.bool), 1e-2, d, carried)
    assert float(carried[0][0, 0]) == products
    expected = weights.clone()
    _, exact = step(grads, expected, kept, 1e-2, d, anew)
    _, diagonal = step(grads, weights, kept, 1e-2, d, carried)
    assert (float(carried[0][0, 1]) == float(anew[0][0, 1])) == again
    assert oracle.error(diagonal, exact) < 1e-6 and oracle.error(weights, expected) < 1e-6
    assert torch.equal(diagonal, exact) or not again


@pytest.mark.parametrize("elements", [0, 100, 32 * 33 // 2 - 1])
def test_no_room(elements):
    grads, weights, carried = oracle.gradients(32, 300), torch.randn(300), room(32, 300, 150, elements)
    for kept in sub_steps(300, 2, 0.9):
        expected = weights.clone()
        loss, diagonal = step(grads, weights, kept, 1e-2, 150, carried)
        right, exact = step(grads, expected, kept, 1e-2, 150)
        assert not carried[1].any()
        assert torch.equal(weights, expected) and torch.equal(diagonal, exact) and torch.equal(loss, right)


def described(d):
    return torch.arange(d // 4 * 4).view(-1, 4), torch.tensor(list(itertools.combinations(range(4), 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 400, 200), (65, 201, 100), (200, 400, 128), (1, 9, 3)], ids=str)
def test_group_saliency(shape, kind, dtype):
    """In turn with the update, both with what the other has left; the same as without, and fresh for other columns."""
    m, d, block_size = shape
    grads, weights, carried = oracle.gradients(m, d, kind).to(dtype), torch.randn(d), room(m, d, block_size)
    active, damping = torch.ones(d, dtype=torch.bool), 3e-2 * float(grads.float().square().mean()) or 1.0
    for kept in [*sub_steps(d, 5, 0.85), torch.arange(d) % 2 == 0]:
        out = ops.group_saliency(grads, weights, *described(d), damping, block_size, active, "highest", *carried)
        exact = ops.group_saliency(grads, weights, *described(d), damping, block_size, active)
        assert float((out - exact).abs().max()) <= TOLERANCE["group"] * float(exact.max())
        expected = weights.clone()
        loss, _ = ops.joint_step(grads, weights, kept, damping, block_size, "highest", *carried, False)
        right = ops.joint_update(grads, expected, kept, damping, block_size)
        assert oracle.error(weights, expected) < TOLERANCE["update"]
        assert float(loss) == pytest.approx(float(right), rel=TOLERANCE["loss"], abs=1e-9)
        active = kept


def test_group_saliency_uses_and_leaves_matrices():
    """On the Fisher side gradients are not read again: here they are lost."""
    grads, weights, active = oracle.gradients(120, 200), torch.randn(200), torch.arange(200) % 3 > 0
    lost, carried = torch.full_like(grads, torch.nan), room(120, 200, 100)
    first = ops.group_saliency(grads, weights, *described(200), 1.0, 100, active, "highest", *carried)
    assert torch.equal(carried[1], active) and bool((carried[0][:, 0] > 0).all())
    again = ops.group_saliency(lost, weights, *described(200), 1.0, 100, active, "highest", *carried)
    assert torch.equal(first, again)
    kept, expected = active & (torch.arange(200) % 5 > 0), weights * active
    weights = expected.clone()
    ops.joint_update(grads, expected, kept, 1.0, 100)
    step(lost, weights, kept, 1.0, 100, carried)
    assert oracle.error(weights, expected) < 1e-6


def test_pages():
    """With memory, page by page: the bits of one piece."""
    grads, (d, block_size, damping) = oracle.gradients(12, 100), (100, 30, 1e-2)
    results = []
    for kernels in (ops, PagedOps(ops, torch.device("cpu"), 1)):
        weights, active, out = torch.linspace(-1, 1, d), torch.ones(d, dtype=torch.bool), []
        carried = memory.allocate(grads, block_size)
        carried.gram.zero_()
        for kept in sub_steps(d, 3, 0.9):
            settings = damping, block_size, active, "highest", *carried
            out.append(kernels.group_saliency(grads, weights, *described(d), *settings))
            out.append(kernels.joint_step(grads, weights, kept, damping, block_size, "highest", *carried)[1])
            active = kept
        results.append([*out, weights, *carried])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_fisher():
    """Memory belongs to one damping and block size."""
    fisher = mfac.Fisher(oracle.gradients(16, 60), 1e-2, 40)
    own, kept = fisher.replace(memory=fisher.step_memory()), torch.arange(60) % 4 > 0
    own.joint_update(torch.ones(60), kept)
    memory = own._memory
    assert torch.equal(memory.held, kept) and bool((memory.gram[:, 0] > 0).all())
    assert own.replace(damping=1e-3)._memory is None


@pytest.mark.parametrize("held", [None, torch.zeros(19, dtype=torch.bool)])
def test_wrong_memory(held):
    message = (
        "gram, held: expected both or none, got one" if held is None else r"held: expected shape \[20\], got \[19\]"
    )
    with pytest.raises(ValueError, match=message):
        ops.group_saliency(
            torch.randn(6, 20),
            torch.randn(20),
            *described(20),
            1e-3,
            8,
            None,
            "highest",
            torch.zeros(3, 7).double(),
            held,
        )
