"""Models that several processes hold are pruned alike; each test runs in real processes."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mfac
from mfac.distributed.models import find_replicas
from mfac.recipe.manager import Manager

OPTIONS = {"num_grads": 12, "block_size": 64, "progress": False}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 5)
    )


def make_batches(count=48, nan=()):
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 20, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(count)
    ]
    for index in nan:
        batches[index][0][0, 0] = float("nan")
    return batches


def share(batches, size):
    return batches[dist.get_rank() :: size] if dist.is_initialized() else batches


def by_prune_step(model, batches, **group):
    grads = mfac.collect_gradients(model, batches, F.cross_entropy, 12, progress=False, **group)
    options = {"block_size": 64, "loss_fn": F.cross_entropy, "progress": False, "correction_batches": 4, **group}
    return mfac.prune_step(model, grads, 0.7, batches, **options)


def by_prune(model, batches, **group):
    options = {
        "recomputations": 3,
        "final_corrections": 2,
        "refresh": 4,
        "correction_batches": 4,
        "batchnorm_batches": 2,
    }
    return mfac.prune(model, batches, F.cross_entropy, 0.8, **OPTIONS, **options, **group)


def by_pattern(model, batches, **group):
    options = {"recomputations": 2, "final_corrections": 0, "corrections": 0, "refresh": 4, "pattern": "2:4"}
    return mfac.prune(model, batches, F.cross_entropy, 0.5, **OPTIONS, **options, **group)


def by_one_block(model, batches, **group):
    options = {"recomputations": 2, "corrections": 0, "final_corrections": 0, "block_size": None, "num_grads": 12}
    return mfac.prune(model, batches, F.cross_entropy, 0.8, **options, progress=False, **group)


def by_auto(model, batches, **group):
    options = {"recomputations": 1, "corrections": 0, "final_corrections": 0, "num_grads": 12}
    return mfac.prune(
        model, batches, F.cross_entropy, 0.8, **options, block_size="auto", damping="auto", progress=False, **group
    )


def by_pruner(model, batches, **group):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = mfac.Pruner(
        model, batches, F.cross_entropy, sparsity=0.8, end=4, frequency=2, refresh=4, update="joint", recomputations=1,
        corrections=0, **OPTIONS, **group,
    )  # fmt: skip
    inputs, targets = make_batches(1)[0]  # the same on all ranks: training is not what is compared
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        pruner.step()
    assert not any("process" in name for name in pruner.state_dict()["settings"])
    return pruner


def by_recipe(model, batches, **group):
    manager = Manager.from_recipe(
        "modifiers: [!MFACPruningModifier {params: __ALL_PRUNABLE__, final_sparsity: 0.8, start_epoch: 0, "
        "end_epoch: 1, num_grads: 12, refresh: 3, block_size: 64, corrections: 0, update_frequency: 1.0}]"
    )
    return manager.one_shot(model, batches, F.cross_entropy, **group)


def outcome(how, size, wrap):
    """Weights, masks and buffers after pruning."""
    model, batches, group = make_model(), share(make_batches(), size), {}
    if dist.is_initialized():
        model = DistributedDataParallel(model) if wrap else model
        group = {} if wrap else {"process_group": dist.group.WORLD}
    result = how(model, batches, **group)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {**inner.state_dict(), **{f"mask {name}": mask for name, mask in result.masks.items()}}


@pytest.mark.parametrize(
    ("how", "size", "wrap", "exact"),
    [
        (by_prune_step, 2, True, True),
        (by_prune_step, 4, False, True),
        (by_prune, 2, False, False),  # BatchNorm takes twice the batches
        (by_pattern, 2, True, True),
        (by_one_block, 3, True, False),
        (by_auto, 2, True, True),
        (by_pruner, 4, False, True),
        (by_pruner, 2, True, None),  # the gradients of training are averaged
        (by_recipe, 3, True, True),
    ],
)
def test_the_same_as_one_process(how, size, wrap, exact):
    alone = outcome(how, 1, False)
    found = run_ranks(outcome, size, how, size, wrap)
    for name, value in found[0].items():
        for other in found[1:]:
            assert torch.equal(other[name], value), f"{name} differs between ranks"
        if name.startswith("mask") and exact is not None:
            assert torch.equal(value, alone[name]), name
        if exact is True:
            assert torch.equal(value, alone[name]), name
        elif exact is False and "running" not in name:
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


def uneven(size):
    """A batch of NaN on one rank, and a number of gradients that the ranks do not divide."""
    model, batches = DistributedDataParallel(make_model()), share(make_batches(nan=[0, 4]), size)
    buffer = mfac.collect_gradients(model, batches, F.cross_entropy, 7, progress=False)
    assert (len(buffer), buffer.skipped) == (7, 2)
    result = mfac.prune_step(model, buffer, 0.7)
    return {**model.state_dict(), **result.masks}


def test_nan_and_uneven_shares():
    found = run_ranks(uneven, 3, 3)
    assert all(torch.equal(value, found[0][name]) for other in found for name, value in other.items())


def failing(kind, size):
    model = DistributedDataParallel(make_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank, batches, loss_fn = dist.get_rank(), share(make_batches(), size), F.cross_entropy
    group = {}
    if kind == "iterator ends" and rank == 1:
        batches = iter(batches[:3])
    elif kind == "all NaN":
        batches = make_batches(nan=range(48))
    elif kind in ("loss_fn", "killed") and rank == 1:
        calls = iter(range(100))

        def loss_fn(outputs, targets):
            if next(calls) == 2:
                if kind == "killed":
                    os._exit(0)
                raise ZeroDivisionError("of the user")
            return F.cross_entropy(outputs, targets)

    elif kind == "weights":
        with torch.no_grad():
            model.module[0].weight[0, 0] += rank * 1e-6
        before = {name: value.clone() for name, value in model.state_dict().items()}
    elif kind == "grads":
        d = sum(p.numel() for p in mfac.prunable_parameters(model).values())
        grads = torch.randn(8, d, generator=torch.Generator().manual_seed(rank))
    elif kind == "no group":
        group = {"process_group": "world"}
    try:
        if kind == "grads":
            mfac.prune_step(model, grads, 0.5)
        else:
            mfac.prune(model, batches, loss_fn, 0.8, recomputations=2, **OPTIONS, **group)
    except BaseException:
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same or kind == "loss_fn", "half-pruned"
        raise


@pytest.mark.parametrize(
    ("kind", "types", "text"),
    [
        ("iterator ends", ["ValueError"] * 2, "batches: expected more batches, got an end after 3"),
        ("all NaN", ["ValueError"] * 2, "batches: expected finite gradients, got 16 with NaN or infinity"),
        ("loss_fn", ["ZeroDivisionError"] * 2, "of the user"),
        (
            "weights",
            ["ValueError"] * 2,
            "model: expected the same weights on all ranks, got others, of which '0.weight'",
        ),
        ("grads", ["ValueError"] * 2, "grads: expected the same gradients on all ranks, or those of collect_gradients"),
        ("no group", ["TypeError"] * 2, "process_group: expected a torch.distributed process group, got str"),
    ],
)
def test_all_ranks_raise_the_same(kind, types, text):
    found = run_ranks(failing, 2, kind, 2, fails=(0, 1))
    assert [name for name, _ in found] == types
    assert all(text in message for _, message in found), found


def test_a_killed_rank():
    ((name, text), _) = run_ranks(failing, 2, "killed", 2, fails=(0,))
    assert (name, text[:60]) == ("RuntimeError", "process_group: expected all 2 ranks to take part, but one ha")


class Checkpointed(nn.Module):
    """Reentrant checkpointing, or a layer that is not used."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 5)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant:
            return self.last(checkpoint(self.first, x.requires_grad_(), use_reentrant=True))
        return self.last(self.first(x))


