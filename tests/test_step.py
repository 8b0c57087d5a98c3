"""prune_step, against dense float64 algebra where it computes and against exact counts everywhere.

Tolerances are those of the oracle's table: relative errors in norm for inputs whose F has a condition number below 1e6.
"""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE
from torch import nn

from mfac import Fisher, GradientBuffer, collect_gradients, prunable_parameters, prune_step

BACKENDS = ["compiled", "reference"]
DAMPING, BLOCK = 1e-3, 25  # blocks across layers, the last one of 7 columns
LAYERS = {"0.weight": (8, 5), "2.weight": (4, 8)}
D = 72


def make_model(dtype=torch.float32):
    """Weights with all the digits that the type has."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        for p in model.to(dtype).parameters():
            p.div_(3)
    return model


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def weights_of(model):
    return flat(prunable_parameters(model).values())


def masks_of(share):
    return {name: torch.rand(shape) < share for name, shape in LAYERS.items()}


def zeros(tensor):
    return int((tensor == 0).sum())


def dense_prune(grads, weights, sparsity, active=None):
    """(kept, weights, ½ δᵀFδ) in float64; with `active`, of the active weights alone, the others being gone."""
    active = torch.ones(D, dtype=torch.bool) if active is None else active
    dense = oracle.fisher(grads, DAMPING, BLOCK)[active][:, active]
    w = weights.double()[active]
    saliency = w.square() / (2 * oracle.inverse(dense).diagonal())
    count = round(sparsity * D) - int((~active).sum())
    kept = torch.ones(len(w), dtype=torch.bool)
    kept[saliency.argsort()[:count]] = False
    step = oracle.joint_step(dense, w, kept)
    all_kept, new = torch.zeros(D, dtype=torch.bool), torch.zeros(D, dtype=torch.float64)
    all_kept[active], new[active] = kept, torch.where(kept, w + step, 0)
    return all_kept, new, float(0.5 * step @ dense @ step)


# ---- what it computes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [12, 60])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_against_dense(m, share, backend):
    """Mask, weights and predicted loss are those of F; after an earlier mask, of F on the weights that were left."""
    model, grads = make_model(), oracle.gradients(m, D)
    masks = masks_of(share) if share < 1 else None
    active = None if masks is None else flat(masks.values())
    kept, weights, loss = dense_prune(grads, weights_of(model), 0.6, active)
    result = prune_step(model, grads, 0.6, damping=DAMPING, block_size=BLOCK, masks=masks, backend=backend, substeps=1)
    assert torch.equal(flat(result.masks.values()), kept)
    assert oracle.error(weights_of(model), weights) < TOLERANCE["update"]
    assert result.predicted_loss_increase == pytest.approx(loss, rel=TOLERANCE["loss"])
    assert result.backend == backend
    assert {name: mask.shape for name, mask in result.masks.items()} == LAYERS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update", ["joint", "independent", "none"])
@pytest.mark.parametrize("criterion", ["fisher", "magnitude"])
def test_predicted_loss(criterion, update, backend):
    """It is ½ δᵀFδ of the step that was made, F formed dense."""
    model, grads = make_model(), oracle.gradients(12, D)
    before = weights_of(model)
    result = prune_step(
        model, grads, 0.5, damping=DAMPING, block_size=BLOCK, criterion=criterion, update=update, backend=backend
    )
    step = (weights_of(model) - before).double()
    exact = float(0.5 * step @ oracle.fisher(grads, DAMPING, BLOCK) @ step)
    # The step is read back from float32 weights, whose rounding is of the order of the joint update's small remainder.
    assert result.predicted_loss_increase == pytest.approx(exact, rel=TOLERANCE["loss"])


def test_joint_beats_the_others():
    """All three make the same mask; joint is the minimum of the predicted loss, by far."""
    grads, results = oracle.gradients(12, D), {}
    for update in ("joint", "independent", "none"):
        results[update] = prune_step(
            make_model(), grads, 0.4, damping=DAMPING, block_size=None, update=update, substeps=1
        )
    masks = [flat(result.masks.values()) for result in results.values()]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    losses = {update: result.predicted_loss_increase for update, result in results.items()}
    assert losses["joint"] < losses["independent"] and losses["joint"] < losses["none"]


def test_independent_is_the_published_formula():
    """δ = -F⁻¹ u with u_i = w_i / [F⁻¹]_ii on the pruned weights, then zeros."""
    model, grads = make_model(), oracle.gradients(12, D)
    before = weights_of(model).double()
    result = prune_step(model, grads, 0.3, damping=DAMPING, block_size=BLOCK, update="independent", substeps=1)
    kept, inverse = flat(result.masks.values()), oracle.inverse(oracle.fisher(grads, DAMPING, BLOCK))
    u = torch.where(kept, 0, before / inverse.diagonal())
    assert oracle.error(weights_of(model), torch.where(kept, before - inverse @ u, 0)) < TOLERANCE["update"]


def test_none_only_zeros():
    for dtype in (torch.float32, torch.float64, torch.float16):
        model = make_model(dtype)
        before = weights_of(model)
        result = prune_step(model, oracle.gradients(12, D), 0.5, update="none")
        assert torch.equal(weights_of(model), torch.where(flat(result.masks.values()), before, 0))


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_backends_agree(scope, update):
    """Masks bit for bit on generic data, weights within the tolerance, over three steps that build on each other."""
    models = {backend: make_model() for backend in BACKENDS}
    results = dict.fromkeys(BACKENDS)
    for i, sparsity in enumerate((0.3, 0.6, 0.9)):
        for backend, model in models.items():
            results[backend] = prune_step(
                model, oracle.gradients(20, D, seed=i), sparsity, damping=DAMPING, block_size=BLOCK, scope=scope,
                update=update, masks=results[backend] and results[backend].masks, backend=backend,
            )  # fmt: skip
        for name in LAYERS:
            assert torch.equal(results["compiled"].masks[name], results["reference"].masks[name])
        weights = [weights_of(model) for model in models.values()]
        assert oracle.error(*weights) < TOLERANCE["update"]


# ---- counts and ties


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    sparsity=st.floats(0, 1),
    scope=st.sampled_from(["global", "layer"]),
    criterion=st.sampled_from(["fisher", "magnitude"]),
)
def test_exact_counts(sizes, sparsity, scope, criterion):
    """round(sparsity · n) zeros in every scope, as Python rounds."""
    a, b, c = sizes
    model = nn.Sequential(nn.Linear(a, b), nn.Linear(b, c))
    shapes = [a * b, b * c]
    grads = torch.randn(3, sum(shapes))
    result = prune_step(model, grads, sparsity, scope=scope, criterion=criterion, damping=0.1, block_size=7)
    counts = [zeros(model[0].weight), zeros(model[1].weight)]
    if scope == "layer":
        assert counts == [round(sparsity * n) for n in shapes]
    else:
        assert sum(counts) == round(sparsity * sum(shapes))
    assert result.layers == [
        (f"{i}.weight", n, n - count) for i, (n, count) in enumerate(zip(shapes, counts, strict=True))
    ]
    assert result.sparsity == 1 - (sum(shapes) - sum(counts)) / sum(shapes)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_dict_sparsity(scope):
    """A key's parameters are ranked together or each by itself; what no key names stays dense."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    result = prune_step(
        model, torch.randn(9, 144), {"re:[01]": 0.76, "3.weight": 0.25}, damping=DAMPING, block_size=50, scope=scope
    )
    counts = [zeros(layer.weight) for layer in model]
    if scope == "layer":
        assert counts == [27, 27, 0, 9]  # 0.76 · 36 = 27.36
    else:
        assert [sum(counts[:2]), *counts[2:]] == [55, 0, 9]  # 0.76 · 72 = 54.72
    assert result.masks["2.weight"].all()
    assert result.sparsity == 1 - (144 - sum(counts)) / 144


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("criterion", ["fisher", "magnitude"])
def test_ties_go_to_the_lower_index(criterion, backend):
    """Equal weights and no gradients: everything ties, in the order of the parameters."""
    model = make_model()
    for name in LAYERS:
        nn.init.constant_(model.get_parameter(name), -0.5)
    result = prune_step(model, torch.zeros(2, D), 0.6, criterion=criterion, damping=1e-5, backend=backend)
    assert torch.equal(flat(result.masks.values()), torch.arange(D) >= 43)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_and_everything(backend):
    grads = oracle.gradients(12, D)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = make_model(dtype)
        before = weights_of(model)
        result = prune_step(model, grads, 0, backend=backend)
        assert torch.equal(weights_of(model), before)
        assert result.sparsity == 0 and result.predicted_loss_increase == 0
        result = prune_step(model, grads, 1, backend=backend)
        assert zeros(weights_of(model)) == D and result.sparsity == 1


