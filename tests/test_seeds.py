"""Seeds: derived, taken from torch's random state, and applied for a while."""

import itertools
import random

import numpy as np
import pytest
import torch

from mfac.gradients.seeds import SeedKind, current_seed, derive_seed, seeded


def draw():
    return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002


def test_derived_seeds_differ():
    seeds = [derive_seed(*key) for key in itertools.product((0, 1, 2**63, -1), SeedKind, (0, 1), (0, 1))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_are_the_same_everywhere_and_for_ever():
    assert derive_seed(1, SeedKind.BATCH, 3, 4) == 7661749924751933381
    assert [int(kind) for kind in SeedKind] == [1, 2, 10, 11, 12, 13, 20, 21, 30]


def test_seeded_is_undone():
    with seeded(3):
        first = draw()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(KeyError), seeded(3):
        assert draw() == first
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_interrupted_while_it_is_undone(monkeypatch):
    before, restore, calls = np.random.get_state()[1].copy(), random.setstate, []  # noqa: NPY002

    def interrupted(state):
        calls.append(state)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(state)

    monkeypatch.setattr(random, "setstate", interrupted)
    with pytest.raises(KeyboardInterrupt), seeded(3):
        pass
    assert len(calls) == 2 and (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_current_seed_follows_the_random_state_of_torch():
    assert current_seed() == current_seed()
    before = current_seed()
    torch.rand(1)
    assert current_seed() != before
