"""The algorithm as published (M-FAC, Frantar, Kurtic, Alistarh, NeurIPS 2021, section 3.1), block by block.

An independent check of the ops, and the benchmarks' baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfac.ops.reference import block_slices


def recursion_vectors(g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Run the published recursion on one block: v_k = F_{k-1}⁻¹ g_k and q_k = m + g_kᵀ v_k.

    Sherman-Morrison gives F_k⁻¹ = F_{k-1}⁻¹ - v_k v_kᵀ / q_k with F_0⁻¹ = I/λ, so that
    F_{k-1}⁻¹ g = g/λ - Σ_{j<k} v_j (v_jᵀ g) / q_j. Two passes over the k-1 vectors so far for each of the m gradients.

    Args:
        g: [m, B] gradients of one block.
        damping: λ.

    Returns:
        v [m, B] and q [m], in the type of g.
    """
    m = g.shape[0]
    v, q = torch.empty_like(g), g.new_empty(m)
    for k in range(m):
        torch.sub(g[k] / damping, v[:k].T @ ((v[:k] @ g[k]) / q[:k]), out=v[k])
        q[k] = m + g[k] @ v[k]
    return v, q


def recursion_inverse_diagonal(grads: Tensor, damping: float, block_size: int) -> Tensor:
    """Diagonal of F⁻¹ [d] by the published recursion, in the type of grads."""
    out = []
    for block in block_slices(grads.shape[1], block_size):
        v, q = recursion_vectors(grads[:, block].contiguous(), damping)
        out.append(1 / damping - (v.square() / q[:, None]).sum(0))
    return torch.cat(out)
