"""Sub-steps under one Fisher, and relative damping."""

import warnings

import oracle
import pytest
import torch
from oracle import BACKENDS, TOLERANCE
from torch import nn

import mfac
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