def test_pruned_stays_pruned():
    """Through repeated calls, whatever was written to the pruned weights in between."""
    model, masks = make_model(), None
    for i in range(1, 10):
        result = prune_step(model, oracle.gradients(8, D, seed=i), i / 10, damping=DAMPING, masks=masks)
        if masks:
            assert not any((result.masks[name] & ~masks[name]).any() for name in masks)
        masks = result.masks
        assert zeros(weights_of(model)) == round(i / 10 * D) == int((~flat(masks.values())).sum())
        with torch.no_grad():
            for name in LAYERS:
                model.get_parameter(name).add_(100 * ~masks[name])


def test_masks_of_some_parameters():
    """Masks of one layer only, and the same sparsity as they hold: zeros are enforced, nothing else moves."""
    model, mask = make_model(), torch.arange(40).view(8, 5) % 2 == 0
    before = weights_of(model)
    result = prune_step(model, oracle.gradients(8, D), {"0.weight": 0.5}, masks={"0.weight": mask})
    assert torch.equal(result.masks["0.weight"], mask) and result.masks["2.weight"].all()
    assert torch.equal(weights_of(model), torch.where(flat(result.masks.values()), before, 0))
    assert result.predicted_loss_increase == 0


# ---- kinds of gradients and models


def test_kinds_of_gradients(unchanged):
    """A buffer, a tensor, a strided tensor and dicts of rows give the same bits; none of them is written."""
    grads = oracle.gradients(6, D)
    strided = torch.empty(D, 6).copy_(grads.T).T
    buffer = GradientBuffer(6, prunable_parameters(make_model()))
    rows = []
    for row in grads:
        first, second = row[:40].view(8, 5), row[40:].view(4, 8)
        buffer.append_gradients([first, second])
        rows.append({"2.weight": second, "0.weight": first})
    given, outcomes = [buffer, grads, strided, rows, tuple(rows)], []
    watched = [grads, buffer.tensor, *[t for row in rows for t in row.values()]]
    for kind in given:
        model = make_model()
        with unchanged(model, *watched, weights=False):
            prune_step(model, kind, 0.5, damping=DAMPING, block_size=BLOCK)
        outcomes.append(weights_of(model))
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients(backend):
    """The same as the same numbers in float32: only the storage differs."""
    grads = oracle.gradients(12, D).bfloat16()
    masks, weights = [], []
    for g in (grads, grads.float()):
        model = make_model()
        masks.append(flat(prune_step(model, g, 0.5, damping=DAMPING, block_size=BLOCK, backend=backend).masks.values()))
        weights.append(weights_of(model))
    assert torch.equal(*masks)
    assert oracle.error(*weights) < TOLERANCE["update"]