def between_forward_and_backward(reentrant):
    """mfac in the middle of a training step, where DistributedDataParallel's hooks wait for gradients."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Checkpointed(reentrant), find_unused_parameters=not reentrant)
    inputs, targets = share(make_batches(2), 2)[0]
    loss = F.cross_entropy(model(inputs), targets)
    params = ["first.weight", "spare.weight", "last.weight"]
    batches = share(make_batches(), 2)
    grads = mfac.collect_gradients(model, batches, F.cross_entropy, 4, progress=False, params=params)
    loss.backward()
    return grads.unreached, {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
def test_the_hooks_of_ddp_are_left_alone():
    found = run_ranks(between_forward_and_backward, 2, False)
    assert all(unreached == ["spare.weight"] for unreached, _ in found)
    torch.manual_seed(0)
    model = Checkpointed(False)
    sum(0.5 * F.cross_entropy(model(x), y) for x, y in make_batches(2)).backward()
    for _, grads in found:
        for name in ("first.weight", "last.bias"):
            torch.testing.assert_close(grads[name], dict(model.named_parameters())[name].grad)
    for name, text in run_ranks(between_forward_and_backward, 2, True, fails=(0, 1)):
        assert name == "ValueError" and "use_reentrant=False on several processes" in text, text


def warned():
    """The texts of warnings."""
    data = TensorDataset(*(torch.cat(x) for x in zip(*make_batches(8), strict=True)))
    texts = []
    for model, sampler, group in (
        (make_model(), None, None),
        (make_model(), None, None),
        (DistributedDataParallel(make_model()), None, None),
        (DistributedDataParallel(make_model()), DistributedSampler(data), None),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader = DataLoader(data, 8, sampler=sampler)
            mfac.collect_gradients(model, loader, F.cross_entropy, 4, progress=False, process_group=group)
        texts.append([str(warning.message)[:40] for warning in caught])
    return texts


def test_warnings():
    for texts in run_ranks(warned, 2):
        assert texts == [
            ["process_group: None, so each of the 2 pr"],
            [],
            ["batches: the first batches of 2 ranks ha"],
            [],
        ]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_models(group):
    wrapped = DistributedDataParallel(nn.Linear(4, 3))
    for model in (wrapped, torch.compile(wrapped)):
        assert find_replicas(model)[0] is wrapped.module
    with pytest.raises(ValueError, match="model: expected DistributedDataParallel around the whole model, got it a"):
        find_replicas(nn.Sequential(wrapped))
    for model in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
        assert find_replicas(model)[0] is model
    flat = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="model: expected fully_shard or DistributedDataParallel, got FullySharded"):
        find_replicas(nn.Sequential(flat))


def differing(name, value):
    """One rank is given something else."""
    model, batches = DistributedDataParallel(make_model()), share(make_batches(), 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {**OPTIONS, "recomputations": 2, "final_corrections": 1, "sparsity": 0.7, "batches": batches}
    if dist.get_rank() == 1:
        if name == "a weight":
            with torch.no_grad():
                model.module[0].weight[0, 0] = torch.nan
        elif name == "a bias":
            with torch.no_grad():
                model.module[0].bias[0] += 1
        else:
            options[name] = value
    try:
        mfac.prune(model, loss_fn=F.cross_entropy, **options)
    except (TypeError, ValueError):
        others = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
        assert len(others) == (dist.get_rank() if name.startswith("a ") else 0)
        whole = {"process_group": dist.group.WORLD, "progress": False}
        mfac.collect_gradients(make_model(), batches, F.cross_entropy, 2, **whole)  # no rank waits
        raise


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_grads", 8, "num_grads: expected the same on all 2 ranks of the process group, got others"),
        ("damping", 1e-2, "damping: expected the same on all 2 ranks of the process group, got others"),
        ("block_size", 32, "block_size: expected the same on all 2 ranks of the process group, got others"),
        ("sparsity", 0.8, "sparsity: expected the same on all 2 ranks of the process group, got others"),
        ("params", ["0.weight"], "params: expected the same on all 2 ranks of the process group, got others"),
        ("masks", {"0.weight": torch.ones(64, 20) > 0}, "masks: expected the same on all 2 ranks of the process group"),
        ("recomputations", 3, "recomputations: expected the same on all 2 ranks of the process group, got others"),
        ("batches", 3, "batches: expected an iterable of batches, got int"),
        ("a weight", None, "model: expected finite weights, got NaN or infinity in '0.weight'"),
        ("a bias", None, "model: expected the same weights on all ranks, got others, of which '0.bias'"),
    ],
)
def test_what_differs_between_ranks(name, value, text):
    found = run_ranks(differing, 2, name, value, fails=(0, 1))
    assert all(text in message for _, message in found), found
