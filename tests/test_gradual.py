"""Pruner: gradual pruning along a training loop."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mfac
from mfac import GradientBuffer, Pruner, prunable_parameters, prune_step
from mfac.pruning.engine import Engine

mse = nn.functional.mse_loss
SIZES = {"0.weight": 60, "2.weight": 20}
D = 80


def make_batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator), torch.randn(4, 2, generator=generator)) for _ in range(count)]


BATCHES = make_batches()
DEFAULTS = {
    "batches": BATCHES,
    "loss_fn": mse,
    "sparsity": 0.8,
    "end": 8,
    "num_grads": 6,
    "damping": 1e-3,
    "progress": False,
}


def make_model():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2))


def make(model, **change):
    return Pruner(model, **DEFAULTS | change)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def train(model, optimizer, pruner, steps, feed=None):
    """The loop of the README; `steps` are the batches' numbers."""
    for i in steps:
        inputs, targets = BATCHES[i % len(BATCHES)]
        optimizer.zero_grad()
        mse(model(inputs), targets).backward()
        if feed is not None:
            feed.append(model)
        optimizer.step()
        pruner.step()


def zeros(model, names=SIZES):
    return sum(int((model.get_parameter(name) == 0).sum()) for name in names)


@pytest.mark.parametrize(
    ("initial", "final", "update"), [(0.0, 0.5, "none"), (0.4, 0.7, "none"), (0.0, 0.6, "joint"), (0.55, 0.8, "joint")]
)
def test_auto_updates_are_joint_where_more_than_half_of_the_weights_go_at_once(initial, final, update):
    """However many recomputations there are; it is the same as if the user asked for that update."""
    models = [make_model() for _ in range(2)]
    for model, asked in zip(models, ("auto", update), strict=True):
        options = {"sparsity": final, "initial_sparsity": initial, "start": 1, "end": 2, "update": asked}
        pruner = make(model, **options, recomputations=3, final_corrections=int(asked != "none"))
        planned = [planned.gradients for planned in pruner.plan()]
        train(model, sgd(model), pruner, range(2))
        used = [sum(step.new_gradients for step in result.steps) for _, result in pruner.results]
        assert pruner.finished and planned == used
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


# ---- schedule and counts


def test_training():
    """Masks hold through momentum and weight decay, never shrink, and the targets are exact at every update."""
    model = make_model()
    optimizer, pruner, old = sgd(model), make(model, initial_sparsity=0.3, frequency=2), {}
    for i in range(12):
        train(model, optimizer, pruner, [i])
        for name, mask in pruner.masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
            assert not (mask & ~old.get(name, mask)).any()
        old = pruner.masks
    assert [time for time, _ in pruner.results] == [1, 2, 4, 6, 8]  # due at 0, 2, 4, 6, 8
    targets = [0.3] + [0.3 + 0.5 * (1 - (1 - t / 8) ** 3) for t in (2, 4, 6)] + [0.8]
    assert [result.sparsity for _, result in pruner.results] == [1 - (D - round(t * D)) / D for t in targets]
    assert pruner.sparsity == 1 - 16 / 80 and zeros(model) == 64


def test_time_in_epochs():
    pruner = make(make_model(), start=1.0, end=2.0, frequency=0.25, initial_sparsity=0.35)
    times = [i / 10 for i in range(31)]
    done = [time for time in times if pruner.step(time) is not None]
    assert done == [1.0, 1.3, 1.5, 1.8, 2.0] == [time for time, _ in pruner.results]
    assert pruner.results[0][1].sparsity == 1 - 52 / 80
    assert pruner.step(50.0) is None


