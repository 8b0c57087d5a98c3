"""One inverse-Fisher-vector product with the factors at hand. Floor: 4 m d flops, one read of G."""

import pytest
import torch

from mfac import ops, reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.mark.benchmark(group="inverse product, m=256, B=2000, d=200,000")
@pytest.mark.parametrize("way", WAYS)
def test_inverse_product(measure, way):
    ops.load()
    grads, x = torch.randn(256, 200_000) * 0.01, torch.randn(200_000)
    factor = ops.block_factor(grads, 1e-5, 2000)
    m, d = grads.shape
    measure(
        lambda: WAYS[way].inverse_product(grads, factor, x, 1e-5, 2000),
        flops=4 * m * d, bytes=4 * m * d, m=m, d=d, B=2000,
    )  # fmt: skip
