"""Models that fully_shard has spread over processes are pruned as on one; each test runs in real processes."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_distributed import (
    by_auto,
    by_one_block,
    by_pattern,
    by_prune,
    by_prune_step,
    by_pruner,
    by_recipe,
    make_batches,
    make_model,
)
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import mfac
from mfac.distributed.shards import local, part_of, whole
from mfac.recipe.manager import Manager


def shard(model):
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model):
            fully_shard(layer, mesh=mesh)
    return model


def outcome(how):
    """Weights and masks after pruning; all ranks have the same batches, whose mean is that of one process."""
    model = shard(make_model())
    if how is not by_pruner:  # whose optimizer would be made for the whole weights
        model.eval()
        with torch.no_grad():
            model(make_batches(1)[0][0])  # after which fully_shard keeps the last layers whole
    result = how(model.train(), make_batches())
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    return {**weights, **{f"mask {name}": mask for name, mask in result.masks.items()}}


@pytest.mark.parametrize(
    ("how", "size", "exact"),
    [
        (by_prune_step, 2, False),
        (by_prune, 3, None),
        (by_pattern, 2, True),
        (by_one_block, 3, True),
        (by_auto, 2, None),
        (by_pruner, 3, True),
        (by_recipe, 4, True),  # more ranks than one layer has rows for
    ],
)
def test_the_same_as_one_process(how, size, exact):
    alone, found = outcome(how), run_ranks(outcome, size, how)
    for name, value in found[0].items():
        assert all(torch.equal(other[name], value) for other in found[1:]), f"{name} differs between ranks"
        if name.startswith("mask") and exact is not None:  # other numbers of batches judge the corrections
            assert torch.equal(value, alone[name]), name
        elif exact and value.is_floating_point():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)
    for name in ("0.weight", "3.weight"):
        assert torch.equal(found[0][name] == 0, ~found[0][f"mask {name}"])


def train(folder, steps, resumed):
    """Train and prune, from a checkpoint to a checkpoint; return masks, sparsities by layer, and in all."""
    model = shard(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"num_grads": 8, "block_size": 64, "refresh": 4, "correction_batches": 2, "progress": False}
    pruner = mfac.Pruner(model, make_batches(), F.cross_entropy, sparsity=0.8, end=6, frequency=2, **options)
    state = {"model": model.state_dict(), "pruner": pruner.state_dict()}
    if resumed:
        checkpoint.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        pruner.load_state_dict(state["pruner"])
        assert int((whole(model[0].weight) == 0).sum()) == int((~pruner.masks["0.weight"]).sum()) > 0
    inputs, targets = make_batches(1)[0]
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        pruner.mask_gradients()
        for name, mask in pruner.masks.items():
            assert not whole(pruner.params[name].grad)[~mask].any()
        optimizer.step()
        pruner.step()
    reached = {name: found for name, (_, found) in pruner.layer_sparsities().items()}
    if not resumed:
        checkpoint.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, checkpoint_id=folder)
    return pruner.masks, reached, pruner.sparsity


def test_pruner_in_training_and_resumed_at_another_number_of_ranks(tmp_path):
    (masks, _, sparsity), (others, _, _) = run_ranks(train, 2, tmp_path, 4, False)
    assert 0 < sparsity < 0.8
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    for _, reached, sparsity in run_ranks(train, 3, tmp_path, 3, True):
        assert sparsity == pytest.approx(0.8, abs=1e-3)
        assert all(0 < value < 1 for value in reached.values())


def parts():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for rows in (1, 2, 5, 9):
        value = torch.arange(rows * 3.0).view(rows, 3)
        tensor = distribute_tensor(value, mesh, [Shard(0)])
        assert torch.equal(part_of(value, tensor), tensor.to_local()), rows
        assert torch.equal(whole(tensor), value)


def test_parts():
    run_ranks(parts, 4)


def refusals():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (4,)), [Shard(1)]))
    square = nn.Linear(8, 8)
    fully_shard(square, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    for model in (layer, square):
        before = whole(model.weight).clone()
        with pytest.raises(ValueError, match="model: expected parameters cut along their first dimension over a mesh"):
            mfac.prune_step(model, None, 0.5, criterion="magnitude")
        assert torch.equal(whole(model.weight), before)
    parallel = nn.Sequential(nn.Linear(8, 8))
    parallelize_module(parallel, init_device_mesh("cpu", (4,)), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"model: expected parameters that fully_shard has cut, got '0.weight'"):
        mfac.prune_step(parallel, None, 0.5, criterion="magnitude")
    other = dist.new_group([0, 1, 2, 3])
    sharded = shard(make_model())
    with pytest.raises(ValueError, match="process_group: expected None or that of the sharded parameters, got another"):
        mfac.prune_step(sharded, None, 0.5, criterion="magnitude", process_group=other)
    mfac.prune_step(sharded, None, 0.5, criterion="magnitude")
    return [float((whole(sharded[0].weight) == 0).float().mean())]


def test_refusals():
    assert run_ranks(refusals, 4)[0][0] > 0.3


def partly_sharded(ignored):
    """The first layer is no part of what is sharded, so each rank has other gradients of it."""
    model = make_model()
    if ignored:
        fully_shard(model, ignored_params=set(model[0].parameters()))
    else:
        for layer in model[1:]:
            fully_shard(layer)
    before = whole(model[0].weight).clone()
    text = "params: expected parameters that fully_shard has sharded, as others of the model are, got '0.weight'"
    for how in (by_prune_step, by_prune):
        with pytest.raises(ValueError, match=text):
            how(model, make_batches())
    assert torch.equal(whole(model[0].weight), before)
    rest = {"params": ["3.weight", "5.weight"], "block_size": 64, "progress": False}
    return mfac.prune(
        model, make_batches(), F.cross_entropy, 0.5, num_grads=4, recomputations=1, final_corrections=1, **rest
    ).masks


@pytest.mark.parametrize("ignored", [True, False])
def test_parameters_that_are_not_sharded(ignored):
    first, second = run_ranks(partly_sharded, 2, ignored)
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


def failing(kind):
    model, batches, calls = shard(make_model()), make_batches(), iter(range(1000))
    before = {name: whole(value).clone() for name, value in model.state_dict().items()}

    def loss_fn(outputs, targets):
        if kind.startswith("loss") and dist.get_rank() == 1 and next(calls) == int(kind.split()[1]):
            raise ZeroDivisionError("of the user")
        return F.cross_entropy(outputs, targets)

    if kind == "loader":
        batches = iter(batches[: 3 if dist.get_rank() else 40])
    try:
        if kind == "statistics":
            mfac.reestimate_batchnorm(model, iter(make_batches(2 + 6 * (dist.get_rank() == 0))), 6)
        else:
            mfac.prune(model, batches, loss_fn, 0.5, num_grads=6, recomputations=1, block_size=64, progress=False)
    except BaseException as error:
        masks = getattr(error, "result", None) and error.result.masks
        if not masks:
            assert all(torch.equal(whole(value), before[name]) for name, value in model.state_dict().items())
        mfac.collect_gradients(model, make_batches(), F.cross_entropy, 2, progress=False)  # no rank waits
        raise


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("loader", "ValueError", "batches: expected more batches, got an end after 3"),
        ("statistics", "ValueError", "batches: expected more batches, got an end after 2"),
        ("loss 2", "ZeroDivisionError", "of the user"),  # a gradient is collected
        ("loss 7", "ZeroDivisionError", "of the user"),  # a correction is judged
    ],
)
def test_an_error_of_one_rank_is_one_of_all(kind, name, text):
    found = run_ranks(failing, 2, kind, fails=(0, 1))
    assert [kind for kind, _ in found] == [name] * 2
    assert all(text in message for _, message in found), found


def by_fed_buffer(model, batches):
    buffer = mfac.GradientBuffer(4, mfac.prunable_parameters(model))
    model.eval()
    for inputs, targets in batches[:4]:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        buffer.append(model)
    return mfac.prune_step(model, buffer, 0.7, block_size=64)


@pytest.mark.parametrize(("how", "size"), [(by_fed_buffer, 2), (by_prune_step, 1), (by_prune, 1)])
def test_gradients_that_are_sharded_in_a_buffer_of_one_process(how, size):
    alone, found = outcome(how), run_ranks(outcome, size, how)
    for other in found:
        assert all(torch.equal(other[name], value) for name, value in alone.items() if name.startswith("mask"))
        assert torch.equal(other["0.weight"], found[0]["0.weight"])


def buffers_of_others():
    sharded, group = shard(make_model()), {"process_group": dist.group.WORLD}
    buffer = mfac.collect_gradients(make_model(), make_batches(), F.cross_entropy, 4, progress=False, **group)
    with pytest.raises(ValueError, match="buffer: expected one that collect_gradients made for the same processes"):
        mfac.collect_gradients(sharded, make_batches(), F.cross_entropy, 4, buffer=buffer, progress=False)
    with pytest.raises(ValueError, match="grads: expected gradients of the same processes and kind of model"):
        mfac.prune_step(sharded, buffer, 0.5)
    again = dist.new_group([0, 1])
    mfac.prune_step(make_model(), buffer, 0.5, process_group=again)


def test_buffers_of_others():
    run_ranks(buffers_of_others, 2)


def accumulated(collects, sync, mixed):
    """Gradients of two batches, the first without communication; mfac collects in between."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    model = nn.Sequential(*(layer for layer in make_model() if not isinstance(layer, nn.BatchNorm1d)))
    for layer in (model[0], model):
        fully_shard(layer, mp_policy=policy)

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs.float(), targets)

    (first, second), rows = make_batches(2), []

    def collect():
        rows.append(mfac.collect_gradients(model, make_batches(), loss_fn, 1, progress=False).mean())

    collect()
    model.set_requires_gradient_sync(False)
    loss_fn(model(first[0]), first[1]).backward()
    model.set_requires_gradient_sync(sync)
    if collects:
        collect()
        assert torch.equal(*rows)
    model.set_requires_gradient_sync(True)
    loss_fn(model(second[0]), second[1]).backward()
    return [whole(p.grad) for p in model.parameters()]


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_gradients_that_training_accumulates(sync, mixed):
    (expected, _), (found, _) = (run_ranks(accumulated, 2, collects, sync, mixed) for collects in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def constant_masks():
    """Training with masks of the zeros that there are, by a recipe and by hand; after evaluation weights are whole."""
    recipe = "modifiers: [!ConstantPruningModifier {params: __ALL_PRUNABLE__}, !EpochRangeModifier {end_epoch: 9}]"
    model, (inputs, targets) = make_model(), make_batches(1)[0]
    with torch.no_grad():
        model[0].weight[::2] = 0
        model[5].weight[:, ::2] = 0
    masks = {name: model.get_parameter(name) != 0 for name in ("0.weight", "3.weight", "5.weight")}
    shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Manager.from_recipe(recipe).apply(model, optimizer)
    for step in range(3):
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        with torch.no_grad():
            model(inputs)
        session.step((step + 1) / 3) if step < 2 else mfac.apply_masks(model, masks)
    for layer in (model[0], model):
        layer.reshard()
    zeros = {name: whole(model.get_parameter(name)) == 0 for name in masks}
    assert all(torch.equal(zeros[name], ~mask) for name, mask in masks.items())


def test_constant_masks():
    run_ranks(constant_masks, 2)


def set_params():
    """A number and a list; a run that goes on takes them back."""
    recipe = """
    modifiers:
      - !SetParamModifier {params: [0.weight], val: 0.25}
      - !SetParamModifier {params: [5.bias], val: [1, 2, 3, 4, 5]}
      - !EpochRangeModifier {end_epoch: 9}
    """
    model = shard(make_model())
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Manager.from_recipe(recipe).apply(model, optimizer)
    assert (whole(model[0].weight) == 0.25).all() and whole(model[5].bias).tolist() == [1, 2, 3, 4, 5]
    session.step(1.0)
    state = session.state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            local(p).copy_(part_of(before[name], p))
    Manager.from_recipe(recipe).apply(model, optimizer).load_state_dict(state)
    assert all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
    session = Manager.from_recipe(recipe).apply(model, optimizer)
    local(model[0].weight).fill_(0.75)  # as a checkpoint that is read in place
    session.load_state_dict(state)
    assert (whole(model[0].weight) == 0.75).all()


def test_set_params():
    run_ranks(set_params, 3)
