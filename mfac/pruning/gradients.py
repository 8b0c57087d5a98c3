"""The gradients that a step is given, checked against the parameters that are pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mfac.checks import check_instance
from mfac.gradients.buffer import GradientBuffer
from mfac.model.names import NameTable, shorten

Gradients = GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]]


def check_grads(grads: Gradients, params: Mapping[str, Tensor], device: torch.device) -> Tensor | GradientBuffer:
    """Check gradients.

    Args:
        grads: A buffer, a tensor [m, d], or m dicts name -> gradient.
        params: Name -> parameter, in the order of the d columns.
        device: Where the parameters are.

    Returns:
        The buffer or tensor; dicts as a buffer.

    Raises:
        TypeError: If it is none of these.
        ValueError: If names, shapes or devices do not fit, or there are none.
    """
    d = sum(p.numel() for p in params.values())
    if isinstance(grads, Sequence) and not isinstance(grads, str):
        grads = _buffer_of_rows(grads, params)
    if isinstance(grads, GradientBuffer):
        if grads.names != list(params):
            raise ValueError(
                f"grads: expected the parameters {shorten(params)}, got a buffer of {shorten(grads.names)}"
            )
        if len(grads) == 0:
            raise ValueError("grads: expected at least one gradient, got an empty GradientBuffer")
    else:
        check_instance("grads", grads, Tensor, "a GradientBuffer, a tensor or a list of dicts")
    if grads.device not in (device, torch.device("cpu")):
        raise ValueError(f"grads: expected on {device} like the model, or on the CPU, got {grads.device}")
    shape = tuple(grads.shape)
    if len(shape) != 2 or shape[1] != d:
        raise ValueError(f"grads: expected [m, {d}] for these parameters, got shape {list(shape)}")
    return grads


def _buffer_of_rows(rows: Sequence[Mapping[str, Tensor]], params: Mapping[str, Tensor]) -> GradientBuffer:
    buffer = GradientBuffer(max(len(rows), 1), params)
    for index, row in enumerate(rows):
        check_instance(f"grads[{index}]", row, Mapping, "a dict name -> gradient")
        row = NameTable(params).translate(f"grads[{index}]", row)
        missing = [name for name in params if name not in row]
        if missing:
            raise ValueError(f"grads[{index}]: expected a gradient of each parameter, got none of {shorten(missing)}")
        if not buffer.append_gradients([row[name] for name in params]):
            raise ValueError(f"grads[{index}]: expected finite numbers, got NaN or infinity")
    return buffer
