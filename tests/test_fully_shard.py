"""Models that fully_shard has spread over processes are pruned as on one; each test runs in real processes."""

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_distributed import (
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import mfac
from mfac.distributed.shards import part_of, whole


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
    other = dist.new_group([0, 1, 2, 3])
    sharded = shard(make_model())
    with pytest.raises(ValueError, match="process_group: expected None or that of the sharded parameters, got another"):
        mfac.prune_step(sharded, None, 0.5, criterion="magnitude", process_group=other)
    mfac.prune_step(sharded, None, 0.5, criterion="magnitude")
    return [float((whole(sharded[0].weight) == 0).float().mean())]


def test_refusals():
    assert run_ranks(refusals, 4)[0][0] > 0.3
