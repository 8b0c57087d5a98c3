"""BatchStream: an endless iterator over batches with a position, and a DataLoader that is left alone."""

import copy
import itertools
import pickle
import random
import warnings
from collections import UserList

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from mfac.gradients.loader import can_clone
from mfac.gradients.seeds import seeded
from mfac.gradients.stream import BatchStream


class Numbers(torch.utils.data.Dataset):
    """0 to n - 1 with noise of three generators; counts what is loaded."""

    def __init__(self, n=24, noise=False):
        self.n, self.noise, self.loaded = n, noise, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.loaded.append(int(i))
        noise = torch.rand(()) + random.random() + np.random.rand() if self.noise else 0.0  # noqa: NPY002
        return torch.tensor(float(i)) + noise


class Counting(IterableDataset):
    def __init__(self, noise=False):
        self.noise = noise

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for i in range(first, 24, step):
            yield torch.tensor(float(i)) + (torch.rand(()) if self.noise else 0)


def take(stream, count):
    return [batch.tolist() for batch in itertools.islice(stream, count)]


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.fixture(autouse=True)
def generators_stay():
    """No test moves a global generator on but by what it draws itself: see `states`."""
    before = states()
    yield
    assert states() == before


# ---- order and position


def test_lists_and_iterators_in_order():
    stream = BatchStream([0, 1, 2], 0)
    assert [next(stream) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert (stream.passes, stream.taken) == (3, 1)
    endless = itertools.count()
    stream = BatchStream(endless, 0)
    assert [next(stream) for _ in range(3)] == [0, 1, 2] and next(endless) == 3 and next(stream) == 4


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches: expected more batches, got none; pass a list or DataLoader"),
        (iter([]), "batches: expected more batches, got none; pass a list or DataLoader"),
        (iter([1, 2]), "batches: expected more batches, got an end after 2, .*; pass a list or DataLoader"),
        (DataLoader([]), "batches: expected more batches, got none"),
    ],
)
def test_batches_that_end(batches, message):
    with pytest.raises(ValueError, match=message):
        list(BatchStream(batches, 0))


def test_announced_once():
    stream = BatchStream([1, 2], 0, announce=3)
    with pytest.warns(UserWarning, match="batches: 2 batches for 3 gradients; they are used again") as caught:
        [next(stream) for _ in range(9)]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = BatchStream([1, 2], 0, announce=2)
        [next(stream) for _ in range(9)]


class Failing:
    """Raises once, at its third batch."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        for i in range(5):
            if i == 2 and self.error is not None:
                error, self.error = self.error, None
                raise error
            yield i


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("as_dataset", [False, True])
def test_an_error_is_not_the_end_of_a_pass(error, as_dataset):
    """After it, the batch that could not be had is tried again."""

    class Dataset(Failing, IterableDataset):
        pass

    stream = BatchStream(DataLoader(Dataset(error), batch_size=None) if as_dataset else Failing(error), 0)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(error):
        next(stream)
    assert [next(stream) for _ in range(4)] == [2, 3, 4, 0] and stream.passes == 2


def test_bad_input():
    with pytest.raises(TypeError, match="batches: expected an iterable of batches, got int"):
        BatchStream(3, 0)
    stream = BatchStream([1, 2], 0)
    next(stream)
    with pytest.raises(ValueError, match="state: expected seed, passes and taken, got none of passes, taken"):
        stream.load_state_dict({"seed": 1})
    with pytest.raises(ValueError, match=r"state\['taken'\]: expected an int >= 0, got -1"):
        stream.load_state_dict({"seed": 1, "passes": 1, "taken": -1})
    with pytest.raises(TypeError, match=r"state\['passes'\]: expected an int, got '1'"):
        stream.load_state_dict({"seed": 1, "passes": "1", "taken": 1})
    assert next(stream) == 2


class Shuffling(Sampler):
    """A custom sampler whose state is a list that it shuffles in place, by the generator of `random`."""

    def __init__(self, n=24):
        self.order = list(range(n))

    def __iter__(self):
        random.shuffle(self.order)
        yield from self.order


class Drawing(Sampler):
    """A custom batch sampler that draws every batch from torch's global generator."""

    def __iter__(self):
        for _ in range(6):
            yield torch.randint(24, (4,)).tolist()


