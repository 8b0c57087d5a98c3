"""Independent update to 80 %. Floor: flops of the factor, one read of G."""

import pytest
from conftest import DAMPING, B, factor_flops, widths

from mfac.ops import compiled as ops
from mfac.ops import reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.mark.benchmark(group="independent update to 80 %")
@pytest.mark.parametrize("way", WAYS)
def test_independent_update(measure, grads, weights, kept, way):
    m, d = grads.shape
    diagonal = ops.inverse_diagonal(grads, DAMPING, B)
    new, exact = weights[:B].clone(), weights[:B].clone()
    WAYS[way].independent_update(grads[:, :B], new, kept[:B], diagonal[:B], DAMPING, B)
    reference.independent_update(grads[:, :B], exact, kept[:B], diagonal[:B], DAMPING, B)
    measure(
        lambda w: WAYS[way].independent_update(grads, w, kept, diagonal, DAMPING, B),
        setup=lambda: ((weights.clone(),), {}),
        flops=factor_flops(m, widths(d, B)), bytes=4 * m * d, error=float((new - exact).norm() / exact.norm()),
    )  # fmt: skip
