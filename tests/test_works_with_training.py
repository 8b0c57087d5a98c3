"""Training programs that people have: wrapped, compiled, averaged, scaled, accumulated, interrupted, resumed."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from works_with import PLAIN, SETTINGS, check_against_plain_loop, check_zeros, classify, plain_gradients

import mfac
from mfac.pruning.gradual import no_unfinished_warning

CE = nn.functional.cross_entropy


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def dataset(n=64):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 12, generator=generator), torch.randint(4, (n,), generator=generator))


def batches(count=6):
    x, y = dataset(4 * count).tensors
    return list(zip(x.split(4), y.split(4), strict=True))


def make_pruner(model, source, **change):
    settings = {"sparsity": 0.8, "end": 12, "frequency": 4, "num_grads": 6, "progress": False, **SETTINGS, **change}
    return mfac.Pruner(model, source, CE, **settings)


def zeros(model):
    return [int((layer.weight == 0).sum()) for layer in model if isinstance(layer, nn.Linear)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_model(when):
    """Pruned through the compiled module, or compiled afterwards: the same as without it."""
    plain, model = mlp(), mlp()
    expected = check_against_plain_loop(plain, batches(), classify, loss_fn=CE)
    compiled = torch.compile(model, backend="eager")
    target = compiled if when == "before" else model
    result = mfac.prune(target, batches(), CE, 0.5, num_grads=6, recomputations=1, progress=False, **SETTINGS, **PLAIN)
    assert list(result.masks) == ["0.weight", "3.weight"]
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in result.masks.items())
    x = batches()[0][0]
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x))


def test_deepcopy_and_pickle():
    """A copy of model and Pruner together goes on as the original does; so does a Pruner from a file."""
    model = mlp()
    pruner = make_pruner(model, DataLoader(dataset(), batch_size=4, shuffle=True))
    for _ in range(5):
        pruner.step()
    twin, other = copy.deepcopy((model, pruner))
    file = io.BytesIO()
    torch.save((model, pruner), file)
    file.seek(0)
    loaded, third = torch.load(file, weights_only=False)
    for _ in range(8):
        for one in (pruner, other, third):
            one.step()
    for copied in (twin, loaded):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True))
    assert other.sparsity == third.sparsity == pruner.sparsity == pytest.approx(0.8, abs=1e-3)


def test_averaged_weights():
    """EMA and SWA: the average of a model that becomes sparse is dense, until the masks are applied to it."""
    model = mlp()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = make_pruner(model, batches())
    for _ in range(12):
        pruner.step()
        ema.update_parameters(model)
    assert zeros(ema.module) == [0, 0]
    mfac.apply_masks(ema, pruner.masks)
    assert zeros(ema.module) == zeros(model)
    dense = mlp()
    mfac.prune_step(model, None, 0.9, criterion="magnitude", masks=pruner.masks).apply(nn.DataParallel(dense))
    assert zeros(dense) == zeros(model)


def test_ddp_masks_by_other_names():
    """Masks with the prefix of a wrapper serve a model without it, and the other way round."""
    masks = mfac.prune_step(mlp(), None, 0.5, criterion="magnitude").masks
    wrapped = {f"module.{name}": mask for name, mask in masks.items()}
    for given in (masks, wrapped):
        for model in (mlp(), nn.DataParallel(mlp()), torch.compile(mlp(), backend="eager")):
            result = mfac.prune_step(model, None, 0.5, criterion="magnitude", masks=given)
            assert list(result.masks) == ["0.weight", "3.weight"]
            assert all(torch.equal(result.masks[name], mask) for name, mask in masks.items())


def feed(buffer, model, source, scaler=None, parts=1):
    """A training loop's gradients: scaled by a GradScaler, summed over parts of each batch."""
    for x, y in source:
        model.zero_grad(set_to_none=True)
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = CE(model(a), b)
            (loss if scaler is None else scaler.scale(loss)).backward()
        buffer.append(model, scale=parts * (1 if scaler is None else scaler.get_scale()))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_of_the_training_loop(scaled, parts):
    """Under GradScaler and accumulation a buffer holds the gradients of the plain loop."""
    model = mlp().eval()
    buffer = mfac.GradientBuffer(6, mfac.prunable_parameters(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    feed(buffer, model, batches(), scaler, parts)
    expected = plain_gradients(model, batches(), classify, buffer.names)
    torch.testing.assert_close(buffer.tensor, expected, rtol=1e-4, atol=1e-6)
    result = mfac.prune_step(model, buffer, 0.5, **SETTINGS)
    check_zeros(model, result, 0.5)


def test_attached_to_the_optimizer():
    """As with calls of step() in the loop, bit for bit."""
    models, outcomes = [mlp(), mlp()], []
    for model, attached in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = make_pruner(model, batches())
        handle = pruner.attach(optimizer) if attached else None
        for x, y in batches() * 3:
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
            if not attached:
                pruner.step()
        outcomes.append((pruner.sparsity, zeros(model)))
        if attached:
            handle.remove()
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_master_weights_are_refused():
    """An optimizer of float32 copies would bring pruned weights back."""
    model = mlp().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    pruner = mfac.Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
    with pytest.raises(ValueError, match=r"optimizer: expected the model's own parameter '0\.weight'"):
        pruner.attach(torch.optim.SGD(masters, lr=0.1))


def test_norm_of_clipped_gradients():
    """Pruned weights do not count in it once their gradients are masked."""
    model = mlp()
    pruner = mfac.Pruner(model, sparsity=0.9, end=1, criterion="magnitude")
    pruner.step()
    x, y = batches()[0]
    CE(model(x), y).backward()
    params = [p for p in model.parameters()]
    counted = torch.cat(
        [
            (p.grad * pruner.masks[name] if name in pruner.masks else p.grad).flatten()
            for name, p in model.named_parameters()
        ]
    ).norm()
    before = torch.nn.utils.get_total_norm([p.grad for p in params])
    pruner.mask_gradients()
    after = torch.nn.utils.get_total_norm([p.grad for p in params])
    assert after < before and float(after) == pytest.approx(float(counted))


def test_training_loader_is_not_disturbed():
    """A loader with persistent workers, shared with a training epoch in the midst of which the Pruner prunes."""

    def orders(prune):
        torch.manual_seed(0)
        loader = DataLoader(dataset(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
        model, seen = mlp(), []
        pruner = make_pruner(model, loader, end=3, frequency=1, recomputations=2)
        for x, _ in loader:
            seen.append(x[:, 0].tolist())
            if prune:
                pruner.step()
        return seen

    assert orders(True) == orders(False) and len(orders(True)) == 8


@pytest.mark.filterwarnings("ignore")
def test_ddp(tmp_path):
    """By batches of its own, and by the averaged gradients of the training; test_distributed has several processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        wrapped = nn.parallel.DistributedDataParallel(model)
        grads = mfac.collect_gradients(wrapped, batches(), CE, 4, progress=False)
        assert torch.equal(grads.tensor, mfac.collect_gradients(model, batches(), CE, 4, progress=False).tensor)
        buffer = mfac.GradientBuffer(6, mfac.prunable_parameters(wrapped))
        pruner = mfac.Pruner(wrapped, buffer=buffer, sparsity=0.5, end=6, frequency=6, progress=False)
        for x, y in batches():
            wrapped.zero_grad()
            CE(wrapped(x), y).backward()
            buffer.append(wrapped)
            pruner.step()
        assert list(pruner.masks) == ["0.weight", "3.weight"] and sum(zeros(model)) == 128
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("call", [5, 8, 10])
def test_interrupted_collection(call, unchanged):
    """Ctrl-C while gradients are collected, before and between steps: nothing is lost, and a new call goes on."""
    calls = []

    def loss_fn(out, y):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return CE(out, y)

    model = mlp()
    settings = {"num_grads": 6, "recomputations": 4, "progress": False, **SETTINGS, **PLAIN}
    with unchanged(model, weights=False), pytest.raises(KeyboardInterrupt) as caught:
        mfac.prune(model, batches(), loss_fn, 0.8, **settings)
    partial = caught.value.result
    if call == 5:
        assert partial.masks == {} and partial.sparsity == 0 and zeros(model) == [0, 0]
    else:
        assert len(partial.steps) == {8: 2, 10: 4}[call]  # the last while the loss is measured at the end
        check_zeros(model, partial, partial.sparsity)
    result = mfac.prune(model, batches(), CE, 0.8, masks=partial.masks, **settings)
    check_zeros(model, result, 0.8)


def test_interrupted_update_of_a_pruner():
    """The update stays due; the model is as the masks say in between."""
    calls = []

    def loss_fn(out, y):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("out of memory")
        return CE(out, y)

    model = mlp()
    pruner = mfac.Pruner(
        model, batches(), loss_fn, sparsity=0.8, end=1, num_grads=6, recomputations=3, progress=False, **SETTINGS
    )
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        pruner.step()
    partial = caught.value.result
    assert 0 < pruner.sparsity < 0.8 and pruner.sparsity == partial.sparsity
    check_zeros(model, partial, partial.sparsity)
    assert pruner.step().sparsity == pytest.approx(0.8, abs=1e-2) and sum(zeros(model)) == round(0.8 * 256)


def run(steps, state=None):
    """Train with a shuffling loader; returns the bits after `steps`, and what a checkpoint holds in the middle."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(dataset(), batch_size=4, shuffle=True)
    pruner = make_pruner(model, loader, end=12, frequency=3, recomputations=2)
    things, saved, first = (model, optimizer, pruner), None, 0
    if state is not None:
        first, states = state
        for thing, value in zip(things, states, strict=True):
            thing.load_state_dict(value)
    for i in range(first, steps):
        x, y = batches(16)[i % 16]
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        pruner.step()
        if i == 7:
            file = io.BytesIO()
            torch.save((i + 1, [thing.state_dict() for thing in things]), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
    return model, saved


def test_killed_and_resumed():
    """In the middle of a schedule, and of a pass over the loader: the same bits as without a break."""
    model, saved = run(14)
    resumed, _ = run(14, saved)
    assert all(
        torch.equal(p, q) for p, q in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_resumed_with_another_schedule():
    """It holds its sparsity until the new schedule has passed it; settings that differ are refused."""
    model = mlp()
    pruner = make_pruner(model, batches())
    for _ in range(9):
        pruner.step()
    reached, state = pruner.sparsity, pruner.state_dict()
    later = make_pruner(model, batches(), end=40)
    later.load_state_dict(state)
    seen = []
    for _ in range(31):
        later.step()
        seen.append(later.sparsity)
    assert seen[0] == reached and seen == sorted(seen) and later.finished
    assert seen[-1] == pytest.approx(0.8, abs=1e-2) and seen[3] == reached
    with pytest.raises(ValueError, match=r"state: expected damping=0\.1 like this Pruner, got '3e-2\*mean'"):
        make_pruner(model, batches(), damping=0.1).load_state_dict(state)
    make_pruner(model, batches(), damping=0.1).load_state_dict(state, strict=False)


def test_start_from_what_is_sparse():
    """masks="nonzero" goes on from a sparse model; without it a warning says that its zeros would come back."""
    model = mlp()
    masks = mfac.prune_step(model, None, 0.7, criterion="magnitude").masks
    with pytest.warns(UserWarning, match="69.9% of the weights are zero, but there are no masks"):
        make_pruner(copy.deepcopy(model), batches()).step()
    pruner = make_pruner(model, batches(), masks="nonzero")
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    held = [pruner.step() is None for _ in range(5)]
    assert held[0] and pruner.sparsity >= 179 / 256
    for _ in range(8):
        pruner.step()
    assert sum(zeros(model)) == round(0.8 * 256)
    assert not any((pruner.masks[name] & ~mask).any() for name, mask in masks.items())


def test_schedule_that_training_never_reaches():
    pruner = make_pruner(mlp(), batches())
    assert repr(pruner) == "Pruner(sparsity 0.0 % of 80.0 %, not started of 12, 0 updates, next at 0)"
    for _ in range(5):
        pruner.step()
    assert "time 5 of 12, 1 updates" in repr(pruner)
    with pytest.warns(UserWarning, match="training never reached end=12"):
        pruner.__del__()


def test_an_error_that_ends_training_is_not_followed_by_a_warning(recwarn):
    pruner = make_pruner(mlp(), batches())
    with pytest.raises(RuntimeError, match="the loss"), no_unfinished_warning():
        pruner.step()
        raise RuntimeError("the loss")
    pruner.__del__()
    assert not recwarn
    with no_unfinished_warning():
        pruner.step()
    with pytest.warns(UserWarning, match="training never reached end=12"):
        pruner.__del__()


def test_first_call_in_the_middle():
    pruner = make_pruner(mlp(), batches())
    assert pruner.step(9).sparsity == pytest.approx(0.8 * (1 - (1 - 8 / 12) ** 3), abs=1e-2)


def test_defaults_of_torch():
    """Another default type, a default device without memory, inference mode, and no gradients allowed."""
    expected = mfac.prune(mlp(), batches(), CE, 0.5, num_grads=6, recomputations=2, progress=False, **SETTINGS).masks
    settings = {"num_grads": 6, "recomputations": 2, "progress": False, **SETTINGS}
    model, data = mlp(), batches()
    contexts = [torch.inference_mode(), torch.no_grad(), torch.device("meta")]
    for context in contexts:
        model = mlp()
        with context:
            masks = mfac.prune(model, data, CE, 0.5, **settings).masks
        assert all(torch.equal(mask, expected[name]) and not mask.is_inference() for name, mask in masks.items())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = mlp().float()
        model.load_state_dict(mlp().float().state_dict())
        masks = mfac.prune(model, data, CE, 0.5, **settings).masks
    finally:
        torch.set_default_dtype(before)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 128


def test_settings_are_named_if_misspelt():
    with pytest.raises(
        TypeError, match=r"prune_step\(\) got an unexpected keyword argument 'dampng'; did you mean 'dam"
    ):
        mfac.prune_step(mlp(), torch.ones(2, 256), dampng=1.0)
