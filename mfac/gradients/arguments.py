"""Checks of the arguments of a GradientBuffer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfac.checks import as_number, check_instance, check_int, check_number
from mfac.model.names import without_wrappers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STATE = ("names", "shapes", "num_grads", "rows", "next", "skipped", "reached", "loss", "samples")


def check_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    """Check the type of gradients.

    Args:
        name: Of the argument, for the error.
        dtype: What the user gave: the type, or ``"float32"`` or ``"bfloat16"``.

    Returns:
        The type.

    Raises:
        TypeError: If it is neither torch.float32 nor torch.bfloat16.
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise TypeError(f"{name}: expected torch.float32 or torch.bfloat16, got {dtype!r}")
    return found


def check_real(name: str, tensor: Tensor) -> None:
    """Check that a tensor can have gradients that a buffer can hold.

    Args:
        name: Of the argument, for the error.
        tensor: A parameter or gradient.

    Raises:
        TypeError: If its numbers are complex or integers.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected real floating-point numbers, got {tensor.dtype}")


def check_grads_device(name: str, device: torch.device | str | None, home: torch.device) -> torch.device | Path:
    """Check where gradients are to be kept.

    Args:
        name: Of the argument, for the error.
        device: What the user gave.
        home: Where the parameters are.

    Returns:
        The device, with its index; or the folder, for ``"disk"`` and ``"disk:<folder>"``.

    Raises:
        ValueError: If it is neither the parameters' device nor the CPU nor a folder that can be written to.
    """
    if isinstance(device, str) and (device == "disk" or device.startswith("disk:")):
        folder = Path(device[5:] if device[5:] else tempfile.gettempdir())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{name}: expected 'disk:<folder>' with a folder that can be written to, got {device!r}")
        return folder
    try:
        found = home if device is None else torch.device(device)
    except (RuntimeError, TypeError):  # no name of a device
        found = None
    if found is not None and found.type == "cpu":
        return torch.device("cpu")
    if found is not None and found.type == home.type and found.index in (None, home.index):
        return home
    wanted = "'cpu', where the model is," if home.type == "cpu" else f"'{home}', where the model is, 'cpu'"
    raise ValueError(f"{name}: expected {wanted} or 'disk', got {device!r}")


def check_scale(scale: float | Tensor | torch.amp.GradScaler) -> float:
    """Check the number to divide gradients by.

    Args:
        scale: A number > 0, or a GradScaler.

    Returns:
        The number.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite or not > 0.
    """
    scale = check_number("scale", scale.get_scale() if isinstance(scale, torch.amp.GradScaler) else scale)
    if scale <= 0:
        raise ValueError(f"scale: expected a finite number > 0, got {scale!r}")
    return scale


def check_state(
    state: Mapping[str, Any], names: Sequence[str], shapes: Sequence[torch.Size], num_grads: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Check the state of a buffer against the buffer that is to take it over.

    Args:
        state: What the user gave.
        names: Of the buffer's parameters; those of the state may have other components of wrappers.
        shapes: Of the buffer's parameters.
        num_grads: Rows of the buffer.
        dtype: Of its rows.

    Returns:
        The values by key, ``reached`` as a set.

    Raises:
        TypeError: If it is not a mapping, or a value is of the wrong type.
        ValueError: If a key is missing, or a value does not fit.
    """
    check_instance("state", state, Mapping, "a mapping")
    missing = [key for key in _STATE if key not in state]
    if missing:
        raise ValueError(f"state: expected the keys of GradientBuffer.state_dict(), got none of {', '.join(missing)}")
    if _unwrapped(state["names"]) != _unwrapped(names):
        raise ValueError(f"state['names']: expected {names}, got {state['names']}")
    for key, own in (("shapes", [list(shape) for shape in shapes]), ("num_grads", num_grads)):
        if state[key] != own:
            raise ValueError(f"state[{key!r}]: expected {own}, got {state[key]}")
    rows, d = check_instance("state['rows']", state["rows"], Tensor, "a tensor"), sum(shape.numel() for shape in shapes)
    if rows.dtype != dtype:
        raise ValueError(f"state['rows']: expected {dtype}, got {rows.dtype}")
    if rows.dim() != 2 or rows.shape[1] != d or len(rows) > num_grads:
        raise ValueError(f"state['rows']: expected [<= {num_grads}, {d}], got {list(rows.shape)}")
    bounds = (0, num_grads - 1) if len(rows) == num_grads else (len(rows), len(rows))
    checked = dict(state) | {
        "names": list(state["names"]),
        "next": check_int("state['next']", state["next"], *bounds),
        "skipped": check_int("state['skipped']", state["skipped"], 0),
        "reached": set(check_instance("state['reached']", state["reached"], list, "a list of names")),
    }
    if not checked["reached"] <= set(state["names"]):
        raise ValueError(f"state['reached']: expected some of {state['names']}, got {state['reached']}")
    for key in ("loss", "samples"):
        if as_number(state[key]) is None:
            raise TypeError(f"state[{key!r}]: expected a number, got {state[key]!r}")
    return checked


def _unwrapped(names: Any) -> Any:
    known = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return [without_wrappers(name) for name in names] if known else names
