"""Checks of what every op is given: gradients, damping, block size."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mfac.checks import as_number, check_instance, check_int

DAMPING_RANGE = (1e-30, 1e30)


def check_gradients(grads: Tensor) -> float:
    """Check that ``grads`` is a finite [m, d] matrix.

    Args:
        grads: What the user gave.

    Returns:
        The mean of the squares.

    Raises:
        TypeError: If it is not a tensor of float32 or bfloat16.
        ValueError: If the shape is wrong or a row is not finite.
    """
    check_instance("grads", grads, Tensor, "a tensor or GradientBuffer")
    if grads.dim() != 2 or 0 in grads.shape:
        raise ValueError(
            f"grads: expected [m, d] with m >= 1 gradients and d >= 1 weights, got shape {list(grads.shape)}"
        )
    if grads.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"grads: expected float32 or bfloat16, got {grads.dtype}")
    # NaN and infinity survive a norm, which runs at memory speed; only a suspect row is looked at number by number.
    norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float32) for row in grads.detach()]).double()
    suspects = torch.nonzero(~torch.isfinite(norms)).flatten().tolist()
    bad = [row for row in suspects if not torch.isfinite(grads[row]).all()]
    if bad:
        raise ValueError(f"grads: expected finite numbers, got NaN or infinity in {len(bad)} rows, the first {bad[0]}")
    for row in suspects:  # squares past float32
        norms[row] = grads[row].double().norm()
    return float(norms.square().sum() / grads.numel())


def check_damping(name: str, damping: float | str) -> float:
    """Check a damping.

    Args:
        name: Of the argument, for the error.
        damping: λ in [1e-30, 1e30], so that neither it nor 1/λ leaves float32; or ``"<number>*mean"``.

    Returns:
        The damping, or its factor if it is relative to the gradients.

    Raises:
        TypeError: If it is neither a number nor a string.
        ValueError: If it is out of range, or the string is another.
    """
    relative = isinstance(damping, str)
    if relative:
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*mean\s*", damping)
        value = float(match[1]) if match else float("nan")
    else:
        value = as_number(damping)
    if value is None:
        raise TypeError(f"{name}: expected a number, got {damping!r}")
    low, high = DAMPING_RANGE
    if not low <= value <= high:
        also = ", or such a number times the mean square of the gradients, as in '1e-2*mean'" if relative else ""
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}]{also}, got {damping!r}")
    return value


def check_block_size(name: str, block_size: int | None, also: str = " or None") -> int | None:
    """Check a block size.

    Args:
        name: Of the argument, for the error.
        block_size: B >= 1, or None.
        also: What else the argument may be, for the error.

    Returns:
        The same, as int.
    """
    return None if block_size is None else check_int(name, block_size, also=also)