def test_one_shot_equals_prune_step():
    """One update at `end` is one prune_step with the gradients of the batches."""
    model, twin = make_model(), make_model()
    result = make(model, start=3, end=3, recomputations=1, corrections=0).step(3)
    expected = prune_step(twin, mfac.collect_gradients(twin, BATCHES, mse, 6), 0.8, damping=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert result.predicted_loss_increase == expected.predicted_loss_increase


def test_nothing_before_start(unchanged):
    model = make_model()
    pruner = make(model, start=5)
    with unchanged(model):
        assert [pruner.step() for _ in range(4)] == [None] * 4
    assert pruner.masks == {} and pruner.sparsity == 0 and pruner.results == []


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    initial=st.floats(0, 1),
    rise=st.floats(0, 1),
    recomputations=st.integers(1, 5),
    end=st.integers(1, 6),
)
def test_any_targets(n, initial, rise, recomputations, end):
    """No rounding of sparsities or counts makes an update fall below the masks, and the end is exact."""
    model = nn.Linear(n, 1)
    final = min(1.0, initial + rise)
    pruner = Pruner(
        model, criterion="magnitude", sparsity=final, initial_sparsity=initial, end=end, recomputations=recomputations
    )
    for _ in range(end):
        pruner.step()
    assert int((model.weight == 0).sum()) == round(final * n)


def test_constant_sparsity_in_several_steps():
    """1 - (1 - 0.1) < 0.1: on 15 weights that was one weight less than the masks held, and an error."""
    model = nn.Linear(15, 1)
    pruner = Pruner(model, criterion="magnitude", sparsity=0.1, initial_sparsity=0.1, end=3, recomputations=2)
    assert pruner.step().sparsity == 1 - 13 / 15
    assert pruner.step() is None and pruner.step() is None and pruner.sparsity == 1 - 13 / 15


def test_nothing_to_prune_collects_no_gradients():
    """A start from zero is no update: the first one is a frequency later."""
    pruner = make(make_model(), batches=[], end=4, frequency=2)
    assert pruner.step() is None
    with pytest.raises(ValueError, match="batches: "):
        pruner.step()


@pytest.mark.parametrize("final", [0.9, 1.0])
def test_recomputations(monkeypatch, final):
    """Equal ratios of the remaining weights, with new gradients of the model as it is at each; the target is exact."""
    calls, seen, step = [], [], Engine.step

    def spy(engine, grads, targets):
        calls.append(targets[None])
        seen.append(grads.tensor.clone())
        return step(engine, grads, targets)

    monkeypatch.setattr(Engine, "step", spy)
    model = make_model()
    pruner = make(model, sparsity=final, initial_sparsity=0.2, end=2, frequency=2, recomputations=3, refresh=6)
    pruner.step()
    pruner.step()
    assert calls[2] == 0.2 and calls[5] == final and zeros(model) == round(final * D)
    ratios = [(1 - b) / (1 - a) for a, b in itertools.pairwise([0.0, *calls[:3]])]
    assert ratios == pytest.approx([0.8 ** (1 / 3)] * 3)
    if final < 1:
        ratios = [(1 - b) / (1 - a) for a, b in itertools.pairwise(calls[2:])]
        assert ratios == pytest.approx([(0.1 / 0.8) ** (1 / 3)] * 3)
    else:  # no ratio leads to nothing: equal differences
        assert [b - a for a, b in itertools.pairwise(calls[2:])] == pytest.approx([0.8 / 3] * 3)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_batches_are_gone_through_in_turn():
    """num_grads batches at each recomputation, where the last one stopped; no complaint about reuse."""
    taken = []

    class Loader:
        def __iter__(self):
            for i, batch in enumerate(BATCHES):
                taken.append(i)
                yield batch

    pruner = make(
        make_model(), batches=Loader(), num_grads=4, refresh=4, initial_sparsity=0.2, end=2, recomputations=2,
        corrections=0,
    )  # fmt: skip
    pruner.step()
    pruner.step()
    assert taken == [i % 6 for i in range(16)]


# ---- ways to use it


def test_dict_sparsity(unchanged):
    """What no key names is left alone: neither pruned nor moved, and no gradients are collected for it."""
    model = make_model()
    pruner = make(model, sparsity={"2.weight": 0.5}, start=1, end=1)
    with unchanged(model, *model[0].parameters(), model[2].bias, weights=False):
        result = pruner.step()
    assert result.layers == [("2.weight", 20, 10)] and pruner.sparsity == 0.5


