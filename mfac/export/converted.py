"""Weights of a converted model, as they lie in its file: in slices of four rows, without the model.

A layer of a converted model has four tensors in the place of its weight, seen as a matrix W [N, K]: ``values``
[steps, 4], ``columns`` [steps, 4], or [steps] where four rows share each column, ``pointers`` [slices + 1], the first
step of each slice, and ``order`` [4 slices], the row of W of each row of a slice, -1 for none. Column K stands for no
weight. The file must say the shape of the weight too, without which zeros cannot be counted: as ``shape`` beside them,
or under ``shapes`` of what the file says of its layers, layer -> shape.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from mfac.sparse.formats import MAX_INPUTS, PARTS, SLICE_ROWS, dense_matrix, has_all_rows


def converted_layers(names: Collection[str]) -> list[str]:
    """Return the layers whose weights lie in a file in slices.

    Args:
        names: Of the tensors in the file.

    Returns:
        Names of layers, such as ``"sections.0.point"``; empty for the model itself.
    """
    ends = [name.removesuffix(PARTS[0]) for name in names if name.rpartition(".")[2] == PARTS[0]]
    return [end.removesuffix(".") for end in ends if all(end + part in names for part in PARTS)]


def dense_weight(parts: Mapping[str, Tensor], shape: Any) -> Tensor:
    """Return the weight of a converted layer.

    Args:
        parts: The four tensors by their names.
        shape: Of the weight, as the file says it: a list of integers if it is right.

    Returns:
        The dense weight.

    Raises:
        ValueError: If the shape is not there, or the tensors contradict it or each other; the text says how.
    """
    if not isinstance(shape, (list, tuple)) or len(shape) < 2 or not all(type(size) is int for size in shape):
        raise ValueError("it does not say the shape of the weight")
    sizes = tuple(shape)
    rows, inputs = sizes[0], math.prod(sizes[1:])
    values, columns, pointers, order = (parts[part] for part in PARTS)
    lengths = pointers.long().diff()
    if columns.dtype != torch.int16 or inputs > MAX_INPUTS:
        raise ValueError(f"columns of {columns.dtype} do not number {inputs} inputs")
    if min(sizes) < 0 or len(order) != SLICE_ROWS * len(lengths) or -(-rows // SLICE_ROWS) != len(lengths):
        raise ValueError(f"{len(order)} rows in {len(lengths)} slices are not those of the shape {list(sizes)}")
    steps = int(lengths.sum())
    if list(values.shape) != [steps, SLICE_ROWS] or bool((lengths < 0).any()):
        raise ValueError(f"values of shape {list(values.shape)} do not fit the pointers")
    places = columns.long().view(len(values), -1).expand(-1, SLICE_ROWS)
    if not has_all_rows(order, rows):
        raise ValueError("the order of its rows has gaps")
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) <= inputs:
        raise ValueError(f"it has columns beyond {inputs}")
    return dense_matrix(values, columns, pointers, order, rows, inputs).reshape(sizes)
