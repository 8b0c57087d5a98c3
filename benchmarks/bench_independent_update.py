"""Independent update to 80 %. Floor: m² flops for each weight (Gram), one read of G."""

import pytest
from conftest import DAMPING, B

from mfac import ops, reference

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
        flops=m * m * d, bytes=4 * m * d, error=float((new - exact).norm() / exact.norm()), m=m, d=d, B=B,
    )  # fmt: skip
