"""Files of tensors and plain values in torch's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mfac.files.atomic import replaced


def read_state(
    name: str, path: str | Path, wanted: str, device: torch.device | str = "cpu", *, mmap: bool = False
) -> Any:
    """Read a file of tensors and plain values, as :func:`torch.save` writes it.

    Args:
        name: Of the argument that names the file, for the error.
        path: The file.
        wanted: What the file should hold, for the error: ``"a checkpoint"``.
        device: Where the tensors go.
        mmap: Leave the tensors on disk until they are used, where the file allows it.

    Returns:
        What the file holds.

    Raises:
        ValueError: If there is no such file, or it cannot be read or holds objects of other kinds.
    """
    if not Path(path).is_file():
        raise ValueError(f"{name}: expected an existing file, got {path}")
    try:
        with Path(path).open("rb") as file:
            mmap = mmap and file.read(2) == b"PK"  # not the format of before torch 1.6
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise ValueError(f"{name}: expected {wanted}, got {path}, which cannot be read: {error}") from error
    except Exception as error:  # torch raises many kinds, whose texts advise to load such files without protection
        raise ValueError(
            f"{name}: expected {wanted}, got {path}, which is damaged, of another format, or holds more than tensors "
            f"and plain values"
        ) from error


def write_state(path: str | Path, state: Any) -> None:
    """Write tensors and plain values with :func:`torch.save`, atomically: a file that is there stays whole until then.

    Args:
        path: The file, in a folder that is there.
        state: What :func:`read_state` returns later.
    """
    with replaced(path) as partial:
        torch.save(state, partial)
