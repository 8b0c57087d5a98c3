"""Cholesky factors of all blocks. Floor: flops of the factor (conftest), one read of G.

The floor takes float32 products; these are float64, of which a core does half as many.
"""

import pytest
import torch
from conftest import DAMPING, B, factor_flops, widths

from mfac.ops import compiled as ops
from mfac.ops import reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.mark.benchmark(group="block factor")
@pytest.mark.parametrize("way", WAYS)
def test_block_factor(measure, grads, way):
    m, d = grads.shape
    g = grads[:, :B].double()
    exact = g @ g.T + m * DAMPING * torch.eye(m).double()
    factor = WAYS[way].block_factor(grads[:, :B], DAMPING, B)[0]
    error = float((factor @ factor.T - exact).norm() / exact.norm())
    measure(
        lambda: WAYS[way].block_factor(grads, DAMPING, B),
        flops=factor_flops(m, widths(d, B)), bytes=4 * m * d, error=error,
    )  # fmt: skip