class Relabelled(DataLoader):
    """Another constructor, the same iteration: cloned."""

    def __init__(self, data):
        super().__init__(data, batch_size=4, shuffle=True)


class Doubled(DataLoader):
    """Another iteration: gone through as it is."""

    def __iter__(self):
        for batch in super().__iter__():
            yield 2 * batch


class Wrapped:
    """A loader of another library."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


N = Numbers(noise=True)
LOADERS = {
    "list": lambda: [torch.arange(4) + 4 * i for i in range(6)],
    "sequence": lambda: UserList(torch.arange(4) + 4 * i for i in range(6)),
    "in order": lambda: DataLoader(N, 4),
    "shuffled": lambda: DataLoader(N, 4, shuffle=True),
    "own generator": lambda: DataLoader(N, 4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "no batches": lambda: DataLoader(torch.rand(6, 4, generator=torch.Generator()), batch_size=None, shuffle=True),
    "subset": lambda: DataLoader(N, 4, sampler=SubsetRandomSampler(range(24))),
    "weighted": lambda: DataLoader(N, 4, sampler=WeightedRandomSampler([1.0] * 24, 24)),
    "distributed": lambda: DataLoader(N, 4, sampler=DistributedSampler(N, 2, 1)),
    "custom sampler": lambda: DataLoader(N, 4, sampler=Shuffling()),
    "batch sampler": lambda: DataLoader(N, batch_sampler=BatchSampler(RandomSampler(N), 5, False)),
    "custom batch sampler": lambda: DataLoader(N, batch_sampler=Drawing()),
    "list of batches": lambda: DataLoader(N, batch_sampler=[[1, 2], [3, 4, 5], [6]]),
    "iterable": lambda: DataLoader(Counting(noise=True), 4),
    "subclass": lambda: Relabelled(N),
    "own iteration": lambda: Doubled(N, 4, shuffle=True),
    "wrapped": lambda: Wrapped(DataLoader(N, 4, shuffle=True)),
    "workers": lambda: DataLoader(Numbers(), 4, shuffle=True, num_workers=2),
    "iterable with workers": lambda: DataLoader(Counting(), 4, num_workers=2),
}
IN_ORDER = ("list", "sequence", "in order", "iterable", "list of batches", "iterable with workers")


@pytest.mark.parametrize("kind", LOADERS)
def test_resumed_anywhere(kind):
    """A new stream goes on as the first one did, in the middle of a pass and at its end, by a file's state or a copy's.

    With other random states, over a new loader, with the seed of the state.
    """
    stream, positions = BatchStream(LOADERS[kind](), 5), {}
    whole = []
    for i in range(15):
        if i in ((0, 2, 6, 9) if "workers" not in kind else (3,)):
            positions[i] = copy.deepcopy(stream), stream.state_dict()
        whole += take(stream, 1)
    for i, (twin, state) in positions.items():
        fresh = BatchStream(LOADERS[kind](), 99)
        with seeded(17):
            fresh.load_state_dict(state)
            assert take(fresh, 15 - i) == whole[i:], i
            assert take(twin, 15 - i) == whole[i:], i
    assert stream.state_dict() == fresh.state_dict() == twin.state_dict()


@pytest.mark.parametrize("kind", [kind for kind in LOADERS if kind not in IN_ORDER and "workers" not in kind])
def test_every_pass_has_an_order_of_its_own(kind):
    """And another seed gives others; the same seed the same."""
    with seeded(0):
        size = len(list(LOADERS[kind]()))
        passes = [take(BatchStream(LOADERS[kind](), seed), 2 * size) for seed in (1, 1, 2)]
    assert passes[0][:size] != passes[0][size:] and passes[0] == passes[1]
    assert passes[0] != passes[2] or kind == "distributed"  # which has a seed of its own


def test_augmentations_differ():
    """Noise of torch, random and numpy: a number of its own for every batch."""
    stream = BatchStream(DataLoader(Numbers(8, noise=True), 2), 0)
    noise = torch.tensor(take(stream, 8)).view(2, 4, 2)[:, :, 0] - torch.tensor([0.0, 2, 4, 6])
    assert len(set(noise.flatten().tolist())) == 8


def test_skipped_batches_are_not_loaded():
    dataset = Numbers()
    stream = BatchStream(DataLoader(dataset, 4), 0)
    stream.load_state_dict({"seed": 0, "passes": 3, "taken": 4})
    assert take(stream, 1) == [[16, 17, 18, 19]] and dataset.loaded == [16, 17, 18, 19]


def test_position_of_an_iterator():
    """It cannot go back: there is a warning, and it goes on where it is."""
    stream = BatchStream(iter([5, 6]), 0)
    with pytest.warns(UserWarning, match="an iterator cannot return to the state's position, after 3 batches"):
        stream.load_state_dict({"seed": 0, "passes": 1, "taken": 3})
    assert next(stream) == 5 and stream.taken == 4
    with pytest.raises(ValueError, match="got an end after 2"):
        list(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchStream(iter([5, 6]), 0).load_state_dict({"seed": 0, "passes": 0, "taken": 0})


@pytest.mark.parametrize("kind", ["list", "shuffled", "custom sampler", "wrapped"])
def test_pickle(kind):
    stream = BatchStream(LOADERS[kind](), 5)
    take(stream, 3)
    other = pickle.loads(pickle.dumps(stream))
    assert take(other, 9) == take(stream, 9)


def test_copies_share_the_batches():
    given = [torch.ones(2)]
    assert copy.deepcopy(BatchStream(given, 0))._batches is given


# ---- the training loop's loader


@pytest.mark.parametrize(
    ("workers", "sampler"),
    [(0, "shuffled"), (0, "custom"), (2, "shuffled"), (2, "iterable")],
)
def test_training_epoch_is_not_disturbed(workers, sampler):
    """An epoch under way, of persistent workers too, goes on as if no gradients had been collected."""

    def make():
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        if sampler == "iterable":
            return DataLoader(Counting(), 4, **options)
        generator = torch.Generator().manual_seed(7)
        chosen = {"sampler": Shuffling()} if sampler == "custom" else {"shuffle": True, "generator": generator}
        return DataLoader(Numbers(), 4, **chosen, **options)

    def train(loader, between):
        seen = []
        for _ in range(2):
            for i, batch in enumerate(loader):
                seen.append(batch.tolist())
                if i == 1:
                    between(loader)
        return seen

    def collect(loader):
        stream = BatchStream(loader, 0)
        assert len(take(stream, 8)) == 8
        stream.close()

    with seeded(1):
        expected = train(make(), lambda loader: None)
    with seeded(1):
        assert train(make(), collect) == expected


def test_no_workers_are_left():
    stream = BatchStream(DataLoader(Numbers(), 4, num_workers=1, persistent_workers=True), 0)
    take(stream, 2)
    workers = stream._iterator._workers
    assert workers[0].is_alive()
    stream.close()
    workers[0].join(5)
    assert not workers[0].is_alive() and take(stream, 1) == [[8, 9, 10, 11]]


def test_settings_are_taken_over():
    def collate(items):
        return -torch.stack(items)

    def started(worker):
        torch.utils.data.get_worker_info().dataset.n = 100 + worker

    class Seen(Numbers):
        def __getitem__(self, i):
            return torch.tensor(float(self.n))

    loader = DataLoader(
        Seen(),
        3,
        drop_last=True,
        num_workers=2,
        collate_fn=collate,
        worker_init_fn=started,
        multiprocessing_context="fork",
        prefetch_factor=1,
        timeout=60,
    )
    stream = BatchStream(loader, 0)
    assert take(stream, 2) == [[-100] * 3, [-101] * 3]
    for name in ("num_workers", "prefetch_factor", "timeout", "worker_init_fn", "collate_fn"):
        assert stream._batches._settings[name] == getattr(loader, name)
    stream.close()
    assert take(BatchStream(DataLoader(Numbers(5), 2, drop_last=True), 0), 3) == [[0, 1], [2, 3], [0, 1]]


def test_what_is_cloned():
    assert can_clone(DataLoader(N)) and can_clone(Relabelled(N))
    assert not can_clone(Doubled(N)) and not can_clone(Wrapped(None)) and not can_clone([1])
