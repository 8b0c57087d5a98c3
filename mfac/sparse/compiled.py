"""The compiled inference ops, one thin function each; csrc/sparse/schemas.h has the shapes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mfac.ops.extension import Extension

_extension = Extension("_sparse", "mfac_sparse")
_FAKES, _fake = _extension.fakes, _extension.fake
load = functools.cache(_extension.load)


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
    """activation(x Wᵀ + bias) for x [..., K] and a sparse W of shape [N, K].

    W is the four tensors of a :class:`mfac.sparse.formats.SlicedMatrix`. Sums are float32, also for bfloat16.

    Returns:
        [..., N], of the type of x.
    """
    return torch.ops.mfac_sparse.linear.default(x, values, columns, pointers, order, bias, shape, activation)


@_fake
def _fake_linear(x, values, columns, pointers, order, bias, shape, activation="none"):
    return x.new_empty((*x.shape[:-1], shape[0]))


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
    """activation(convolution of x + bias) for x [n, channels, height, width] and a sparse W of shape [N, K].

    K = channels · kernel[0] · kernel[1], W being ``weight.flatten(1)`` of a torch.nn.Conv2d. Sums are float32.

    Returns:
        [n, N, (height + 2 padding[0] - kernel[0]) // stride[0] + 1, ...], contiguous, of the type of x.
    """
    return torch.ops.mfac_sparse.conv2d.default(
        x, values, columns, pointers, order, bias, shape, kernel, stride, padding, activation
    )


@_fake
def _fake_conv2d(x, values, columns, pointers, order, bias, shape, kernel, stride, padding, activation="none"):
    size = [(x.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    return x.new_empty((x.shape[0], shape[0], *size))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str = "none") -> Tensor:
    """activation(convolution of each channel by its own 3 x 3 kernel + bias), padding 1, stride 1 or 2.

    ``x`` [n, channels, height, width], ``weight`` [channels, 1, 3, 3], dense. Sums are float32.

    Returns:
        [n, channels, (height - 1) // stride + 1, (width - 1) // stride + 1], contiguous, of the type of x.
    """
    return torch.ops.mfac_sparse.depthwise_conv2d.default(x, weight, bias, stride, activation)


@_fake
def _fake_depthwise_conv2d(x, weight, bias, stride, activation="none"):
    return x.new_empty((*x.shape[:2], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1))
