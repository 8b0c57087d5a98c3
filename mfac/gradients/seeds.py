"""Seeds for fetching batches, and the context that applies them to torch, random and numpy."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mfac.interrupts import write_whole


class SeedKind(enum.IntEnum):
    """What a seed is used for; the numbers are part of every saved position."""

    START = 1  # a pass over the batches is started
    BATCH = 2  # a batch is fetched
    ITERATE = 10  # the iteration over a sampler is started
    WORKERS = 11  # of worker processes
    SAMPLER = 12  # of a sampler's generator
    INDEX = 13  # an index is drawn from a sampler
    COLLECT = 20  # the model draws while gradients are collected
    MEASURE = 21  # the model draws while the loss is measured
    RANK = 30  # the root of another process than the first


def derive_seed(seed: int, kind: SeedKind, passes: int = 0, index: int = 0) -> int:
    """Derive an independent seed for one event.

    Args:
        seed: The root, any int.
        kind: What it is used for.
        passes: Number of the pass.
        index: Number of the batch in it.

    Returns:
        63 bits, the same on every machine.
    """
    entropy = (seed % 2**64, kind, passes, index)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def current_seed() -> int:
    """Return a seed derived from torch's random state, which is not advanced."""
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu", generator=torch.default_generator))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), random and numpy, and restore them on exit.

    Args:
        seed: At most 63 bits.

    Yields:
        Nothing.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the global one, which datasets draw from
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            write_whole(lambda: (random.setstate(states[0]), np.random.set_state(states[1])))  # noqa: NPY002
