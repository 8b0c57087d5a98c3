"""What the tests compare with: dense float64 linear algebra, inputs that are hard, and one table of tolerances."""

import os

import numpy as np
import torch
from torch import Tensor

from mfac.ops import compiled as ops
from mfac.ops import reference

ops.load()


def emulated() -> bool:
    """Whether the CUDA ops stand in the place of the CPU ops (conftest.py)."""
    return os.environ.get("MFAC_EMULATE_CUDA") == "1"


class OnDevice:
    """The functions of mfac.ops on another device, for tests whose tensors are on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name):
        def call(*arguments):
            moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in arguments]
            try:
                out = getattr(ops, name)(*moved)
            finally:
                for parameter, given, own in zip(
                    getattr(torch.ops.mfac, name).default._schema.arguments, arguments, moved, strict=False
                ):
                    if parameter.alias_info is not None and given is not None:  # what the op writes
                        given.copy_(own)
            if isinstance(out, tuple):
                return tuple(part.cpu() for part in out)
            return out.cpu() if isinstance(out, Tensor) else out

        return call


DEVICE = os.environ.get("MFAC_TEST_DEVICE", "cpu")  # `make gpu` runs the tests of the ops with cuda
BACKENDS = {"compiled": ops if DEVICE == "cpu" else OnDevice(DEVICE), "reference": reference}

# Largest relative error in norm (‖out - exact‖ / ‖exact‖), or elementwise for the diagonal. The dense float64 inverse
# is itself uncertain by 2e-16 times the condition number of F, so inputs stay below 1e10.
TOLERANCE = {
    "diagonal": 1e-4,  # the design's promise
    "group": 1e-3,  # of saliencies, each; through the inverse of a small piece of F⁻¹
    "product": 1e-4,
    "update": 1e-4,
    "loss": 1e-4,
    "factor": 1e-12,  # L Lᵀ against A, all in float64
    "high": 1e-3,  # at a moderate damping: products of 16 bits, over what cancels
    "medium": 5e-2,  # of 8 bits
    "form": 1e-6,  # one float64 pass over float32 data
}

# (m, d, B): both sides, B = d, one row, one column left in the last block, nothing a multiple of a tile of any width.
# The last line is more than one step deep and high.
SHAPES = [(1, 5, 3), (7, 100, 33), (64, 129, 64), (50, 301, 100), (65, 101, 50), (99, 97, 97), (97, 99, 99), (33, 1, 1)]
SHAPES += [(150, 301, 300), (140, 131, 131)]
KINDS = ["random", "collinear", "near parallel", "low rank", "sparse", "mixed scale"]
DAMPINGS = [1e-8, 1e-5, 1e-2]
SCALES = [1e-12, 1e-6, 1e-3, 1.0, 1e6]


def gradients(m: int, d: int, kind: str = "random", scale: float = 1.0, seed: int = 0) -> Tensor:
    """Gradients [m, d] float32 of a kind that is hard in its own way."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, d, generator=generator)
    if kind == "collinear":
        g = torch.randn(1, d, generator=generator) * torch.linspace(0.5, 1.5, m)[:, None]
    elif kind == "near parallel":
        g = torch.randn(1, d, generator=generator) + 0.02 * g
    elif kind == "low rank":
        g = torch.randn(m, 3, generator=generator) @ torch.randn(3, d, generator=generator)
    elif kind == "sparse":
        g = g * (torch.rand(m, d, generator=generator) < 0.03)
    elif kind == "mixed scale":
        g = g * torch.logspace(-3, 0, d)
    return (g * scale).contiguous()


def fisher(grads: Tensor, damping: float, block_size: int, active: Tensor | None = None) -> Tensor:
    """F [d, d] in float64, formed."""
    m, d = grads.shape
    g = grads.double() if active is None else grads.double() * active
    block = torch.arange(d) // block_size
    dense = g.T @ g / m * (block[:, None] == block[None, :])
    return dense + damping * torch.eye(d, dtype=torch.float64)


def inverse(dense: Tensor) -> Tensor:
    """F⁻¹ in float64, from LAPACK."""
    return torch.from_numpy(np.linalg.inv(dense.numpy()))


def joint_step(dense: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """The exact step δ: δ_Q = -w_Q and δ_S = F_SS⁻¹ F_SQ w_Q."""
    w = weights.double()
    step = torch.where(kept, 0.0, -w)
    step[kept] = torch.linalg.solve(dense[kept][:, kept], dense[kept][:, ~kept] @ w[~kept])
    return step


def error(out: Tensor, exact: Tensor) -> float:
    """‖out - exact‖ / ‖exact‖; the absolute norm where exact is zero."""
    size = float(exact.double().norm())
    return float((out.double() - exact.double()).norm()) / (size or 1.0)


def well_posed(dense: Tensor) -> bool:
    """Whether the float64 inverse is good enough to compare with."""
    values = torch.linalg.eigvalsh(dense)
    return 0 < float(values[-1] / values[0]) < 1e10
