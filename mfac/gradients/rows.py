"""Conversion of gradients to rows of a buffer, their norms, and the check that they are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(row: Tensor) -> Tensor:
    """Return the Euclidean norm of a row, a float64 scalar that is finite if the row is."""
    norm = torch.linalg.vector_norm(row, dtype=torch.float32).double()  # at memory speed
    return norm if torch.isfinite(norm) else row.double().norm()  # squares past float32


def converted(grad: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return a gradient as it is stored, divided in float32 at least. It may overflow: float64 exceeds float32."""
    grad = grad.detach().to_dense()
    if scale != 1:
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale
    return grad.to(dtype)


def all_finite(parts: list[Tensor]) -> bool:
    """Return whether all are finite. NaN and infinity survive a norm; on a GPU there is one synchronization for all."""
    if not parts:
        return True
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    suspects = (~torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms]))).nonzero().flatten().tolist()
    return all(bool(torch.isfinite(parts[index]).all()) for index in suspects)
