"""GradientSource: a buffer of gradients that is renewed, and a position to go on from."""

import copy
import io
import itertools
import math
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac import collect_gradients, reestimate_batchnorm
from mfac.gradients.seeds import seeded
from mfac.gradients.source import GradientSource

mse = nn.functional.mse_loss
NAMES = ["0.weight", "2.weight"]


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))


def make_batches(count=10):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 4, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)]


class Data(TensorDataset):
    """Inputs with noise of three generators."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(4) + random.random() + np.random.rand(), y  # noqa: NPY002


def make_loader(workers=0):
    inputs, targets = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    return DataLoader(
        Data(inputs, targets), 5, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )  # fmt: skip


def make(batches, loss_fn=mse, num_grads=6, refresh=2, **options):
    return GradientSource(batches, loss_fn, num_grads=num_grads, refresh=refresh, **options)


def collect(source, model, times=1):
    return [source.collect(model, NAMES).tensor.clone() for _ in range(times)]


# ---- the buffer


@pytest.mark.parametrize("kind", ["iterator", "list"])
def test_order_of_batches(kind, unchanged):
    """num_grads of them, then `refresh` each, the measurements drawing further ones: as by hand from an iterator."""
    model, batches = make_model(), make_batches()
    given = itertools.cycle(batches) if kind == "iterator" else batches
    source, by_hand, buffer = make(given), itertools.cycle(batches), None
    with unchanged(model):
        for count in (6, 2, 2, 2):
            buffer = collect_gradients(model, by_hand, mse, count, buffer=buffer)
            assert torch.equal(source.collect(model, NAMES).tensor, buffer.tensor)
            assert source._buffer.loss == buffer.loss and source._buffer.samples == buffer.samples == 5
            expected = [mse(copy.deepcopy(model).eval()(x), y).item() for x, y in itertools.islice(by_hand, 3)]
            assert source.loss(model, 3) == pytest.approx(sum(expected) / 3)
    if kind == "iterator":
        assert next(given)[0] is next(by_hand)[0]


def test_release_renews_all_rows():
    source, model = make(make_batches()), make_model()
    first, second = collect(source, model, 2)
    assert (first == second).all(1).tolist() == [False] * 2 + [True] * 4
    source.release()
    assert not (collect(source, model)[0] == second).all(1).any()
    assert source.state_dict()["taken"] == 14 - 10


def test_options_reach_the_buffer():
    def forward(model, batch):
        return model(batch[0]), batch[2]

    batches = [(x, "id", y) for x, y in make_batches()]
    model = make_model()
    source = make(batches, forward=forward, mode="train", dtype=torch.bfloat16, device="disk")
    first, second = collect(source, model, 2)
    assert first.dtype == torch.bfloat16 and source._buffer.storage != torch.device("cpu")
    again = make(batches, forward=forward, mode="train", dtype=torch.bfloat16)
    assert torch.equal(collect(again, model, 2)[1], second)  # dropout has a seed too
    assert math.isfinite(again.loss(model, 2)) and again.loss(model, 2) != make(batches, forward=forward).loss(model, 2)


def test_batches_are_an_endless_iterator():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    source = make(make_loader())
    reestimate_batchnorm(model, source.batches, 12)
    assert source.state_dict()["passes"] == 2 and source.state_dict()["taken"] == 2


def test_other_parameters():
    source, model = make(make_batches()), make_model()
    source.collect(model, NAMES)
    with pytest.raises(ValueError, match=r"params: expected those of the buffer, \['0.weight', '2.weight'\], got"):
        source.collect(model, ["0.weight"])


def test_fewer_batches_than_gradients():
    with pytest.warns(UserWarning, match="batches: 4 batches for 6 gradients; they are used again") as caught:
        collect(make(make_batches(4)), make_model(), 4)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source, model = make(make_batches(6)), make_model()
        collect(source, model, 4)
    source.resize(8, 2)  # num_grads that grow with sparsity
    with pytest.warns(UserWarning, match="batches: 6 batches for 8 gradients; they are used again"):
        collect(source, model, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        ({"num_grads": 2.0}, TypeError, "num_grads: expected an int, got 2.0"),
        ({"refresh": 7}, ValueError, "refresh: expected an int 1 to 6, got 7"),
        ({"refresh": 0}, ValueError, "refresh: expected an int 1 to 6, got 0"),
        ({"refresh": True}, TypeError, "refresh: expected an int, got True"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected a function or None, got 3"),
        ({"forward": 3}, TypeError, "forward: expected a function or None, got 3"),
        ({"mode": "test"}, ValueError, "mode: expected one of eval, train, got 'test'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        make(**{"batches": make_batches(), **change})


# ---- position


@pytest.mark.parametrize("kind", ["list", "shuffled", "workers"])
def test_resumed_equals_uninterrupted(kind, unchanged):
    """From a file, in the middle of a pass, under another random state; all rows are new."""

    def batches():
        return make_batches() if kind == "list" else make_loader(2 if kind == "workers" else 0)

    model, loader = make_model(), batches()
    source = make(loader)
    with unchanged(model):
        collect(source, model, 2)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        source.release()
        expected = [*collect(source, model, 3), source.loss(model, 3)]
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert (state["passes"], state["taken"]) == (1, 8)

    torch.manual_seed(77)
    resumed = make(batches())
    resumed.load_state_dict(state)
    for tensor in expected[:3]:
        assert torch.equal(collect(resumed, model)[0], tensor)
    assert resumed.loss(model, 3) == expected[3]
    assert resumed.state_dict() == source.state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", ["list", "loader"])
def test_copies_go_on_by_themselves(copied, kind):
    source, model = make(make_batches() if kind == "list" else make_loader()), make_model()
    collect(source, model)
    twin = copied(source)
    before = source.state_dict(), source._buffer.tensor.clone()
    rows = collect(twin, model, 3)
    assert source.state_dict() == before[0] and torch.equal(source._buffer.tensor, before[1])
    assert all(torch.equal(one, other) for one, other in zip(rows, collect(source, model, 3), strict=True))


def test_deepcopy_shares_batches_and_functions():
    given, loss_fn = make_batches(), lambda out, targets: mse(out, targets)
    twin = copy.deepcopy(make(given, loss_fn))
    assert twin._loss_fn is loss_fn and twin.batches._batches is given
    twin = copy.deepcopy(make(iter(given)))
    assert collect(twin, make_model())[0].shape == (6, 18)


def test_iterators_go_on_where_they_are():
    source, model = make(iter(make_batches())), make_model()
    with pytest.warns(UserWarning, match="an iterator cannot return to the state's position, after 8 batches"):
        source.load_state_dict({"seed": 0, "passes": 1, "taken": 8})
    assert torch.equal(collect(source, model)[0], collect(make(make_batches()), model)[0])
    collect(source, model, 2)
    with pytest.raises(ValueError, match="batches: expected more batches, got an end after 10"):
        source.collect(model, NAMES)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, "state: expected seed, passes and taken, got none of passes, seed, taken"),
        ({"seed": 0, "passes": 1, "taken": 2.5}, TypeError, r"state\['taken'\]: expected an int, got 2.5"),
        ({"seed": 0, "passes": 1, "taken": -1}, ValueError, r"state\['taken'\]: expected an int >= 0, got -1"),
    ],
)
def test_bad_state(state, error, message):
    source, model = make(make_batches()), make_model()
    collect(source, model)
    before, buffer = source.state_dict(), source._buffer
    with pytest.raises(error, match=message):
        source.load_state_dict(state)
    assert source.state_dict() == before and source._buffer is buffer


def test_training_loader_is_left_alone():
    """A loader with persistent workers in mid-epoch: the training goes on in its own order, random state included."""

    def epochs(loader, between):
        seen = []
        for _ in range(2):
            for i, (x, _) in enumerate(loader):
                seen.append(x)
                if i in (1, 6):
                    between()
        return torch.stack(seen)

    model = make_model()
    with seeded(1):
        expected = epochs(make_loader(2), lambda: None)
    with seeded(1):
        loader = make_loader(2)
        source = make(loader)
        assert torch.equal(epochs(loader, lambda: source.collect(model, NAMES)), expected)


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_global_generators_stay(kind):
    model, states = make_model(), []
    for times in (0, 2):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
        source = make(make_loader() if kind == "loader" else make_batches())
        collect(source, model, times)
        if times:
            source.loss(model, 2)
        states.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert states[0] == states[1]


class Interrupt:
    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return mse(outputs, targets)


def test_interrupted(unchanged):
    """The rows so far are valid, no worker is left, and the next collection makes the buffer full."""
    source, model = make(make_loader(1), Interrupt()), make_model()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        source.collect(model, NAMES)
    assert len(source._buffer) == 2 and source.batches._iterator is None
    assert source.state_dict()["taken"] == 3
    assert source.collect(model, NAMES).shape == (6, 18) and source.state_dict()["taken"] == 9