def test_dict_of_several():
    model = make_model()
    pruner = make(
        model, sparsity={"0.weight": 0.5, "re:2": 0.9}, initial_sparsity=0.1, end=3, frequency=3, recomputations=2
    )
    for _ in range(3):
        pruner.step()
    assert [zeros(model, [name]) for name in SIZES] == [30, 18]
    assert pruner.results[0][1].layers == [("0.weight", 60, 54), ("2.weight", 20, 18)]


def test_layer_scope():
    model = make_model()
    make(model, scope="layer", end=1, sparsity=0.75).step()
    assert [zeros(model, [name]) for name in SIZES] == [45, 15]


def test_magnitude():
    """Needs neither batches nor buffer, and moves no weight that stays."""
    model, twin = make_model(), make_model()
    pruner = Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
    result = pruner.step()
    prune_step(twin, None, 0.5, criterion="magnitude")
    assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[2].weight, twin[2].weight)
    assert result.predicted_loss_increase is None


@pytest.mark.parametrize("source", ["batches", "buffer"])
def test_magnitude_with_gradients(source):
    """The mask by magnitude, the update by the Fisher: as prune_step with the same gradients."""
    model, twin = make_model(), make_model()
    grads = mfac.collect_gradients(twin, BATCHES, mse, 6)
    change = {"recomputations": 1, "corrections": 0} if source == "batches" else {"batches": None, "buffer": grads}
    result = make(model, criterion="magnitude", end=1, **change).step()
    expected = prune_step(twin, grads, 0.8, damping=1e-3, criterion="magnitude")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert result.predicted_loss_increase == expected.predicted_loss_increase is not None


def test_live_buffer():
    """The gradients of the training loop itself, of the parameters that the buffer has."""
    model = make_model()
    buffer = GradientBuffer(3, prunable_parameters(model, "0.weight"), torch.bfloat16)
    pruner = Pruner(model, buffer=buffer, initial_sparsity=0.2, sparsity=0.8, start=4, end=8, frequency=2, damping=1e-3)
    train(model, sgd(model), pruner, range(8), feed=buffer)
    assert len(pruner.results) == 3 and zeros(model, ["0.weight"]) == 48 and list(pruner.masks) == ["0.weight"]


