"""The same bits for any number of threads, and long blocks that are cut into slices for them."""

import oracle
import pytest
import torch
from oracle import TOLERANCE

from mfac.ops import compiled as ops
from mfac.ops import reference

# Blocks side by side, threads within a block on both sides, and one so long that its Gram matrix is summed in slices.
SHAPES = [(96, 5000, 500), (96, 5000, 5000), (300, 700, 100), (1500, 300, 300), (5, 70_001, 70_001), (70_001, 5, 5)]


def run(name, grads, block_size):
    """Everything that the op returns or writes."""
    d = grads.shape[1]
    active, kept, weights = torch.arange(d) % 5 != 0, torch.arange(d) % 3 == 0, torch.linspace(-1, 1, d)
    arguments = (grads, 1e-5, block_size)
    if name == "block_factor":
        return [ops.block_factor(*arguments, mask) for mask in (None, active)]
    if name == "inverse_diagonal":
        return [ops.inverse_diagonal(*arguments, mask) for mask in (None, active)]
    if name == "inverse_product":
        factor = ops.block_factor(*arguments)
        return [ops.inverse_product(grads, factor, torch.stack([weights] * 17), 1e-5, block_size)]
    if name == "joint_update":
        return [ops.joint_update(grads, weights, kept, 1e-5, block_size), weights]
    if name == "joint_step":
        return [*ops.joint_step(grads, weights, kept, 1e-5, block_size), weights]
    if name == "independent_update":
        ops.independent_update(grads, weights, kept, torch.full((d,), 1e4), 1e-5, block_size, active)
        return [weights]
    if name == "group_saliency":
        groups, subsets = torch.arange(d // 4 * 4).view(-1, 4).flip(0), torch.tensor([[0, 1], [2, 3]])
        return [ops.group_saliency(grads, weights, groups, subsets, 1e-5, block_size, mask) for mask in (None, active)]
    return [ops.quadratic_form(grads, weights, 1e-5, block_size)]


@pytest.mark.parametrize("name", sorted(set(ops._FAKES) - {"select_smallest"}))  # which has a test of its own
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(name, shape, thread_counts):
    m, d, block_size = shape
    grads = oracle.gradients(m, d)
    results = [run(name, grads, block_size) for _ in thread_counts()]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", SHAPES[-2:], ids=str)
@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_slices(shape, damping):
    m, d, block_size = shape
    grads = oracle.gradients(m, d)
    out, exact = (kernels.inverse_diagonal(grads, damping, block_size) for kernels in (ops, reference))
    assert float((out / exact - 1).abs().max()) < TOLERANCE["diagonal"]
    factor, exact = (kernels.block_factor(grads, damping, block_size) for kernels in (ops, reference))
    assert oracle.error(factor @ factor.mT, exact @ exact.mT) < TOLERANCE["factor"]
