"""Writing that Ctrl-C does not leave half done."""

from __future__ import annotations

from collections.abc import Callable


def write_whole(write: Callable[[], None]) -> None:
    """Write; if that is interrupted, write again from the start, and then let the interruption go on.

    Args:
        write: May be called twice; what it leaves is the same.

    Raises:
        BaseException: What interrupted it.
    """
    try:
        write()
    except BaseException:
        write()
        raise
