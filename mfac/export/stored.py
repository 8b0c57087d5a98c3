"""Tensors that lie in a file, and what is known of them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mfac.model.layers import Axes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: In the file.
        axes: Which axes are outputs and inputs; None for what is no weight of a layer.
        read: Returns its elements as they are stored, dense.
        zero_point: The integers that stand for 0 in a quantized tensor, as they broadcast with it; None: 0.
    """

    name: str
    axes: Axes | None
    read: Callable[[], Tensor]
    zero_point: Tensor | None = None

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight of a layer, without biases and normalisation."""
        return self.axes is not None

    def zeros(self, value: Tensor) -> Tensor:
        """Return which elements are zero.

        Args:
            value: What :attr:`read` has returned.

        Returns:
            True where an element is zero, of the shape of the tensor.
        """
        return value == (0 if self.zero_point is None else self.zero_point)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights.

    Attributes:
        path: The file.
        format: In words.
        tensors: All its tensors, each stored one once.
        nbytes: Bytes on disk, with those of an ONNX file's external data.
        part: Of a checkpoint, the entry that holds them, such as ``"model"``; empty if it is the whole file.
        unread: Other parts of a checkpoint that hold tensors, such as ``"optimizer"``.
    """

    path: Path
    format: str
    tensors: list[StoredTensor] = field(repr=False)
    nbytes: int
    part: str = ""
    unread: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """The weights of layers by name."""
        return {tensor.name: tensor for tensor in self.tensors if tensor.is_weight}


def along(axis: int, points: Tensor, rank: int) -> Tensor | None:
    """Return the zero points of a quantized tensor as they broadcast with it.

    Args:
        axis: To whose slices they belong, if there are several.
        points: One, or one for each slice.
        rank: Axes of the tensor.

    Returns:
        The integers; None if all are 0.
    """
    if not bool(points.any()):
        return None
    shape = [1] * rank
    if points.numel() > 1:
        shape[axis] = -1
    return points.view(shape)
