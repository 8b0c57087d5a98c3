"""Quadratic form. Floor: 2 m d flops, one read of G."""

import pytest
from conftest import DAMPING, B

from mfac.ops import compiled as ops
from mfac.ops import reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.mark.benchmark(group="quadratic form")
@pytest.mark.parametrize("way", WAYS)
def test_quadratic_form(measure, grads, weights, way):
    m, d = grads.shape
    exact = reference.quadratic_form(grads, weights, DAMPING, B)
    error = float(WAYS[way].quadratic_form(grads, weights, DAMPING, B) / exact - 1)
    measure(
        lambda: WAYS[way].quadratic_form(grads, weights, DAMPING, B),
        flops=2 * m * d, bytes=4 * m * d, error=abs(error),
    )  # fmt: skip
