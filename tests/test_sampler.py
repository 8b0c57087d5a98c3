"""Copies of samplers, so that an epoch of training under way goes on as if nothing had happened."""

import itertools
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_stream import Numbers, Shuffling, take
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from mfac.gradients.sampler import copy_sampler
from mfac.gradients.stream import BatchStream


class Nested(Sampler):
    """A custom sampler with state inside containers, objects and iterators."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.parts = [RandomSampler(range(24), generator=generator), RandomSampler(range(24), generator=generator)]
        self.rng = {"g": torch.Generator().manual_seed(2)}
        self.state = SimpleNamespace(pos=0, orders=[[0, 1, 2], [3, 4, 5]])
        self.cycle = itertools.cycle(range(24)) if sys.version_info < (3, 14) else iter(range(24))

    def __iter__(self):
        for part in self.parts:
            yield from itertools.islice(part, 4)
        yield from torch.randint(24, (4,), generator=self.rng["g"]).tolist()
        for _ in range(4):
            self.state.pos += 1
            self.state.orders[0].append(self.state.orders[0].pop(0))
            yield self.state.pos
            yield self.state.orders[0][0]
            yield next(self.cycle)


@pytest.mark.parametrize("as_batches", [False, True])
def test_samplers_with_state_at_any_depth(as_batches):
    def run(between):
        sampler = Nested()
        options = {"batch_sampler": BatchSampler(sampler, 2, False)} if as_batches else {"sampler": sampler}
        loader, seen = DataLoader(Numbers(64), **options), []
        for _ in range(2):
            for i, batch in enumerate(loader):
                seen.append(batch.tolist())
                if i in (1, 5, 9):
                    between(loader)
        return seen

    def collect(loader):
        stream = BatchStream(loader, 3)
        assert take(stream, 40) == take(BatchStream(loader, 3), 40)
        assert stream._batches._sampler is not loader.batch_sampler

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(collect) == run(lambda loader: None)


class Doubled(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield 2 * batch


def test_loaders_that_cannot_be_cloned():
    """With persistent workers, whose running epoch would be disturbed, there is a warning; not without."""
    with pytest.warns(UserWarning, match="batches: Doubled has an iteration of its own and persistent workers"):
        BatchStream(Doubled(Numbers(), num_workers=1, persistent_workers=True), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchStream(Doubled(Numbers(), num_workers=1), 0)
        BatchStream(DataLoader(Numbers(), num_workers=1, persistent_workers=True), 0)


def test_copies_of_samplers_share_the_data():
    data, other = Numbers(), [torch.ones(3)]
    sampler = SimpleNamespace(model=torch.nn.Linear(2, 2), parts=[RandomSampler(data), RandomSampler(other)])
    new = copy_sampler(sampler, None)
    assert new.model is sampler.model and new.parts is not sampler.parts and new.parts[0].data_source is data
    assert new.parts[1].data_source is not other and new.parts[1].data_source[0] is other[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_samplers_that_cannot_be_copied(workers):
    """A warning with the name, once; then they are used as they are. A generator goes on where it is."""

    def two_by_two():
        yield from ([i, i + 1] for i in range(0, 24, 2))

    message = "batches: the batch_sampler of the DataLoader, generator, cannot be copied .* is used as it is"
    with pytest.warns(UserWarning, match=message) as caught:
        stream = BatchStream(DataLoader(Numbers(), batch_sampler=two_by_two()), 0)
    assert take(stream, 2) == [[0, 1], [2, 3]] and len(caught) == 1
    stream.close()
    assert take(stream, 10) == [[i, i + 1] for i in range(4, 24, 2)]
    with pytest.raises(ValueError, match="batches: expected more batches, got none"):
        next(stream)

    class Locked(Shuffling):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.warns(UserWarning, match="the batch_sampler of the DataLoader, BatchSampler, cannot be copied .*lock"):
        stream = BatchStream(DataLoader(Numbers(), 4, sampler=Locked(), num_workers=workers), 0)
    assert sorted(i for batch in take(stream, 6) for i in batch) == list(range(24))
    stream.close()
