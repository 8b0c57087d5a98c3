"""Iteration over a DataLoader without side effects on the training loop that uses it at the same time."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from mfac.gradients.seeds import SeedKind, derive_seed, seeded

_CONTAINERS = (list, set, dict, deque, bytearray, np.ndarray)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


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
    an epoch of training in progress, with persistent workers or without, is not disturbed.

    Args:
        loader: One for which :func:`can_clone` is true.
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
        self._sampler = None
        if self.by_index:
            self._batched = loader.batch_sampler is not None
            self._sampler = _copied(loader.batch_sampler if self._batched else loader.sampler, loader.dataset, None, 0)
        else:
            self._settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}

    def iterate(self, seed: int, passes: int, skip: int) -> Iterator[Any]:
        """Start a pass.

        Args:
            seed: All seeds are derived from it.
            passes: Number of the pass, which decides the order of a loader that shuffles.
            skip: Number of batches to skip at the beginning without loading them; only if ``by_index``.

        Returns:
            An iterator; its worker processes stop when it is deleted.
        """
        # Workers of an iterable dataset restart at its beginning, so they must draw the same random numbers again.
        workers = derive_seed(seed, SeedKind.WORKERS, passes, skip if self.by_index else 0)
        settings = self._settings | {"generator": torch.Generator().manual_seed(workers)}
        if self.by_index:
            sampler = _copied(self._sampler, self._dataset, derive_seed(seed, SeedKind.SAMPLER, passes), passes)
            indices = _Indices(sampler, seed, passes, skip)
            settings |= {"batch_sampler": indices} if self._batched else {"sampler": indices, "batch_size": None}
        return iter(DataLoader(self._dataset, **settings))


class _Indices:
    """The indices of a sampler after the first ``skip``; each draw is seeded, however far workers prefetch."""

    def __init__(self, sampler: Any, seed: int, passes: int, skip: int) -> None:
        self._sampler, self._seed, self._passes, self._skip = sampler, seed, passes, skip

    def __iter__(self) -> Iterator[Any]:
        with seeded(derive_seed(self._seed, SeedKind.ITERATE, self._passes)):
            iterator = iter(self._sampler)
        index = 0
        while True:
            with seeded(derive_seed(self._seed, SeedKind.INDEX, self._passes, index)):
                try:
                    indices = next(iterator)
                except StopIteration:
                    return
            if index >= self._skip:
                yield indices
            index += 1


def _copied(sampler: Any, dataset: Any, seed: int | None, passes: int) -> Any:
    """Copy a sampler and those nested in it: the dataset is shared, generators and containers are not."""
    new = copy.copy(sampler)
    for name, value in list(vars(new).items()) if hasattr(new, "__dict__") else []:
        if value is dataset:
            continue
        if name == "generator" and seed is not None and (value is None or isinstance(value, torch.Generator)):
            new.generator = torch.Generator(value.device if value is not None else "cpu").manual_seed(seed)
        elif isinstance(value, torch.Generator):
            setattr(new, name, torch.Generator(value.device))
            getattr(new, name).set_state(value.get_state())
        elif isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
            setattr(new, name, _copied(value, dataset, seed, passes))
        elif isinstance(value, _CONTAINERS):
            setattr(new, name, copy.copy(value))
        elif isinstance(value, torch.Tensor):
            setattr(new, name, value.clone())
        elif isinstance(value, _GENERATORS):
            setattr(new, name, copy.deepcopy(value))
    if seed is not None and callable(getattr(new, "set_epoch", None)):  # DistributedSampler shuffles by its epoch
        new.set_epoch(passes)
    return new