def test_live_buffer_not_full(unchanged):
    model = make_model()
    buffer = GradientBuffer(3, prunable_parameters(model))
    pruner = Pruner(model, buffer=buffer, sparsity=0.5, end=1)
    with unchanged(model), pytest.warns(UserWarning, match="buffer: only 0 of 3 gradients"):
        with pytest.raises(ValueError, match="grads: expected at least one gradient, got an empty GradientBuffer"):
            pruner.step()
    mse(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    buffer.append(model)
    with pytest.warns(UserWarning, match="buffer: only 1 of 3 gradients"):
        assert pruner.step().sparsity == 0.5  # the update that failed is still due


def test_leaves_no_trace(unchanged):
    """An update during training leaves modes, `.grad` and random state alone."""
    model = make_model().train()
    model[0].eval()
    mse(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    pruner = make(model, end=1)
    with unchanged(model, weights=False):
        assert pruner.step() is not None


def test_failed_update(unchanged):
    """Batches that end: the error says so and the weights are as they were."""
    model = make_model()
    pruner = make(model, batches=iter(BATCHES[:3]), end=1)
    with unchanged(model), pytest.raises(ValueError, match="batches: expected more batches, got an end after 3"):
        pruner.step()
    assert pruner.masks == {} and pruner.results == []


@pytest.mark.parametrize("criterion", ["fisher", "magnitude"])
def test_pattern(criterion):
    """A rising share of 2:4 groups; a layer that has none stays dense unless the user names it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 4))
    batches = [(torch.randn(4, 3), torch.randn(4, 4)) for _ in range(6)]
    source = {"batches": batches, "loss_fn": mse} if criterion == "fisher" else {"batches": None, "loss_fn": None}
    options = {**DEFAULTS, **source, "sparsity": 0.5, "end": 2, "pattern": "2:4", "criterion": criterion}
    pruner = Pruner(model, **options)
    shares = []
    for _ in range(3):
        pruner.step()
        shares.append(float((model[1].weight == 0).float().mean()))
    assert shares[-1] == 0.5 and shares == sorted(shares) and (model[0].weight != 0).all()
    pairs = (model[1].weight == 0).view(-1, 4).sum(1)
    assert (pairs == 2).all()
    with pytest.raises(ValueError, match=r"pattern: expected one that fits '0.weight'"):
        Pruner(model, params=["0.weight", "1.weight"], **options)
    with pytest.raises(ValueError, match=r"pattern: expected one that fits '0.weight'"):
        Pruner(model, **{**options, "sparsity": {"0.weight": 0.5}})
    with pytest.raises(ValueError, match=r"sparsity: expected at most 0.5 for .* all that 2:4 allows, got 0.9"):
        Pruner(model, **{**options, "sparsity": 0.9})


def test_rolling():
    """The ring keeps its rows between the recomputations of an update, and is new at the next."""
    calls = []

    def loss_fn(out, targets):
        calls.append(1)
        return mse(out, targets)

    pruner = make(make_model(), loss_fn=loss_fn, refresh=2, recomputations=3, corrections=0, start=1, end=2)
    counts = []
    for _ in range(2):
        pruner.step()
        counts.append(len(calls))
    assert counts == [0, 6 + 2 + 2]  # the first update is to nothing


@pytest.mark.parametrize("width", [16, 64])
def test_parameters_that_no_gradient_reaches_do_not_count(width):
    """They stay dense, and nothing holds against the others that they do."""
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(16, width)})
    options = {"forward": lambda model, batch: (model["used"](batch[0]), batch[1]), "end": 2, "sparsity": 0.75}
    pruner = make(model, **options)
    pruner.step(2)
    twin = copy.deepcopy(model)
    loaded = make(twin, **options)
    loaded.load_state_dict(pruner.state_dict())
    for one in (pruner, loaded):
        assert one.finished and one.layer_sparsities()["used.weight"][1] == 0.75
        mask = one.masks["used.weight"].clone()
        mask[mask.nonzero()[0].tolist()[0], mask.nonzero()[0].tolist()[1]] = False
        one.hold({"used.weight": mask})
        assert one.finished and one.plan() == [] and one.step(3) is None


def test_magnitude_collects_gradients_only_for_what_they_change():
    """Small steps of `update="auto"` move nothing."""
    model, calls = make_model(), []

    def loss_fn(outputs, targets):
        calls.append(1)
        return mse(outputs, targets)

    options = {"criterion": "magnitude", "loss_fn": loss_fn, "start": 1, "end": 2, "initial_sparsity": 0.4}
    pruner = make(model, **options, sparsity=0.7)
    assert [update.gradients for update in pruner.plan()] == [0, 0]
    pruner.step()
    pruner.step()
    assert pruner.finished and not calls
    joint = make(make_model(), **options, sparsity=0.9)
    assert [update.gradients > 0 for update in joint.plan()] == [False, True]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_prunes_what_no_gradient_reaches(scope):
    """Whether an update collects gradients or not: they choose nothing."""
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 4)})
    forward = {"forward": lambda model, batch: (model["used"](batch[0]), batch[1])}
    pruner = make(model, **forward, criterion="magnitude", end=2, schedule="linear", scope=scope, sparsity=0.75)
    planned = [update.sparsity for update in pruner.plan()]
    reached = []
    for time in (1, 2):
        pruner.step(time)
        reached.append(pruner.sparsity)
    assert reached == pytest.approx(planned, abs=0.03) and pruner.sparsity == 0.75