def test_leaves_no_trace(unchanged):
    """Only the chosen weights: `.grad`, requires_grad, modes, buffers, random state and other parameters stay."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    model(torch.randn(6, 5)).sum().backward()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    others = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
    with unchanged(model, *others, weights=False):
        result = prune_step(model, oracle.gradients(12, D), 0.5, params=["0.weight", "3.weight"])  # one is frozen
    assert not any(mask.requires_grad for mask in result.masks.values())
    assert model[0].weight.requires_grad and model[0].weight.grad_fn is None


def test_params_subset():
    model = make_model()
    others = flat([model[0].weight, model[0].bias, model[2].bias])
    result = prune_step(model, oracle.gradients(12, 32), 0.5, params="re:2[.]weight")
    assert list(result.masks) == ["2.weight"] and zeros(model[2].weight) == 16
    assert torch.equal(flat([model[0].weight, model[0].bias, model[2].bias]), others)


def test_params_of_the_buffer():
    """A buffer says which parameters; biases too, if it has them."""
    model = make_model()
    buffer = collect_gradients(
        model, [(torch.randn(3, 5), torch.randn(3, 4)) for _ in range(4)], nn.functional.mse_loss, 4, params="re:2"
    )
    result = prune_step(model, buffer, 0.5, scope="layer")
    assert {name: zeros(model.get_parameter(name)) for name in result.masks} == {"2.weight": 16, "2.bias": 2}


def test_tied_parameters():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    batches = [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(6)]
    result = prune_step(model, collect_gradients(model, batches, nn.functional.mse_loss, 6), 0.5)
    assert result.layers == [("0.weight", 16, 8)]
    assert model[1].weight is model[0].weight and zeros(model[1].weight) == 8


@pytest.mark.parametrize(
    ("layer", "memory_format"),
    [
        (nn.Conv1d(3, 4, 3), torch.contiguous_format),
        (nn.Conv2d(3, 4, 3), torch.channels_last),
        (nn.Conv3d(2, 3, 2), torch.channels_last_3d),
    ],
    ids=["1d", "2d", "3d"],
)
def test_convolutions(layer, memory_format):
    """The same as a flat Linear of the same numbers, whatever the order in memory."""
    weight = layer.weight.detach().clone()
    twin = nn.Linear(weight[0].numel(), len(weight))
    twin.weight.data = weight.flatten(1).clone()
    layer.to(memory_format=memory_format)
    grads = oracle.gradients(8, weight.numel())
    masks = [
        prune_step(model, grads, 0.7, damping=DAMPING, block_size=BLOCK).masks["weight"] for model in (layer, twin)
    ]
    assert torch.equal(masks[0], masks[1].view_as(weight))
    assert torch.equal(layer.weight, twin.weight.view_as(weight))
    assert layer.weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_weights(dtype):
    """Computed in float32 and rounded once to the model's type."""
    model = make_model(torch.bfloat16).to(dtype)
    twin = make_model(torch.bfloat16).float()
    results = [prune_step(x, oracle.gradients(12, D), 0.5, damping=DAMPING, block_size=BLOCK) for x in (model, twin)]
    assert model[0].weight.dtype == dtype
    assert torch.equal(weights_of(model), weights_of(twin).to(dtype))
    assert zeros(weights_of(model)) == 36
    assert results[0].predicted_loss_increase == results[1].predicted_loss_increase


