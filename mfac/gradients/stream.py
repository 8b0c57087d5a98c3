"""Endless iteration over batches, with a position that can be saved."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mfac.checks import check_instance, check_int, warn
from mfac.gradients.loader import LoaderClone, can_clone
from mfac.gradients.seeds import SeedKind, derive_seed, seeded

_END = object()


class BatchStream:
    """An endless iterator over batches; it restarts ``batches`` at the end of each pass.

    While a pass is started or a batch is fetched, the global generators of torch, random and numpy have a seed derived
    from ``seed``, the number of the pass and that of the batch; they are restored afterwards. A saved position is
    therefore exact for loaders that shuffle or augment, too. How a position is restored depends on ``batches``:

    * A DataLoader is not iterated itself; a clone of it is (:class:`mfac.gradients.loader.LoaderClone`). Skipped
      batches are not loaded, unless the dataset is iterable. Random numbers drawn in worker processes are reproduced
      only if :meth:`close` is called at the same positions.
    * Other iterables (lists, loaders of other libraries, subclasses of DataLoader that override the iteration) are
      restarted and iterated up to the position. They are used as they are, including their worker processes, and stay
      open between calls. With persistent workers this ends an epoch of training under way early; there is a warning.
    * An iterator cannot be restarted: it continues where it is.

    Args:
        batches: Any iterable of batches.
        seed: All seeds are derived from it.
        announce: Number of batches that was asked for: warn, once, if a pass has fewer.
        rank: Of this process: other ranks than 0 draw other random numbers, but for a sampler that gives each process
            its part. It is no part of a saved position.

    Attributes:
        root: What seeds are derived from: ``seed``, but for other ranks than 0.
        passes: Passes started so far.
        taken: Batches taken in this one.

    Raises:
        TypeError: If ``batches`` cannot be iterated.

    Example:
        >>> stream = BatchStream([1, 2, 3], seed=0)
        >>> [next(stream) for _ in range(5)]
        [1, 2, 3, 1, 2]
        >>> again = BatchStream([1, 2, 3], seed=0)
        >>> again.load_state_dict(stream.state_dict())
        >>> next(again)
        3
    """

    def __init__(self, batches: Iterable[Any], seed: int, announce: int | None = None, rank: int = 0) -> None:
        """Start nothing yet."""
        check_instance("batches", batches, Iterable, "an iterable of batches")
        self._batches = LoaderClone(batches) if can_clone(batches) else batches
        if self._batches is batches and getattr(batches, "persistent_workers", False):
            warn(
                f"batches: {type(batches).__name__} has an iteration of its own and persistent workers, so it is used "
                "as it is: an epoch of training under way would be disturbed; pass another loader, or one without "
                "persistent_workers"
            )
        self._once = isinstance(batches, Iterator)
        self._seed, self.announce, self._rank = seed % 2**64, announce, rank
        self.passes = self.taken = 0
        self._served = 0  # of an iterator, by this object
        self._iterator: Iterator[Any] | None = None

    @property
    def root(self) -> int:
        """See the class."""
        return derive_seed(self._seed, SeedKind.RANK, index=self._rank) if self._rank else self._seed

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Any:
        while True:
            if self._iterator is None:
                self._iterator = self._open()
            try:
                batch = self._fetch(self._iterator, self.taken)
            except BaseException:  # which ends a generator, but not the pass
                self._iterator = None
                raise
            if batch is not _END:
                self.taken += 1
                self._served += 1
                return batch
            self._end_pass()

    def _fetch(self, iterator: Iterator[Any], index: int) -> Any:
        with seeded(derive_seed(self.root, SeedKind.BATCH, self.passes, index)):
            return next(iterator, _END)

    def _open(self) -> Iterator[Any]:
        """Start the current pass, or the first, at the position."""
        self.passes = self.passes or 1
        if self._once:
            return self._batches
        skip = self.taken
        with seeded(derive_seed(self.root, SeedKind.START, self.passes)):
            if isinstance(self._batches, LoaderClone):
                order = self._seed if self._batches.splits else None
                iterator = self._batches.iterate(self.root, self.passes, skip, order)
                skip = 0 if self._batches.by_index else skip
            else:
                iterator = iter(self._batches)
        for index in range(skip):
            self._fetch(iterator, index)
        return iterator

    def _end_pass(self) -> None:
        if self._once or not self.taken:
            count = self._served if self._once else self.taken
            got = f"an end after {count}, and an iterator cannot start again" if count else "none"
            raise ValueError(f"batches: expected more batches, got {got}; pass a list or DataLoader")
        if self.announce is not None and self.taken < self.announce:
            warn(f"batches: {self.taken} batches for {self.announce} gradients; they are used again")
            self.announce = None
        self._iterator = None
        self.passes, self.taken = self.passes + 1, 0

    def close(self) -> None:
        """Stop the worker processes of a DataLoader; the next batch starts new ones at the position."""
        if isinstance(self._batches, LoaderClone):
            self._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Return seed and position."""
        return {"seed": self._seed, "passes": self.passes, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a position; an iterator stays where it is, with a warning.

        Args:
            state: From :meth:`state_dict` of a stream over the same batches.

        Raises:
            TypeError: If a value is not an int.
            ValueError: If one is missing or negative.
        """
        missing = {"seed", "passes", "taken"} - set(state)
        if missing:
            raise ValueError(f"state: expected seed, passes and taken, got none of {', '.join(sorted(missing))}")
        seed, passes, taken = (check_int(f"state[{key!r}]", state[key], 0) for key in ("seed", "passes", "taken"))
        if self._once and taken:
            warn(
                f"batches: an iterator cannot return to the state's position, after {taken} batches; it goes on where "
                "it is (pass a list or DataLoader)"
            )
        self._seed, self.passes, self.taken = seed, passes, taken
        self._served = 0
        self._iterator = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_iterator": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchStream:
        """Copy seed and position; ``batches`` are shared."""
        return copy.copy(self)
