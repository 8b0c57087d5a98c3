"""Natural-gradient corrections: the search for a step length, the direction, and what they do to a run."""

import math

import oracle
import pytest
import torch
from perceptron import make_batches, make_model
from torch import nn

import mfac
from mfac.gradients.source import GradientSource
from mfac.pruning.correction import MOMENTUM, Correction, correct, search_step_length

LOSS = nn.functional.cross_entropy
FAST = {"num_grads": 8, "refresh": 4, "recomputations": 3, "progress": False, "damping": 1e-3, "block_size": 50}


@pytest.mark.parametrize("start", [1e-4, 0.03, 1.0, 50.0])
def test_the_minimum_of_a_parabola(start):
    calls = []

    def loss(length):
        calls.append(length)
        return (length - 1) ** 2

    best, losses = search_step_length(loss, start)
    assert len(calls) == len(set(calls)) == len(losses) <= 20
    assert losses[best] == min(losses.values()) < 0.25


@pytest.mark.parametrize(
    "loss",
    [
        lambda length: length,
        lambda length: 0.0,
        lambda length: math.inf if length else 1.0,
        lambda length: math.nan if length else 1.0,
        lambda length: math.nan,
        lambda length: math.inf,
    ],
)
def test_no_step_that_does_not_lower_the_loss(loss):
    best, losses = search_step_length(loss, 0.1)
    assert best == 0.0 and len(losses) <= 9


def test_a_step_that_is_always_better():
    best, losses = search_step_length(lambda length: -length, 1.0)
    assert best == max(losses) and len(losses) <= 11


def test_overflow_beyond_the_minimum():
    best, losses = search_step_length(lambda length: math.inf if length > 2 else (length - 1) ** 2, 1.0)
    assert losses[best] < 0.25


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_direction_is_the_natural_gradient_of_the_kept_weights(monkeypatch, pattern):
    """-η F_SS⁻¹ ḡ_S with F and ḡ from the rows, in float64, S the kept weights and ḡ the mean of the newest rows."""
    model, batches, seen = make_model(), make_batches(), {}

    def spy(params, direction, measure, start, progress):
        seen.update(direction=direction.clone(), before=torch.cat([p.detach().flatten() for p in params.values()]))
        seen["done"] = correct(params, direction, measure, start, progress)
        return seen["done"]

    monkeypatch.setattr("mfac.pruning.engine.correct", spy)
    result = mfac.prune(
        model, batches, LOSS, 0.4, pattern=pattern, final_corrections=0, **{**FAST, "recomputations": 1}
    )
    other = make_model()
    rows = mfac.collect_gradients(other, iter(batches), LOSS, 8, progress=False).tensor.double()
    kept = torch.cat([mask.flatten() for mask in result.masks.values()])
    expected = torch.zeros(len(kept), dtype=torch.float64)
    for begin in range(0, len(kept), 50):
        block = torch.arange(begin, min(begin + 50, len(kept)))
        block = block[kept[block]]
        g = rows[:, block]
        fisher = 1e-3 * torch.eye(len(block), dtype=torch.float64) + g.T @ g / len(rows)
        expected[block] = torch.linalg.solve(fisher, g.mean(0))
    assert oracle.error(seen["direction"], expected) < 1e-4
    weights = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name in result.masks])
    done = seen["done"]
    assert done.step_length > 0 and done.loss_after < done.loss_before
    moved = seen["before"] - done.step_length * seen["direction"]
    assert torch.allclose(weights, moved, atol=1e-7) and not weights[~kept].any()


def test_momentum(monkeypatch):
    """A direction goes on in the next one where that is kept, but not after a correction that found no step."""
    product, raw, directions, lengths = mfac.Fisher.inverse_product, [], [], iter([0.1, 0.1, 0.0, 0.1, 0.1])

    def inverse_product(self, x):
        raw.append(product(self, x))
        return raw[-1].clone()

    def made(params, direction, *args):
        directions.append(direction.clone())
        return Correction(next(lengths), 1.0, 0.5, 3)

    monkeypatch.setattr(mfac.Fisher, "inverse_product", inverse_product)
    monkeypatch.setattr("mfac.pruning.engine.correct", made)
    result = mfac.prune(make_model(), make_batches(), LOSS, 0.8, corrections=1, final_corrections=2, **FAST)
    kept = [direction != 0 for direction in directions]
    assert kept[0].sum() > kept[2].sum() == sum(int(mask.sum()) for mask in result.masks.values())
    for i, before in enumerate([0, 1, 1, 0, 1]):  # the third finds no step
        expected = raw[i] + (MOMENTUM * directions[i - 1] if before else 0)
        assert torch.allclose(directions[i], expected * kept[i], rtol=1e-5, atol=1e-8)


