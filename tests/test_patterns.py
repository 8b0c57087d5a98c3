"""Patterns: groups of weights, N:M and blocks, through prune_step."""

import functools
import itertools

import numpy as np
import oracle
import pytest
import torch
from oracle import BACKENDS
from torch import nn
from torch.sparse import _semi_structured_conversions

import mfac
from mfac.model.layers import Axes
from mfac.pruning.patterns import parse_pattern


def layer_of(kind):
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(8, 6, bias=False),
        "conv1d": nn.Conv1d(8, 4, 3, bias=False),
        "conv2d": nn.Conv2d(8, 4, (3, 2), bias=False),
        "conv3d": nn.Conv3d(4, 3, 2, bias=False),
        "grouped": nn.Conv2d(16, 8, 3, groups=2, bias=False),
        "remainder": nn.Linear(10, 6, bias=False),
    }[kind]


def groups_by_hand(mask, rows, cols, groups=1):
    """Every [rows, cols] of output and input channels at every position of the kernel, as lists of bools."""
    for flat in mask.reshape(mask.shape[0], mask.shape[1], -1).chunk(groups):
        for r in range(0, flat.shape[0] - rows + 1, rows):
            for c in range(0, flat.shape[1] - cols + 1, cols):
                for k in range(flat.shape[2]):
                    yield flat[r : r + rows, c : c + cols, k].reshape(-1)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d", "grouped", "remainder"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "block4", [2, 2], [1, 4], [3, 1]], ids=str)
@pytest.mark.parametrize("criterion", ["fisher", "magnitude"])
def test_every_group_keeps_to_the_pattern(kind, pattern, criterion):
    """All of the share that a pattern allows, and half of it: groups are pruned as such or not at all."""
    parsed = parse_pattern(pattern)
    for share in (1.0, 0.5):
        model = layer_of(kind)
        grads = oracle.gradients(20, model.weight.numel())
        result = mfac.prune_step(
            model, grads, share * parsed.max_sparsity, pattern=pattern, criterion=criterion, block_size=50
        )
        mask = result.masks["weight"]
        assert mask.shape == model.weight.shape
        assert torch.equal(model.weight == 0, ~mask)
        by_hand = groups_by_hand(mask, parsed.rows, parsed.cols, getattr(model, "groups", 1))
        pruned = [int((~group).sum()) for group in by_hand]
        assert set(pruned) <= {0, parsed.pruned}
        assert sum(map(bool, pruned)) == round(share * len(pruned))
        assert int((~mask).sum()) == sum(pruned)  # what makes no whole group stays dense


LINEAR = Axes(outputs=0, inputs=1)


def test_groups():
    assert parse_pattern("2:4").groups((1, 8), LINEAR).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert parse_pattern("2:4").groups((1, 4, 2), LINEAR).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]  # input channels
    assert parse_pattern("1:3").groups((2, 4), LINEAR).tolist() == [[0, 1, 2], [4, 5, 6]]  # 3 and 7 are left over
    assert parse_pattern([2, 1]).groups((3, 2), LINEAR).tolist() == [[0, 2], [1, 3]]
    for shape in [(8,), (3, 3)]:
        assert parse_pattern("2:4").groups(shape, LINEAR).shape == (0, 4)
    for shape in [(4, 8), (6, 12, 3, 3)]:
        assert parse_pattern("block4").groups(shape, LINEAR).flatten().sort().values.tolist() == list(
            range(torch.Size(shape).numel())
        )


