"""The choice between the compiled inference ops and the reference."""

from __future__ import annotations

from types import ModuleType

from mfac import _build
from mfac.ops.backend import requested_backend, warn_once
from mfac.sparse import compiled, reference


def select_backend(backend: str = "auto") -> ModuleType:
    """Return the module that computes, :mod:`mfac.sparse.compiled` or :mod:`mfac.sparse.reference`.

    Args:
        backend: ``"compiled"`` (an error if it cannot be built), ``"reference"``, or ``"auto"``: what the environment
            variable MFAC_BACKEND says, else compiled where possible, with one warning where not.

    Returns:
        The module.

    Raises:
        ValueError: If the name is not one of these.
        BuildError: If ``"compiled"`` is asked for and cannot be built.
    """
    wanted = requested_backend(backend)
    if wanted == "reference":
        return reference
    try:
        compiled.load()
    except _build.BuildError as error:
        if wanted == "compiled":
            raise
        warn_once(
            "mfac: the kernels for sparse inference are not available, falling back to dense products in plain "
            f"PyTorch, which gain nothing from zeros.\n{error}"
        )
        return reference
    return compiled


def backend_name(kernels: ModuleType) -> str:
    """Return ``"compiled"`` or ``"reference"`` for a module that :func:`select_backend` returned."""
    return "compiled" if kernels is compiled else "reference"
