"""damping="auto" and block_size="auto": what is tried, and how it is judged."""

import json
import math

import oracle
import pytest
import torch
from oracle import BACKENDS
from perceptron import make_batches, make_model
from torch import nn

import mfac
from mfac.pruning.auto import BLOCK_SIZES, DAMPINGS, NUM_JUDGES

LOSS = nn.functional.cross_entropy
AUTO = {"damping": "auto", "block_size": "auto", "progress": False}


def linear(inputs=12, outputs=10):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False)


def signed_rank(default, other):
    """z of Wilcoxon's test that `other` is smaller, by its definition."""
    differences, n = sorted((default - other).tolist(), key=abs), len(default)
    total = sum(rank * ((x > 0) - (x < 0)) for rank, x in enumerate(differences, 1))
    return total / (n * (n + 1) * (2 * n + 1) / 6) ** 0.5


def chosen(candidates):
    best = max(candidates, key=lambda c: c.z_score)
    return best if best.z_score > 3 else candidates[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_takes_the_best_of_its_table(backend):
    """The scores are those of steps made by hand from three quarters of the gradients; the default stands unless one is
    better by more than three standard errors."""
    grads, options = oracle.gradients(40, 120), {"substeps": 2, "backend": backend}
    result = mfac.prune_step(linear(), grads, 0.6, damping="auto", block_size="auto", **options)
    fit, rest = grads[:30], grads[30:]
    best, squares = chosen(result.candidates), []
    scale = float(fit.square().mean())
    tried = [(round(c.damping / scale, 6), c.block_size) for c in result.candidates]
    assert tried[:2] == [(3e-2, 120), (1e-2, 64)] and len(set(tried)) == len(tried) > len(DAMPINGS)
    for candidate in result.candidates:
        model = linear()
        before = model.weight.detach().flatten().clone()
        options |= {"damping": candidate.damping, "block_size": candidate.block_size}
        mfac.prune_step(model, fit, 0.6, **options)
        squares.append((rest @ (model.weight.detach().flatten() - before)).square())
        assert candidate.score == pytest.approx(0.5 * float(squares[-1].mean()), rel=1e-3)
        assert candidate.z_score == pytest.approx(signed_rank(squares[0], squares[-1]), abs=0.1)
    assert result.block_size == best.block_size
    assert result.damping / float(grads.square().mean()) == pytest.approx(best.damping / scale, rel=1e-5)


def test_auto_looks_at_the_neighbours_of_the_best():
    """All block sizes at one damping, all dampings at the best of them, and the sizes next to it at the best
    damping."""
    torch.manual_seed(0)
    grads = oracle.gradients(40, 600)
    result = mfac.prune_step(linear(20, 30), grads, 0.6, damping="auto", block_size="auto", substeps=1)
    scale = float(grads[:30].square().mean())
    tried = {(float(f"{c.damping / scale:.3g}"), c.block_size): c.z_score for c in result.candidates}
    sizes, dampings = [b for b in BLOCK_SIZES if b < 600], [float(d.split("*")[0]) for d in DAMPINGS]
    first = max([(3e-2, 512), *((1e-2, b) for b in sizes)], key=tried.get)[1]
    assert set(tried) >= {(d, first) for d in dampings}
    damping = max([(3e-2, 512), *((1e-2, b) for b in sizes), *((d, first) for d in dampings)], key=tried.get)[0]
    assert set(tried) >= {(damping, b) for b in sizes if b in (first // 2, first, first * 2)}
    assert result.block_size == chosen(result.candidates).block_size


def test_auto_leaves_the_default_where_gradients_say_so():
    """Where a few directions carry all of them, less damping is better, and the rest of the gradients see it."""
    grads = oracle.gradients(64, 1200, "low rank")
    result = mfac.prune_step(linear(30, 40), grads, 0.5, damping="auto", block_size="auto")
    assert max(c.z_score for c in result.candidates) > 3
    assert result.damping < 3e-2 * float(grads.square().mean())


def test_auto_for_one_of_the_two():
    grads = oracle.gradients(40, 120)
    result = mfac.prune_step(linear(), grads, 0.6, damping="auto", block_size=30)
    assert result.block_size == 30 and len(result.candidates) == 1 + len(DAMPINGS)
    result = mfac.prune_step(linear(), grads, 0.6, damping=1e-3, block_size="auto")
    assert result.damping == 1e-3 and {c.damping for c in result.candidates} == {1e-3}
    result = mfac.prune_step(linear(5, 4), oracle.gradients(4, 20), 0.6, damping="auto", block_size="auto")
    assert result.block_size == 20  # all there are


def test_auto_needs_four(unchanged):
    model = linear()
    with unchanged(model), pytest.raises(ValueError, match="grads: expected at least 4 gradients for 'auto', got 3"):
        mfac.prune_step(model, oracle.gradients(3, 120), 0.5, damping="auto")
    with unchanged(model), pytest.raises(ValueError, match="num_grads: expected at least 4 for 'auto', got 3"):
        mfac.prune(model, [], LOSS, 0.5, damping="auto", num_grads=3)


def test_gradients_that_leave_no_finite_step(unchanged):
    model = linear()
    grads = torch.full((8, 120), 1e38) * torch.randn(8, 120).sign()
    with unchanged(model), pytest.raises(RuntimeError, match="damping: expected a candidate with a finite step"):
        mfac.prune_step(model, grads, 0.5, damping="auto", block_size=30)


def loss_of(model, batches):
    with torch.no_grad():
        return sum(LOSS(model.eval()(x), y).item() for x, y in batches) / len(batches)


@pytest.mark.parametrize("entry", ["prune", "prune_step", "Pruner"])
def test_with_batches_the_lowest_loss_wins(entry):
    """The scores are the losses of the batches after the gradients', the model pruned by hand; the best is taken."""
    batches, model, options = make_batches(12 + NUM_JUDGES), make_model(), AUTO.copy()
    grads = mfac.collect_gradients(make_model(), batches[:12], LOSS, 12, progress=False)
    if entry == "prune":
        options |= {"num_grads": 12, "recomputations": 1, "corrections": 0, "final_corrections": 0}
        result = mfac.prune(model, batches, LOSS, 0.7, **options)
    elif entry == "Pruner":
        pruner = mfac.Pruner(model, batches, LOSS, sparsity=0.7, end=1, num_grads=12, recomputations=1, **options)
        result = pruner.step()
    else:
        result = mfac.prune_step(model, grads, 0.7, batches[12:], LOSS, **options)
    assert len(result.candidates) > len(DAMPINGS)
    for candidate in result.candidates:
        other = make_model()
        mfac.prune_step(other, grads, 0.7, damping=candidate.damping, block_size=candidate.block_size)
        assert candidate.score == pytest.approx(loss_of(other, batches[12:]), rel=1e-4)
        assert candidate.z_score is None
    best = min(result.candidates, key=lambda c: c.score)
    assert (result.damping, result.block_size) == (pytest.approx(best.damping), best.block_size)
    assert best.score < result.candidates[0].score  # the default, which is not the best here


def test_over_recomputations_it_is_chosen_once_for_the_end():
    """By prediction: as a single step without batches would."""
    options = {"num_grads": 8, "refresh": 4, "corrections": 0, "final_corrections": 0, **AUTO}
    result = mfac.prune(make_model(), make_batches(20), LOSS, 0.8, recomputations=3, **options)
    grads = mfac.collect_gradients(make_model(), make_batches(20), LOSS, 8, progress=False)
    once = mfac.prune_step(make_model(), grads, 0.8, **AUTO)
    assert len(result.candidates) >= 2 + 3  # 64 and 128 of 180 weights, and the other dampings
    assert len({s.block_size for s in result.steps}) == 1
    assert once.candidates == result.candidates and once.block_size == result.block_size
    assert result.steps[0].damping == pytest.approx(once.damping)


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("of the loss")])
def test_interrupted_while_it_is_tried(unchanged, error, call):
    """The weights are the model's own again."""
    model, calls = make_model(), []
    grads = mfac.collect_gradients(model, make_batches(), LOSS, 12, progress=False)

    def failing(output, target):
        calls.append(1)
        if len(calls) > call:
            raise error
        return LOSS(output, target)

    with unchanged(model), pytest.raises((KeyboardInterrupt, RuntimeError)):
        mfac.prune_step(model, grads, 0.7, make_batches(seed=1), failing, **AUTO)
    assert len(calls) == call + 1


def test_losses_that_are_not_finite(unchanged, tmp_path):
    """A candidate without a finite loss is not taken; if there is no other, nothing is pruned."""
    model = make_model()
    grads = mfac.collect_gradients(model, make_batches(), LOSS, 12, progress=False)
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match="damping: expected a candidate with a finite loss of the batch"),
    ):
        mfac.prune_step(model, grads, 0.7, make_batches(seed=1), lambda out, y: LOSS(out, y) * math.nan, **AUTO)
    calls = []

    def first_only(output, target):
        calls.append(1)
        return LOSS(output, target) * (1.0 if len(calls) <= 2 * NUM_JUDGES else math.inf)  # of the model, one step

    result = mfac.prune_step(model, grads, 0.7, make_batches(seed=1), first_only, **AUTO)
    assert [math.isfinite(c.score) for c in result.candidates] == [True] + [False] * (len(result.candidates) - 1)
    assert result.block_size == result.candidates[0].block_size
    result.to_json(tmp_path / "result.json")
    read = mfac.PruneResult.from_dict(json.loads((tmp_path / "result.json").read_text()))
    assert read.candidates == result.candidates


def test_a_step_that_breaks_some_batches_is_not_taken():
    """A batch counts if the loss of the model as it is was finite, and not only if that after the first trial is."""
    model, calls = make_model(), []
    grads = mfac.collect_gradients(model, make_batches(), LOSS, 12, progress=False)

    def broken_by_the_default(output, target):
        calls.append(1)
        return LOSS(output, target) * (math.inf if NUM_JUDGES < len(calls) < 2 * NUM_JUDGES else 1.0)

    result = mfac.prune_step(model, grads, 0.7, make_batches(seed=1), broken_by_the_default, **AUTO)
    assert [math.isfinite(c.score) for c in result.candidates] == [False] + [True] * (len(result.candidates) - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [(x.to(dtype), y) for x, y in make_batches()]
    result = mfac.prune(model, batches, LOSS, 0.5, num_grads=8, update="none", recomputations=1, **AUTO)
    for name, p in model.named_parameters():
        kept = result.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p, torch.where(kept, before[name], 0))  # to the digit