def test_groups_of_other_axes():
    assert parse_pattern("2:4").groups((4, 2), Axes(1, 0)).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]  # [in, out]
    assert parse_pattern("2:4").groups((2, 1, 4), Axes(1, 2)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]  # of experts
    assert parse_pattern([2, 1]).groups((6, 1), Axes(0, 1, groups=2)).tolist() == [[0, 1], [3, 4]]  # 3 outputs each
    assert parse_pattern("1:2").groups((6, 1), Axes(1, 0, groups=2)).tolist() == [[0, 1], [3, 4]]  # 3 inputs each
    assert parse_pattern("2:4").groups((4, 8), None).shape == (0, 4)
    assert parse_pattern("unstructured").groups((2, 2), None).tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("shape", [(6, 10), (8, 8, 3), (5, 9, 3, 2), (4, 4, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "block4", [2, 2], [3, 1]], ids=str)
def test_order_of_the_groups(shape, pattern):
    """Rows of groups first, then positions along the inputs, then those of the kernel."""
    parsed, index = parse_pattern(pattern), torch.arange(torch.Size(shape).numel()).view(shape)
    by_hand = [group.tolist() for group in groups_by_hand(index, parsed.rows, parsed.cols)]
    assert parsed.groups(shape, LINEAR).tolist() == by_hand


LAYERS = {
    "Linear": lambda: nn.Linear(9, 6),
    "Conv1d": lambda: nn.Conv1d(8, 6, 3),
    "Conv2d, grouped": lambda: nn.Conv2d(12, 10, (2, 3), groups=2),
    "Conv3d, depthwise": lambda: nn.Conv3d(4, 8, 2, groups=4),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(9, 6, 3),
    "ConvTranspose2d, grouped": lambda: nn.ConvTranspose2d(10, 8, (2, 3), groups=2),
    "ConvTranspose3d, grouped": lambda: nn.ConvTranspose3d(8, 4, 2, groups=2),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2),
}


