"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: it is the old one or the new one, never half of it.

    Args:
        path: The file, in a folder that is there.

    Yields:
        The path to write to, beside it. It takes the file's place unless there is an error.
    """
    partial = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
