"""Joint update to 80 %. Floor: flops of the factor over the survivors, one read of G."""

import pytest
from conftest import DAMPING, DENSITY, B, factor_flops, widths

from mfac.ops import compiled as ops
from mfac.ops import reference

WAYS = {"reference": reference, "compiled": ops}


@pytest.mark.benchmark(group="joint update to 80 %")
@pytest.mark.parametrize("way", WAYS)
def test_joint_update(measure, grads, weights, kept, way):
    m, d = grads.shape
    new, exact = weights[:B].clone(), weights[:B].clone()
    WAYS[way].joint_update(grads[:, :B], new, kept[:B], DAMPING, B)
    reference.joint_update(grads[:, :B], exact, kept[:B], DAMPING, B)
    measure(
        lambda w: WAYS[way].joint_update(grads, w, kept, DAMPING, B), setup=lambda: ((weights.clone(),), {}),
        flops=factor_flops(m, [int(n * DENSITY) for n in widths(d, B)]), bytes=4 * m * d,
        error=float((new - exact).norm() / exact.norm()),
    )  # fmt: skip
