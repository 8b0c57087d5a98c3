"""The choice between the compiled ops and the reference."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

from mfac import _build
from mfac.checks import check_choice, warn
from mfac.ops import compiled, reference

BACKENDS = ("auto", "compiled", "reference")


def requested_backend(backend: str) -> str:
    """Return what is asked for: the argument, or if that is ``"auto"`` the environment variable MFAC_BACKEND.

    Args:
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Returns:
        One of these.

    Raises:
        ValueError: If the name is not one of these.
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("MFAC_BACKEND", "auto"), "MFAC_BACKEND"
    return check_choice(source, backend, BACKENDS)


def select_backend(backend: str = "auto", device: torch.device | str = "cpu") -> ModuleType:
    """Return the module that computes, :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`.

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
    backend = requested_backend(backend)
    if backend == "reference":
        return reference
    try:
        config = compiled.load()
    except _build.BuildError as error:
        if backend == "compiled":
            raise
        warn_once(f"mfac: the compiled kernels are not available, falling back to the slower reference path.\n{error}")
        return reference
    device = torch.device(device)
    if device.type == "cpu" or (device.type == "cuda" and config["cuda"]):
        return compiled
    reason = f" ({_build.cuda_plan().reason})" if device.type == "cuda" else ""
    if backend == "compiled":
        raise RuntimeError(
            f"backend: expected a device with compiled kernels, got {device.type}{reason}; use backend='reference', or "
            "move model and gradients to the CPU"
        )
    warn_once(
        f"mfac: there are no compiled kernels for {device.type}{reason}, falling back to the slower reference path "
        f"(plain PyTorch on {device.type})."
    )
    return reference


def backend_name(kernels: ModuleType) -> str:
    """Return ``"compiled"`` or ``"reference"`` for a module that :func:`select_backend` returned."""
    return "compiled" if kernels is compiled else "reference"


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time that the message is given in this process."""
    warn(message, RuntimeWarning)
