"""Saliency of the six pairs of every group of four (2:4) and of the groups as such (block4).

Floor: flops of factor and triangular solve (conftest), as for single weights, and one read of G.
"""

import itertools

import pytest
import torch
from conftest import DAMPING, B, diagonal_flops, widths

from mfac.ops import compiled as ops
from mfac.ops import reference

PATTERNS = {"2:4": list(itertools.combinations(range(4), 2)), "block4": [(0, 1, 2, 3)]}


@pytest.mark.benchmark(group="group saliency")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_group_saliency(measure, grads, weights, pattern):
    """The error is the largest relative one over the first block."""
    (m, d), subsets = grads.shape, torch.tensor(PATTERNS[pattern])
    groups = torch.arange(d).view(-1, 4)
    few = (grads[:, :B], weights[:B], groups[: B // 4], subsets, DAMPING, B)
    exact = reference.group_saliency(few[0].double(), *few[1:])
    measure(
        lambda: ops.group_saliency(grads, weights, groups, subsets, DAMPING, B),
        flops=diagonal_flops(m, widths(d, B)), bytes=4 * m * d, by=f"compiled, {pattern}",
        error=float((ops.group_saliency(*few) / exact - 1).abs().max()),
    )  # fmt: skip
