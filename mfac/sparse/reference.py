"""The inference ops in plain PyTorch: the dense matrix and torch's own operation.

Every function here has the signature of its namesake in :mod:`mfac.sparse.compiled`. The compiled kernels are tested
against these functions, which replace them where they cannot be built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfac.sparse.formats import dense_matrix


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply ``"none"``, ``"relu"`` or ``"relu6"``."""
    if activation == "none":
        return x
    return torch.relu(x) if activation == "relu" else F.relu6(x)


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    pointers: Tensor,
    order: Tensor,
    bias: Tensor | None,
    shape: list[int],
    activation: str = "none",
) -> Tensor:
    """Product with a sparse matrix; see :func:`mfac.sparse.compiled.linear`."""
    weight = dense_matrix(values, columns, pointers, order, *shape)
    return activate(F.linear(x.float(), weight.float(), _wide(bias)), activation).to(x.dtype)


def conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    pointers: Tensor,
    order: Tensor,
    bias: Tensor | None,
    shape: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    activation: str = "none",
) -> Tensor:
    """Convolution by sparse weights; see :func:`mfac.sparse.compiled.conv2d`."""
    weight = dense_matrix(values, columns, pointers, order, *shape).view(shape[0], -1, *kernel)
    out = F.conv2d(x.float(), weight.float(), _wide(bias), stride, padding)
    return activate(out, activation).to(x.dtype).contiguous()


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str = "none") -> Tensor:
    """Depthwise 3 x 3 convolution; see :func:`mfac.sparse.compiled.depthwise_conv2d`."""
    out = F.conv2d(x.float(), weight.float(), _wide(bias), stride, padding=1, groups=x.shape[1])
    return activate(out, activation).to(x.dtype).contiguous()
