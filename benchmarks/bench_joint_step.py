"""Joint update and diagonal of what is left, to 80 %: as two ops, as one, and from what the step before has kept.

Floor: flops of the factor over the survivors and of the solve, one read of G. Where the small matrices are held there
is no Gram matrix and no read, which the floor does not know.
"""

import pytest
import torch
from conftest import DENSITY, diagonal_flops, widths

from mfac.ops import compiled as ops
from mfac.ops import memory, reference

B, DAMPING = 512, 3e-6  # the defaults for these gradients, whose mean square is 1e-4


def two_ops(grads, weights, kept):
    ops.joint_update(grads, weights, kept, DAMPING, B)
    return ops.inverse_diagonal(grads, DAMPING, B, kept)


@pytest.mark.benchmark(group="joint step to 80 %, B=512")
@pytest.mark.parametrize("way", ["two ops", "joint_step", "joint_step, matrices held"])
def test_joint_step(measure, grads, weights, kept, way):
    (m, d), generator = grads.shape, torch.Generator().manual_seed(3)
    before = kept | (torch.rand(d, generator=generator) < 0.05)  # a sub-step earlier
    start = weights * before
    carried = memory.allocate(grads, B)
    ops.joint_step(grads, weights.clone(), before, DAMPING, B, "highest", *carried)

    def setup():
        room = tuple(x.clone() for x in carried) if "held" in way else (None, None)
        return (start.clone(), *room), {}

    def run(w, gram, held):
        if way == "two ops":
            return two_ops(grads, w, kept)
        return ops.joint_step(grads, w, kept, DAMPING, B, "highest", gram, held)[1]

    few, exact = grads[:, :B], start[:B].clone()
    _, right = reference.joint_step(few, exact, kept[:B], DAMPING, B)
    error = float((run(*setup()[0])[:B] / right - 1).abs().max())
    flops = diagonal_flops(m, [int(n * DENSITY) for n in widths(d, B)])
    measure(run, setup=setup, flops=flops, bytes=4 * m * d, error=error, by=way)
