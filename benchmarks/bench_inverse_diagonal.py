"""Factor, inverse diagonal and saliency: the published recursion, the reference, the kernel, in several shapes.

Floor: flops of factor and triangular solve (conftest), one read of G.
"""

import pytest
import torch
from conftest import DAMPING, B, diagonal_flops, random_gradients, widths

from mfac.ops import compiled as ops
from mfac.ops import recursion, reference

WAYS = {
    "textbook recursion": recursion.recursion_inverse_diagonal,
    "reference": reference.inverse_diagonal,
    "compiled": ops.inverse_diagonal,
}
SHAPES = {  # m, B, d, share of the floor asked of the kernel
    "m=64": (64, 2000, 200_000, None),
    "m=1024": (1024, 2000, 20_000, 0.65),
    "m=1024, B=50": (1024, 50, 20_000, 0.65),
    "full, d=270,000": (256, 270_000, 270_000, 0.65),
}


def saliency(way, grads, weights, block_size):
    return weights.square() / (2 * WAYS[way](grads, DAMPING, block_size))


def saliency_error(way, grads, weights, block_size, exact=None):
    """Largest relative error over the first blocks, some 2,000 weights, against float64."""
    some = min(grads.shape[1], max(1, 2000 // block_size) * block_size)
    exact = grads[:, :some].double() if exact is None else exact[:, :some].double()
    right = weights[:some].double().square() / (2 * reference.inverse_diagonal(exact, DAMPING, block_size))
    return float((saliency(way, grads[:, :some], weights[:some], block_size) / right - 1).abs().max())


@pytest.mark.benchmark(group="saliency")
@pytest.mark.parametrize("way", WAYS)
def test_saliency(measure, grads, weights, way):
    m, d = grads.shape
    measure(
        lambda: saliency(way, grads, weights, B), flops=diagonal_flops(m, widths(d, B)), bytes=4 * m * d,
        error=saliency_error(way, grads, weights, B), rounds=1 if way == "textbook recursion" else 3,
        targets={"share": 0.75, "recursion": 20} if way == "compiled" else {},
    )  # fmt: skip


@pytest.mark.benchmark(group="saliency")
def test_saliency_bfloat16(measure, grads, weights):
    """The error is against the float32 gradients: what rounding them to bfloat16 costs."""
    half, (m, d) = grads.bfloat16(), grads.shape
    measure(
        lambda: saliency("compiled", half, weights, B), flops=diagonal_flops(m, widths(d, B)), bytes=2 * m * d,
        dtype=torch.bfloat16, by="compiled, bfloat16", error=saliency_error("compiled", half, weights, B, grads),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "way"),
    [
        pytest.param(shape, way, id=way, marks=pytest.mark.benchmark(group=f"saliency, {shape}"))
        for shape in SHAPES
        for way in WAYS
    ],
)
def test_shapes(measure, weights, shape, way):
    m, block_size, d, share = SHAPES[shape]
    grads, w = random_gradients(m, d), weights[:d]
    measure(
        lambda: saliency(way, grads, w, block_size), flops=diagonal_flops(m, widths(d, block_size)), bytes=4 * m * d,
        error=saliency_error(way, grads, w, block_size) if block_size <= B else None,
        rounds=1 if way == "textbook recursion" else 3, by=way,
        targets={"share": share} if way == "compiled" and share else {},
    )  # fmt: skip
