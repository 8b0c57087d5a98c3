"""Sub-steps under one Fisher, and the automatic choice of damping and block size."""

import warnings

import oracle
import pytest
import torch
from oracle import BACKENDS, TOLERANCE
from torch import nn

import mfac
from mfac.pruning.auto import BLOCK_SIZES, DAMPINGS
from mfac.pruning.selection import Selection


def linear(inputs=12, outputs=10):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [30, 120])
def test_substeps_are_exact(block_size, backend):
    """However the mask came about, the weights and the loss are those of the joint update from the start, F dense."""
    model, grads = linear(), oracle.gradients(50, 120)
    before = model.weight.detach().flatten().clone()
    result = mfac.prune_step(
        model, grads, 0.7, damping=1e-3, block_size=block_size, substeps=5, backend=backend
    )  # fmt: skip
    dense, kept = oracle.fisher(grads, 1e-3, block_size), result.masks["weight"].flatten()
    step = oracle.joint_step(dense, before, kept)
    assert oracle.error(model.weight.detach().flatten(), before.double() + step) < TOLERANCE["update"]
    assert result.predicted_loss_increase == pytest.approx(0.5 * float(step @ dense @ step), rel=TOLERANCE["loss"])
    assert int(kept.sum()) == 36


def test_substeps_choose_better():
    """On correlated weights the mask of many sub-steps costs less than that of one, by the quadratic model itself."""
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(200, 20, generator=generator) @ torch.randn(20, 120, generator=generator)
    grads += 0.3 * torch.randn(200, 120, generator=generator)
    losses = [
        mfac.prune_step(linear(), grads, 0.7, damping=1e-3, block_size=None, substeps=s).predicted_loss_increase
        for s in (1, 4, 32)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_substeps_become_smaller(monkeypatch):
    """From 120 weights to 30 in four: after sub-step k, 120 * 0.25 ** (1 - (1 - k/4)²) are left."""
    select, counts = Selection.select, []

    def spy(*args):
        kept = select(*args)
        counts.append(int(kept.sum()))
        return kept

    monkeypatch.setattr(Selection, "select", spy)
    mfac.prune_step(linear(), oracle.gradients(50, 120), 0.75, substeps=4)
    assert counts == [65, 42, 33, 30]
    counts.clear()
    mfac.prune_step(linear(), oracle.gradients(50, 120), 0.25, pattern="2:4", substeps=2)  # half of the 30 groups
    assert counts == [120 - 2 * 12, 120 - 2 * 15]


@pytest.mark.parametrize(
    ("start", "end", "pattern", "expected"),
    [
        (0, 0.1, "unstructured", 1),
        (0, 0.5, "unstructured", 2),
        (0, 0.8, "unstructured", 5),
        (0, 0.9, "unstructured", 7),
        (0.8, 0.9, "unstructured", 2),
        (0.5, 0.55, "unstructured", 1),
        (0, 1, "unstructured", 16),
        (0.5, 0.5, "unstructured", 1),
        (0, 0.5, "2:4", 4),
        (0, 0.75, "1:4", 8),
        (0, 0.5, "block4", 8),
        (0, 0.8, [2, 2], 16),
    ],
)
def test_auto_substeps_follow_the_halvings(start, end, pattern, expected):
    options = {"pattern": pattern, "block_size": 128, "damping": "3e-2*mean"}
    model, grads, masks = linear(40, 20), oracle.gradients(24, 800), None
    if start:
        masks = mfac.prune_step(model, grads, start, **options).masks
    result = mfac.prune_step(model, grads, end, masks=masks, **options)
    assert result.substeps == expected
    assert f"sub-steps {expected}" in str(result)


def test_auto_substeps_of_several_sparsities():
    """The segment with the longest way counts; magnitudes do not change, so they take one."""
    model = torch.nn.Sequential(linear(20, 10), linear(10, 20))
    sparsities = {"0.weight": 0.2, "1.weight": 0.75}
    assert mfac.prune_step(model, oracle.gradients(24, 400), sparsities).substeps == 4
    assert mfac.prune_step(model, None, 0.9, masks="nonzero", criterion="magnitude").substeps == 1


def test_more_substeps_than_weights():
    model = linear(3, 2)
    assert mfac.prune_step(model, oracle.gradients(8, 6), 0.5, substeps=50).sparsity == 0.5
    assert int((model.weight == 0).sum()) == 3


def test_substeps_after_masks():
    model, grads = linear(), oracle.gradients(50, 120)
    masks = mfac.prune_step(model, grads, 0.3).masks
    result = mfac.prune_step(model, grads, 0.8, masks=masks, substeps=6)
    assert result.sparsity == pytest.approx(0.8) and not (result.masks["weight"] & ~masks["weight"]).any()


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


def test_relative_damping():
    grads = oracle.gradients(20, 120, scale=1e-4)
    result = mfac.prune_step(linear(), grads, 0.5, damping="3e-2*mean")
    assert result.damping == pytest.approx(3e-2 * float(grads.square().mean()), rel=1e-5)


def test_relative_damping_makes_the_scale_of_the_loss_irrelevant():
    grads, masks = oracle.gradients(20, 120), []
    for scale in (2.0**-20, 1.0, 2.0**20):  # exact in float32
        masks.append(mfac.prune_step(linear(), grads * scale, 0.5).masks["weight"])
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


@pytest.mark.parametrize(
    ("damping", "message"),
    [
        (1e-15, "damping: 1e-15 is .* of the trace of a block .*, too little for float64; try damping='3e-2[*]mean'"),
        (1e6, "damping: 1e[+]06 is .* times the mean square of the gradients: little but magnitudes counts"),
    ],
)
def test_ill_conditioned(damping, message):
    with pytest.warns(UserWarning, match=message):
        mfac.prune_step(linear(), oracle.gradients(20, 120), 0.5, damping=damping)


def test_no_warning_for_usual_dampings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for damping in (1e-8, 1e-5, 1e-2, 1.0, "1e-3*mean", "auto"):
            mfac.prune_step(linear(), oracle.gradients(20, 120), 0.5, damping=damping)


def test_gradients_that_leave_no_finite_step(unchanged):
    model = linear()
    grads = torch.full((8, 120), 1e38) * torch.randn(8, 120).sign()
    with unchanged(model), pytest.raises(RuntimeError, match="damping: expected a candidate with a finite step"):
        mfac.prune_step(model, grads, 0.5, damping="auto", block_size=30)