def test_they_lower_the_loss():
    losses = {}
    for corrections in (0, 1):
        model = make_model()
        mfac.prune(model, make_batches(), LOSS, 0.7, corrections=corrections, **FAST)
        losses[corrections] = sum(LOSS(model(x), y).item() for x, y in make_batches(seed=1))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("corrections", "final", "expected"),
    [(0, 0, [8, 4, 4]), (0, 3, [8, 4, 4]), (1, 0, [8, 4, 4]), (3, 2, [8, 4, 4, 2, 2]), (9, 1, [8, 4, 4, 1])],
)
def test_new_gradients_and_steps(monkeypatch, corrections, final, expected):
    calls = []
    monkeypatch.setattr("mfac.pruning.engine.correct", lambda *args: calls.append(1) or correct(*args))
    result = mfac.prune(
        make_model(), make_batches(), LOSS, 0.5, corrections=corrections, final_corrections=final,
        correction_batches=2, **FAST,
    )  # fmt: skip
    assert [step.new_gradients for step in result.steps] == expected
    assert len(calls) == (0 if corrections == 0 else 1 + 2 * min(corrections, 4) + final)
    assert [step.step_length is None for step in result.steps] == [corrections == 0] * len(expected)
    assert [step.predicted_loss_increase is None for step in result.steps] == [False] * 3 + [True] * (len(expected) - 3)
    assert (result.sparsity == pytest.approx(0.5, abs=0.01) and "corrections" in result.seconds) or not corrections
    assert len(str(result).splitlines()) == 4 + 1 + len(expected) + 2
    assert mfac.PruneResult.from_dict(result.to_dict()).steps == result.steps


def test_the_same_seed_gives_the_same_bits():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(200, 10), torch.randint(5, (200,))), 10, shuffle=True
    )
    states = []
    for _ in range(2):
        model = make_model()
        torch.manual_seed(3)
        mfac.prune(model, loader, LOSS, 0.7, corrections=2, final_corrections=2, **FAST)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("of the model")])
