"""Progress bars and, where the output is no terminal, a line now and then in their place."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from tqdm.auto import tqdm as tqdm_auto

_SECONDS = 20  # between two lines
_LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"
_OPEN_LINE = "{desc}: {n_fmt} in {elapsed}{postfix}"  # where the end is not known


class _Lines(tqdm):
    """A bar that writes whole lines, to a file or a pipe."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = str(self) if msg is None else msg
        if text:
            self.fp.write(f"{text}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing: lines stay."""

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> bool:
        """Write the line when it is time, but not after each `tqdm.write`, which draws bars anew."""
        return True if nolock else super().refresh(nolock, lock_args)


def progress_bar(progress: bool, desc: str, total: int | None = None, leave: bool = False, unit: str = "it") -> tqdm:
    """Return a progress bar: on a terminal or in a notebook a bar, elsewhere a line on stderr every 20 seconds.

    Args:
        progress: False for one that shows nothing.
        desc: What is done.
        total: How many there are to do, if known.
        leave: Leave the bar on the terminal at the end.
        unit: What is counted.

    Returns:
        The bar, a context manager.

    Example:
        >>> with progress_bar(False, "gradients", 2) as bar:
        ...     bar.update()
    """
    kind = tqdm_auto
    options: dict[str, Any] = {"leave": leave, "unit": unit}
    if kind is tqdm or kind.__module__ == "tqdm.asyncio":  # not a notebook's
        stream = sys.stderr
        if not (hasattr(stream, "isatty") and stream.isatty()):
            kind = _Lines
            options = {
                "leave": False,
                "mininterval": _SECONDS,
                "maxinterval": _SECONDS,
                "delay": _SECONDS,
                "bar_format": _OPEN_LINE if total is None else _LINE,
            }
    return kind(total=total, desc=desc, disable=not progress, **options)