@functools.cache
def places_of(kind):
    """[d, 4]: group of channels, kernel position, output and input within the group of every weight.

    Channels are measured: a single weight of one passes the number of its input channel to its output channel.
    """
    layer = LAYERS[kind]()
    weight = next(iter(mfac.prunable_parameters(layer).values())).detach()
    linear = weight.dim() == 2
    width, groups = weight.shape[1] if linear else layer.in_channels, getattr(layer, "groups", 1)
    x = torch.arange(1.0, width + 1).view(1, -1, *[1] * (weight.dim() - 2))
    x = x if linear else x.expand(1, width, *[4] * (weight.dim() - 2))
    places = []
    for i in range(weight.numel()):
        only = torch.zeros_like(weight)
        only.view(-1)[i] = 1
        fixed = {"weight": only} if linear else {"weight": only, "bias": torch.zeros_like(layer.bias)}
        out = nn.functional.linear(x, only) if linear else torch.func.functional_call(layer, fixed, x)
        reached = out.abs().flatten(2).amax(2)[0] if out.dim() > 2 else out[0]
        output, source = int(reached.argmax()), int(reached.max()) - 1
        group = source // (width // groups)
        kernel = i % weight[0, 0].numel()
        places.append((group, kernel, output - group * (len(reached) // groups), source - group * (width // groups)))
    return torch.tensor(places)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "block4", [2, 2], [3, 1]], ids=str)
def test_members_of_a_group(kind, pattern):
    """Members share kernel position and group of channels, and are consecutive outputs by consecutive inputs."""
    parsed, places = parse_pattern(pattern), places_of(kind)
    chosen = mfac.prunable_parameters(LAYERS[kind]())
    name, weight = next(iter(chosen.items()))
    groups = parsed.groups(weight.shape, chosen.targets[name].axes)
    assert len(groups.unique()) == groups.numel()  # a weight is in at most one
    members = places[groups]  # [n, P, 4]
    assert torch.equal(members[:, :, :2], members[:, :1, :2].expand(-1, parsed.size, -1))
    steps = torch.cartesian_prod(torch.arange(parsed.rows), torch.arange(parsed.cols))
    assert torch.equal(members[:, :, 2:], members[:, :1, 2:] + steps)
    outputs, inputs = (places[:, 2:].amax(0) + 1).tolist()
    assert len(groups) == len(places[:, :2].unique(dim=0)) * (outputs // parsed.rows) * (inputs // parsed.cols)
    left = torch.ones(weight.numel(), dtype=torch.bool)
    left[groups.flatten()] = False
    rebuilt = torch.where(left, weight.detach().flatten(), torch.nan)
    rebuilt[groups] = weight.detach().flatten()[groups]
    assert torch.equal(rebuilt.view_as(weight), weight)  # undone


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (nn.ConvTranspose2d(16, 6, 3, groups=2, bias=False), "2:4"),
        (nn.ConvTranspose1d(12, 6, 3, groups=2, bias=False), "2:4"),  # 6 inputs a group: two are left over
        (nn.Conv2d(8, 6, 3, groups=2, bias=False), [2, 2]),  # 3 outputs a group: one is left over
    ],
    ids=["ConvTranspose2d", "ConvTranspose1d", "Conv2d"],
)
def test_grouped_layers(model, pattern):
    grads, parsed = oracle.gradients(20, model.weight.numel()), parse_pattern(pattern)
    mask = mfac.prune_step(model, grads, parsed.max_sparsity, pattern=pattern, block_size=50).masks["weight"]
    for part in mask.chunk(2):  # [in, out / groups, ...] or [out / groups, in, ...]
        part = part.transpose(0, 1) if isinstance(model, nn.modules.conv._ConvTransposeNd) else part
        for group in groups_by_hand(part, parsed.rows, parsed.cols):
            assert int((~group).sum()) == parsed.pruned
        assert part[part.shape[0] // parsed.rows * parsed.rows :].all()
        assert part[:, part.shape[1] // parsed.cols * parsed.cols :].all()


def test_unknown_axes_do_not_fit():
    model = nn.Bilinear(4, 4, 4, bias=False)
    with pytest.raises(ValueError, match=r"pattern: expected one that fits 'weight' of shape \[4, 4, 4\]"):
        mfac.prune_step(model, oracle.gradients(8, 64), pattern="2:4", params="weight")
    assert mfac.prune_step(model, oracle.gradients(8, 64), 0.5, params="weight").sparsity == 0.5


def test_numpy_integers():
    assert parse_pattern(list(np.array([2, 4]))) == parse_pattern([2, 4])
    with pytest.raises(TypeError, match=r"pattern: expected .*\[rows, cols\], got \[True, 4\]"):
        parse_pattern([True, 4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_of_four_is_the_best_of_all_subsets(backend):
    """One group, one step: the pair that goes is the one that costs least by the dense inverse."""
    for seed in range(10):
        model = nn.Linear(4, 1, bias=False)
        grads, w = oracle.gradients(30, 4, seed=seed), model.weight.detach()[0].double()
        inverse = oracle.inverse(oracle.fisher(grads, 1e-3, 4))
        cost = {}
        for pair in itertools.combinations(range(4), 2):
            q = torch.tensor(pair)
            cost[pair] = 0.5 * float(w[q] @ torch.linalg.solve(inverse[q][:, q], w[q]))
        result = mfac.prune_step(model, grads, pattern="2:4", damping=1e-3, substeps=1, backend=backend)
        best = min(cost, key=cost.get)
        assert (~result.masks["weight"][0]).nonzero().flatten().tolist() == list(best)
        assert result.predicted_loss_increase == pytest.approx(cost[best], rel=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "block4"])
def test_gradual(pattern):
    """A rising share of groups; what is pruned stays so, and the end is the whole pattern."""
    model, masks, before = layer_of("conv2d"), None, None
    grads, most = oracle.gradients(20, model.weight.numel()), parse_pattern(pattern).max_sparsity
    for share in (0.25, 0.5, 1.0):
        result = mfac.prune_step(model, grads, share * most, pattern=pattern, masks=masks, block_size=64)
        masks = result.masks
        assert result.sparsity == share * most
        assert before is None or not (masks["weight"] & ~before).any()
        before = masks["weight"]
    with pytest.raises(ValueError, match=r"expected at least 48 of 48 groups"):
        mfac.prune_step(model, grads, 0.25 * most, pattern=pattern, masks=masks)


def test_pattern_over_an_unstructured_mask():
    """Groups that an earlier mask has cut into are completed, not pruned beyond the pattern."""
    model = nn.Linear(16, 16, bias=False)
    grads = oracle.gradients(40, 256)
    masks = mfac.prune_step(model, grads, 0.3).masks
    result = mfac.prune_step(model, grads, 0.5, pattern="2:4", masks=masks)
    pruned = torch.tensor([int((~group).sum()) for group in groups_by_hand(result.masks["weight"], 1, 4)])
    earlier = torch.tensor([int((~group).sum()) for group in groups_by_hand(masks["weight"], 1, 4)])
    assert torch.equal(pruned, earlier.clamp_min(2))
    assert not (result.masks["weight"] & ~masks["weight"]).any()


def test_layers_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    grads = oracle.gradients(8, sum(p.numel() for p in mfac.prunable_parameters(model).values()))
    result = mfac.prune_step(model, grads, pattern="2:4")
    assert [kept / n for _, n, kept in result.layers] == [1, 0.5, 1]
    with pytest.raises(ValueError, match=r"pattern: expected one that fits '0.weight' of shape \[8, 3, 3, 3\]"):
        mfac.prune_step(model, torch.randn(4, 216), pattern="2:4", params="0.weight")
    with pytest.raises(ValueError, match=r"pattern: expected one that fits a parameter"):
        mfac.prune_step(model, torch.randn(4, 216 + 72), pattern="2:4", params=["re:[02][.]weight"])


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("4:2", ValueError, "expected N:M with 1 <= N < M"),
        ("0:4", ValueError, "expected N:M with 1 <= N < M"),
        ("4:4", ValueError, "expected N:M with 1 <= N < M"),
        ("8:16", ValueError, "at most 5000 subsets of a group.* with 12870"),
        ("2of4", ValueError, "expected 'unstructured', 'block4', 'N:M'"),
        ([0, 4], ValueError, r"expected \[rows, cols\] >= 1, got \[0, 4\]"),
        ([4], TypeError, r"\[rows, cols\], got \[4\]"),
        ([2.0, 4], TypeError, r"\[rows, cols\], got \[2.0, 4\]"),
        (4, TypeError, r"\[rows, cols\], got 4"),
    ],
)
def test_bad_patterns(pattern, error, message):
    model = layer_of("linear")
    before = model.weight.detach().clone()
    with pytest.raises(error, match=message):
        mfac.prune_step(model, oracle.gradients(8, 48), pattern=pattern)
    assert torch.equal(model.weight, before)


def test_more_than_the_pattern_allows():
    with pytest.raises(ValueError, match=r"sparsity: expected at most 0.5 for weight, all that 2:4 allows, got 0.6"):
        mfac.prune_step(layer_of("linear"), oracle.gradients(8, 48), 0.6, pattern="2:4")


def test_semi_structured():
    """torch's compressed 2:4 format takes a pruned Linear as it is, and gives the same weights back."""
    linear = nn.Linear(128, 64, bias=False).half()
    mfac.prune_step(linear, oracle.gradients(16, 128 * 64), pattern="2:4")
    dense = linear.weight.detach()
    packed = _semi_structured_conversions.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(_semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(*packed), dense)
    if torch.cuda.is_available():
        assert torch.equal(torch.sparse.to_sparse_semi_structured(dense.cuda()).to_dense().cpu(), dense)


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
def test_updates_and_scopes(update):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    grads = oracle.gradients(20, 96)
    result = mfac.prune_step(model, grads, {"1.weight": 0.25, "0.weight": 0.5}, pattern="2:4", update=update)
    assert [kept / n for _, n, kept in result.layers] == [0.5, 0.75]
    assert torch.equal(model[0].weight != 0, result.masks["0.weight"])
