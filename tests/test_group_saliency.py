"""Saliency of groups: what it costs to prune several weights together."""

import itertools

import oracle
import pytest
import torch
from oracle import BACKENDS, KINDS, SHAPES, TOLERANCE

from mfac import Fisher
from mfac.ops import compiled as ops
from mfac.ops import reference


def dense_saliency(dense, weights, groups, subsets):
    """½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q from the dense inverse, one by one."""
    inverse, out = oracle.inverse(dense), torch.zeros(len(groups), len(subsets), dtype=torch.float64)
    for (i, group), (k, subset) in itertools.product(enumerate(groups), enumerate(subsets)):
        q = group[subset][group[subset] >= 0]
        w = weights.double()[q]
        out[i, k] = 0.5 * w @ torch.linalg.solve(inverse[q][:, q], w)
    return out


def random_groups(d, size, seed=0):
    """As many groups as fit, of weights from anywhere, the last one short."""
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    groups = torch.full((-(-d // size), size), -1)
    groups.view(-1)[:d] = order
    return groups


def pairs(size):
    return torch.tensor(list(itertools.combinations(range(size), 2)))


def error(out, exact):
    return float(((out.double() - exact).abs() / exact.clamp_min(1e-30)).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(shape, kind, backend):
    m, d, block_size = shape
    grads, weights = oracle.gradients(m, d, kind), torch.randn(d)
    for damping in (1e-5, 1e-2):
        dense = oracle.fisher(grads, damping, block_size)
        if not oracle.well_posed(dense):
            continue
        for groups, subsets in (
            (torch.arange(d)[:, None], torch.tensor([[0]])),
            (random_groups(d, 4), pairs(4)),
            (random_groups(d, 30), torch.arange(30)[None]),  # more than a panel
        ):
            out = BACKENDS[backend].group_saliency(grads, weights, groups, subsets, damping, block_size)
            exact = dense_saliency(dense, weights, groups, subsets)
            assert error(out, exact) < TOLERANCE["group"], (damping, groups.shape)


@pytest.mark.parametrize("block_size", [60, 300])
def test_large_groups(block_size):
    """A piece of F⁻¹ that no shared memory of a GPU holds."""
    grads, weights, groups = torch.randn(70, 600), torch.randn(600), torch.arange(600).view(2, 300)
    arguments = grads, weights, groups, torch.arange(300)[None], 1e-2, block_size
    exact = reference.group_saliency(*arguments)
    assert error(BACKENDS["compiled"].group_saliency(*arguments), exact) < TOLERANCE["group"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_what_the_joint_update_pays(backend):
    """The saliency of a group is the loss that the joint update predicts for pruning just that group."""
    grads, weights = oracle.gradients(40, 90), torch.randn(90)
    groups = random_groups(90, 6)
    out = BACKENDS[backend].group_saliency(grads, weights, groups, torch.arange(6)[None], 1e-3, 45)
    for group, value in zip(groups, out[:, 0], strict=True):
        kept = torch.ones(90, dtype=torch.bool)
        kept[group] = False
        paid = BACKENDS[backend].joint_update(grads, weights.clone(), kept, 1e-3, 45)
        assert float(value) == pytest.approx(float(paid), rel=TOLERANCE["group"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 100, 33), (65, 101, 50), (20, 120, 120)], ids=str)
def test_active(shape, backend):
    """Weights pruned before are zero and cost nothing; the others see a Fisher without them."""
    m, d, block_size = shape
    grads, active = oracle.gradients(m, d), torch.arange(d) % 3 != 0
    if block_size < d:
        active[:block_size] = False  # a whole block
    weights = torch.randn(d) * active
    groups = random_groups(d, 4)
    exact = dense_saliency(oracle.fisher(grads, 1e-3, block_size, active), weights, groups, pairs(4))
    out = BACKENDS[backend].group_saliency(grads, weights, groups, pairs(4), 1e-3, block_size, active)
    assert torch.equal(out == 0, exact == 0)
    assert error(out[exact > 0], exact[exact > 0]) < TOLERANCE["group"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-12, 1e6, 1e18])
def test_finite_where_float64_fails(scale, backend):
    for kind in KINDS:
        for m, d, block_size in [(20, 60, 60), (64, 40, 13)]:
            grads, weights = oracle.gradients(m, d, kind, scale), torch.ones(d)
            out = BACKENDS[backend].group_saliency(grads, weights, random_groups(d, 4), pairs(4), 1e-8, block_size)
            assert torch.isfinite(out).all() and (out > 0).all(), kind


def test_bfloat16():
    half = oracle.gradients(64, 300).bfloat16()
    arguments = (torch.randn(300), random_groups(300, 4), pairs(4), 1e-3, 130)
    out, same = (ops.group_saliency(g, *arguments) for g in (half, half.float()))
    assert oracle.error(out, same) < 1e-5  # the products may be of bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.randn(19)}, ValueError, r"weights: expected shape \[20\].*, got \[19\]"),
        ({2: torch.zeros(5)}, ValueError, r"groups: expected two dimensions, got shape \[5\]"),
        ({2: torch.zeros(5, 4)}, TypeError, "groups: expected int64, got Float"),
        ({2: torch.full((5, 4), 20)}, ValueError, r"groups: expected numbers in \[-1, 20\), got 20 to 20"),
        ({3: torch.tensor([[4]])}, ValueError, r"subsets: expected numbers in \[0, 4\), got 4 to 4"),
        ({3: torch.tensor([[-1]])}, ValueError, r"subsets: expected numbers in \[0, 4\), got -1 to -1"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = [oracle.gradients(6, 20), torch.randn(20), torch.arange(20).view(5, 4), pairs(4), 1e-3, 8]
    arguments = [change.get(i, a) for i, a in enumerate(arguments)]
    with pytest.raises(error, match=message):
        ops.group_saliency(*arguments)
    for backend in BACKENDS:
        with pytest.raises(error, match=message.replace("got Float", "got torch.float32")):
            Fisher(arguments[0], 1e-3, 8, backend=backend).group_saliency(*arguments[1:4])


def test_nothing_to_do():
    grads = oracle.gradients(6, 20)
    for kernels in (ops, reference):
        assert kernels.group_saliency(grads, torch.ones(20), torch.zeros(0, 4).long(), pairs(4), 1, 8).shape == (0, 6)
        none = kernels.group_saliency(grads, torch.ones(20), torch.full((2, 4), -1), pairs(4), 1.0, 8)
        assert torch.equal(none, torch.zeros(2, 6))