def test_magnitude_without_gradients():
    model = make_model()
    before = weights_of(model)
    result = prune_step(model, None, 0.5, criterion="magnitude")
    assert torch.equal(weights_of(model), torch.where(before.abs() > before.abs().sort().values[35], before, 0))
    assert result.predicted_loss_increase is None


def test_magnitude_with_gradients():
    """The mask is by magnitude, the update by the Fisher."""
    model, grads = make_model(), oracle.gradients(12, D)
    before = weights_of(model)
    kept = before.abs() > before.abs().sort().values[35]
    expected = before.clone()
    Fisher(grads, DAMPING, BLOCK).joint_update(expected, kept)
    result = prune_step(model, grads, 0.5, damping=DAMPING, block_size=BLOCK, criterion="magnitude")
    assert torch.equal(flat(result.masks.values()), kept)
    assert torch.equal(weights_of(model), expected)


def test_result_as_text():
    model = nn.Sequential(nn.Linear(100, 30), nn.Linear(30, 1))
    result = prune_step(model, torch.randn(3, 3030), {"0.weight": 0.75}, backend="reference")
    assert repr(result) == "PruneResult(sparsity=0.7426, layers=2, backend='reference')"
    lines = str(result).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["layer", "weights", "kept", "sparsity"],
        ["0.weight", "3,000", "750", "75.00%"],
        ["1.weight", "30", "30", "0.00%"],
        ["all", "3,030", "780", "74.26%"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4] == f"predicted loss increase {result.predicted_loss_increase:.4g}"
    assert lines[5] == f"damping {result.damping:.2e}, block size 512, sub-steps 4"
    assert lines[6].endswith("s (reference)") and "total" in lines[6] and len(lines) == 7
    assert "predicted" not in str(prune_step(model, None, 0.9, criterion="magnitude"))
