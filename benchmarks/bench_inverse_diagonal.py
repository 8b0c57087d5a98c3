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
    "m=1024, B=50": (1024, 50, 20_000, 0.55),
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
        targets={"share": 0.80} if way == "compiled" else {},
    )  # fmt: skip


LOWER = {  # type of the gradients and precision; the instructions are those of build_config()["cpu_bf16"]
    "bfloat16": (torch.bfloat16, "highest"),
    "high": (torch.float32, "high"),
    "medium": (torch.float32, "medium"),
}


@pytest.mark.parametrize(
    ("block_size", "name"),
    [
        pytest.param(block_size, name, marks=pytest.mark.benchmark(group=group), id=f"{name}, B={block_size}")
        for block_size, group in ((B, "saliency"), (512, "saliency, B=512"))
        for name in [*LOWER, *["float32"] * (block_size != B)]
    ],
)
def test_lower_precision(measure, grads, weights, name, block_size):
    """Damping 3e-2 times the mean square, the default; the error is against float64 of the float32 gradients."""
    dtype, precision = LOWER.get(name, (torch.float32, "highest"))
    given, (m, d) = grads.to(dtype), grads.shape
    damping = 3e-2 * float(grads[:, :10_000].square().mean())
    some = max(1, 2000 // block_size) * block_size
    right = reference.inverse_diagonal(grads[:, :some].double(), damping, block_size)
    error = ops.inverse_diagonal(given[:, :some], damping, block_size, None, precision) / right - 1
    measure(
        lambda: weights.square() / (2 * ops.inverse_diagonal(given, damping, block_size, None, precision)),
        flops=diagonal_flops(m, widths(d, block_size)), bytes=given.element_size() * m * d,
        dtype=torch.float32 if name == "float32" else torch.bfloat16, by=f"compiled, {name}",
        error=float(error.abs().max()), targets={"share": 0.80} if name == "float32" else {},
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
