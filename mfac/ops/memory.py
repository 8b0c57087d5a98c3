"""What ``joint_step`` and ``group_saliency`` keep from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_BYTES = 1 << 30  # pages are used only as they are written


class StepMemory(NamedTuple):
    """Small matrices and their columns; see :func:`mfac.ops.compiled.joint_step`."""

    gram: Tensor
    held: Tensor


def allocate(grads: Tensor, block_size: int) -> StepMemory | None:
    """Return room for the small matrices of all blocks, of all their columns or as many as fit into ``MAX_BYTES``.

    Args:
        grads: [m, d] on the CPU.
        block_size: B.

    Returns:
        Memory that holds nothing so far; None if there is no room for one element each.
    """
    (m, d), blocks = grads.shape, -(-grads.shape[1] // block_size)
    order = min(5 * m // 4, block_size)  # of the Fisher side; those of more columns are [m, m]
    elements = min(order * (order + 1) // 2, MAX_BYTES // (8 * blocks) - 2)
    if elements < 1:
        return None
    gram = torch.empty(blocks, 2 + elements, dtype=torch.float64, device=grads.device)
    gram[:, 0] = 0
    return StepMemory(gram, torch.zeros(d, dtype=torch.bool, device=grads.device))
