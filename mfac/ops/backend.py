"""The choice between the compiled ops and the reference."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch

from mfac import _build
from mfac.ops import compiled, reference

BACKENDS = ("auto", "compiled", "reference")


def select_backend(backend: str = "auto", device: torch.device | str = "cpu") -> ModuleType:
    """Return the module that serves, :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`.

    Args:
        backend: ``"compiled"`` (an error if it cannot be built or lacks the device), ``"reference"``, or ``"auto"``:
            what the environment variable MFAC_BACKEND says, else compiled where possible, with one warning where not.
        device: Where the tensors are.

    Raises:
        ValueError: If the name is not one of these.
        RuntimeError: If ``"compiled"`` is asked for and there are no such kernels for the device.
        BuildError: If ``"compiled"`` is asked for and cannot be built.

    Returns:
        The module.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("MFAC_BACKEND", "auto"), "MFAC_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return reference
    try:
        config = compiled.load()
    except _build.BuildError as error:
        if backend == "compiled":
            raise
        _warn_once(f"mfac: the compiled kernels are not available, the slower reference path serves.\n{error}")
        return reference
    device = torch.device(device)
    if device.type == "cpu" or (device.type == "cuda" and config["cuda"]):
        return compiled
    reason = f"there are no compiled kernels for {device.type}"
    if device.type == "cuda":
        reason += f" ({_build.cuda_plan()[1]})"
    if backend == "compiled":
        raise RuntimeError(f"backend: {reason}; use backend='reference', or move model and gradients to the CPU")
    _warn_once(f"mfac: {reason}; the reference path (plain PyTorch on {device.type}) serves.")
    return reference


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