@pytest.mark.parametrize("call", [0, 1, 2, 4])
def test_interrupted_while_it_is_judged(monkeypatch, error, call):
    """The weights are those of before the correction; the masks hold."""
    model, before, count = make_model(), {}, [0]

    def interrupted(params, direction, measure, start, progress):
        before.update({name: p.detach().clone() for name, p in params.items()})

        def loss():
            count[0] += 1
            if count[0] > call:
                raise error
            return 1.0 / count[0]

        return correct(params, direction, loss, start, progress)

    monkeypatch.setattr("mfac.pruning.engine.correct", interrupted)
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as info:
        mfac.prune(model, make_batches(), LOSS, 0.7, corrections=1, **FAST)
    params = dict(model.named_parameters())
    assert all(torch.equal(params[name], x) for name, x in before.items())
    masks = info.value.result.masks
    assert masks and all(not params[name][~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("update", ["none", "independent"])
def test_another_update_is_not_corrected_unasked(update):
    options = {"update": update, "correction_batches": 2, **FAST}
    assert all(
        step.step_length is None for step in mfac.prune(make_model(), make_batches(), LOSS, 0.5, **options).steps
    )
    model, result = make_model(), None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = mfac.prune(model, make_batches(), LOSS, 0.5, **{**options, "update": "none"})
    assert all(torch.equal(p, before[n] * result.masks.get(n, 1)) for n, p in model.named_parameters())
    steps = mfac.prune(make_model(), make_batches(), LOSS, 0.5, corrections=1, **options).steps
    assert all(step.step_length is not None for step in steps)


def test_batches_that_end():
    batches, model = iter(make_batches(8 + 3)), make_model()
    with pytest.raises(ValueError, match="batches") as info:
        mfac.prune(model, batches, LOSS, 0.7, corrections=1, **FAST)
    assert 0 < info.value.result.sparsity < 0.7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype)
    batches = [(x.to(dtype), y) for x, y in make_batches()]
    result = mfac.prune(model, batches, LOSS, 0.5, corrections=1, final_corrections=1, **FAST)
    assert model[0].weight.dtype == dtype and result.sparsity == pytest.approx(0.5, abs=0.01)
    assert any(step.step_length for step in result.steps)
    assert all(not p[~result.masks[name]].any() for name, p in model.named_parameters() if name in result.masks)


def test_batches_whose_memory_is_reused():
    """The judging batches are copies."""
    batches = make_batches(40)
    x, y = batches[0][0].clone(), batches[0][1].clone()

    def reusing():
        while True:
            for a, b in batches:
                x.copy_(a), y.copy_(b)
                yield x, y

    def plain():
        while True:
            yield from batches

    results = []
    for source in (reusing, plain):
        model = make_model()
        mfac.prune(model, source(), LOSS, 0.6, corrections=1, **FAST)
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_a_zero_gradient_is_no_direction():
    model = nn.Linear(6, 2, bias=False)
    result = mfac.prune(
        model, [(torch.randn(4, 6), torch.zeros(4, 2))] * 8, lambda output, target: 0 * output.sum(), 0.5,
        corrections=1, **FAST,
    )  # fmt: skip
    assert all(step.step_length == 0 for step in result.steps)


def test_pruner():
    model, losses = make_model(), {}
    for corrections in (0, 1):
        model = make_model()
        pruner = mfac.Pruner(model, make_batches(), LOSS, sparsity=0.7, end=2, corrections=corrections, **FAST)
        for _ in range(2):
            pruner.step()
        losses[corrections] = sum(LOSS(model.eval()(x), y).item() for x, y in make_batches(seed=1))
        lengths = [step.step_length for _, result in pruner.results for step in result.steps]
        assert len(lengths) >= 3 and all((length is None) == (corrections == 0) for length in lengths)
    assert losses[1] < losses[0]


def test_a_buffer_has_no_batches_to_judge_by():
    model = make_model()
    buffer = mfac.GradientBuffer(4, mfac.prunable_parameters(model))
    with pytest.raises(ValueError, match=r"^corrections: expected 0 without batches, which judge them"):
        mfac.Pruner(model, buffer=buffer, sparsity=0.5, end=1, corrections=1)
    with pytest.raises(ValueError, match="final_corrections: expected 0 without batches"):
        mfac.Pruner(model, buffer=buffer, sparsity=0.5, end=1, final_corrections=1)


@pytest.mark.parametrize("kind", ["buffer", "tensor", "dicts"])
def test_prune_step_with_batches(kind):
    """The same step, then -η F_SS⁻¹ ḡ_S with the mean of all rows."""
    batches, plain, model = make_batches(), make_model(), make_model()
    grads = mfac.collect_gradients(plain, batches[:20], LOSS, 20, progress=False)
    given = {"buffer": grads, "tensor": grads.tensor}.get(kind)
    if given is None:
        params = mfac.prunable_parameters(plain)
        sizes = [p.numel() for p in params.values()]
        given = [
            {name: part.view(p.shape) for (name, p), part in zip(params.items(), row.split(sizes), strict=True)}
            for row in grads.tensor
        ]
    without = mfac.prune_step(plain, given, 0.6, damping=1e-3, block_size=50)
    result = mfac.prune_step(model, given, 0.6, batches=batches[20:], loss_fn=LOSS, damping=1e-3, block_size=50)
    assert without.step_length is None and result.step_length > 0 and "correction" in result.seconds
    assert all(torch.equal(without.masks[name], mask) for name, mask in result.masks.items())
    kept = torch.cat([mask.flatten() for mask in result.masks.values()])
    fisher = mfac.Fisher(grads, result.damping, 50, active=kept)
    direction = fisher.inverse_product(grads.mean()) * kept
    weights = [torch.cat([m.get_parameter(name).detach().flatten() for name in result.masks]) for m in (plain, model)]
    assert torch.allclose(weights[0] - result.step_length * direction, weights[1], atol=1e-6)
    losses = [sum(LOSS(m.eval()(x), y).item() for x, y in batches[20:28]) for m in (plain, model)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grads": None, "criterion": "magnitude"}, ValueError, "batches: expected None without gradients"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"loss_fn": 3}, TypeError, "loss_fn: expected"),
        ({"correction_batches": 0}, ValueError, "correction_batches: expected an int >= 1, got 0"),
        ({"mode": "test"}, ValueError, "mode: expected"),
    ],
)
def test_prune_step_refuses(unchanged, options, error, message):
    model = make_model()
    grads = torch.randn(8, 180)
    with unchanged(model), pytest.raises(error, match=message):
        mfac.prune_step(model, **{"grads": grads, "batches": make_batches(), "loss_fn": LOSS, **options})


