"""Iteration over a DataLoader without side effects on the training loop that uses it at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from mfac.checks import warn
from mfac.gradients.sampler import copy_sampler, splits_by_process
from mfac.gradients.seeds import SeedKind, derive_seed, seeded


def can_clone(batches: Any) -> bool:
    """Return whether this is a DataLoader that iterates as torch's does; subclasses may differ in their constructor."""
    kind = type(batches)
    return (
        isinstance(batches, DataLoader)
        and kind.__iter__ is DataLoader.__iter__
        and kind._get_iterator is DataLoader._get_iterator
    )


class LoaderClone:
    """The settings of a DataLoader and a snapshot of its samplers.

    Dataset, collate_fn and worker_init_fn are shared. Iterators, worker processes, samplers and generators are not:
    an epoch of training in progress, with persistent workers or without, is not disturbed. A sampler that cannot be
    copied, such as a generator function's iterator, is used as it is, with a warning.

    Args:
        loader: One for which :func:`can_clone` is true.

    Attributes:
        by_index: Whether the dataset is read by index.
        splits: Whether the sampler gives each process its part of one order.
    """

    def __init__(self, loader: DataLoader) -> None:
        """Copy the settings."""
        context = loader.multiprocessing_context
        self._dataset = loader.dataset
        self._settings = {
            "num_workers": loader.num_workers,
            "collate_fn": loader.collate_fn,
            "pin_memory": loader.pin_memory,
            "pin_memory_device": loader.pin_memory_device,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": None if context is None else context.get_start_method(),
            "prefetch_factor": loader.prefetch_factor,
            "in_order": loader.in_order,
        }
        self.by_index = not isinstance(loader.dataset, IterableDataset)
        self._sampler, self._copied, self.splits = None, True, False
        if self.by_index:
            self._batched = loader.batch_sampler is not None
            self._sampler = loader.batch_sampler if self._batched else loader.sampler
            try:
                self._sampler = copy_sampler(self._sampler, loader.dataset)
                self.splits = splits_by_process(self._sampler, loader.dataset)
            except Exception as error:  # whatever the copying of unknown objects raises
                self._copied = False
                warn(
                    f"batches: the {'batch_sampler' if self._batched else 'sampler'} of the DataLoader, "
                    f"{type(self._sampler).__name__}, cannot be copied ({error}) and is used as it is: an epoch of "
                    "training under way would go on with other batches"
                )
        else:
            self._settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}

    def iterate(self, seed: int, passes: int, skip: int, order: int | None = None) -> Iterator[Any]:
        """Start a pass.

        Args:
            seed: All seeds are derived from it.
            passes: Number of the pass, which decides the order of a loader that shuffles.
            skip: Number of batches to skip at the beginning without loading them; only if ``by_index``.
            order: The sampler's seeds are derived from it; None: from ``seed``.

        Returns:
            An iterator; its worker processes stop when it is deleted.
        """
        # Workers of an iterable dataset restart at its beginning, so they must draw the same random numbers again.
        workers = derive_seed(seed, SeedKind.WORKERS, passes, skip if self.by_index else 0)
        settings = self._settings | {"generator": torch.Generator().manual_seed(workers)}
        if self.by_index:
            seed = seed if order is None else order
            sampler, start = self._sampler, 0
            if self._copied:
                sampler = copy_sampler(sampler, self._dataset, seed, passes)
            elif isinstance(sampler, Iterator):  # which cannot be restarted: it is past those to skip
                start = skip
            indices = _Indices(sampler, seed, passes, skip, start)
            settings |= {"batch_sampler": indices} if self._batched else {"sampler": indices, "batch_size": None}
        return iter(DataLoader(self._dataset, **settings))


class _Indices:
    """The indices from ``skip`` on of a sampler that is at ``start``; each draw is seeded, however far ahead it is."""

    def __init__(self, sampler: Any, seed: int, passes: int, skip: int, start: int) -> None:
        self._sampler, self._seed, self._passes, self._skip, self._start = sampler, seed, passes, skip, start

    def __iter__(self) -> Iterator[Any]:
        with seeded(derive_seed(self._seed, SeedKind.ITERATE, self._passes)):
            iterator = iter(self._sampler)
        index = self._start
        while True:
            with seeded(derive_seed(self._seed, SeedKind.INDEX, self._passes, index)):
                try:
                    indices = next(iterator)
                except StopIteration:
                    return
            if index >= self._skip:
                yield indices
            index += 1