def test_mean_of_the_newest_rows():
    buffer = mfac.GradientBuffer(3, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="newest: expected an int 1 to 0, got 1"):
        buffer.mean(1)
    for value in range(1, 6):
        buffer.append_gradients([torch.full((2,), float(value))])
    assert (
        buffer.mean().tolist() == [4, 4] and buffer.mean(1).tolist() == [5, 5] and buffer.mean(2).tolist() == [4.5] * 2
    )
    with pytest.raises(ValueError, match="newest: expected an int 1 to 3, got 4"):
        buffer.mean(4)


def test_a_model_that_writes_to_its_inputs_is_judged_on_the_same_ones():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, x):
            return self.inner(x.sub_(1.0).mul_(2.0))

    source = GradientSource(make_batches(), LOSS, num_grads=4)
    measure = source.hold(Writes().eval(), 3)
    assert measure() == measure() == measure()


def test_batches_that_are_not_finite_do_not_judge():
    batches = make_batches(20)
    batches[2] = (batches[2][0] * math.nan, batches[2][1])
    result = mfac.prune(make_model(), batches, LOSS, 0.5, **FAST)
    assert any(step.step_length for step in result.steps)
    options = {"batches": [batches[2]], "loss_fn": LOSS, "correction_batches": 2}
    with pytest.warns(UserWarning, match="corrections: expected batches of finite loss"):
        result = mfac.prune_step(make_model(), torch.randn(8, 180), 0.5, **options)
    assert result.step_length == 0


@pytest.mark.parametrize(
    ("sparsity", "given"), [(0.5, {"corrections": 1}), (0.6, {"corrections": None, "update": "auto"})]
)
def test_an_update_whose_corrections_were_interrupted_stays_due(sparsity, given):
    calls, model = [], make_model()

    def loss_fn(out, y):
        calls.append(1)
        if len(calls) == 20:  # after 8 gradients and some judges
            raise RuntimeError("of the loss")
        return LOSS(out, y)

    settings = {**FAST, "recomputations": 1, "final_corrections": 1, **given}
    pruner = mfac.Pruner(model, make_batches(), loss_fn, sparsity=sparsity, end=1, **settings)
    with pytest.raises(RuntimeError, match="of the loss"):
        pruner.step()
    assert pruner.sparsity == sparsity and pruner.results == []
    result = pruner.step()
    assert len(result.steps) == 2 and pruner.finished and len(pruner.results) == 1 and pruner.step() is None


@pytest.mark.parametrize("options", [{"corrections": 0}, {"update": "none"}, {"update": "independent"}])
def test_final_corrections_need_corrections(options):
    with pytest.raises(ValueError, match="final_corrections: expected 0 without batches or corrections, got 5"):
        mfac.Pruner(make_model(), make_batches(), LOSS, sparsity=0.5, end=1, final_corrections=5, **options)


def test_weights_that_do_not_move_keep_their_digits_and_infinite_ones_are_not_taken():
    weights = {"p": torch.full((4,), math.pi, dtype=torch.float64)}
    direction = torch.tensor([0.0, 1.0, 0.0, 1.0])
    done = correct(weights, direction, lambda: float(weights["p"][1]), 1.0)
    assert done.step_length > 0 and weights["p"][0] == weights["p"][2] == math.pi
    half = {"p": torch.ones(2, dtype=torch.float16)}
    correct(half, -torch.ones(2), lambda: -float(half["p"].float().clamp(max=1e6).sum()), 1e4)
    assert torch.isfinite(half["p"]).all()


def test_results_from_before_there_were_corrections():
    values = mfac.prune(make_model(), make_batches(), LOSS, 0.5, **FAST).to_dict()
    del values["step_length"], values["substeps"]
    for row in values["steps"]:
        del row["step_length"], row["substeps"]
    read = mfac.PruneResult.from_dict(values)
    assert read.substeps == 1 and read.steps[0].step_length is None
