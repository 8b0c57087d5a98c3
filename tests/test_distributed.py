"""Models over several processes are refused."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mfac.model.distributed import refuse_distributed


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def parameter_of(layer):
    mesh = init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
    assert isinstance(layer.weight, DTensor)
    return layer


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "got DistributedDataParallel, .*; prune before wrapping it .* and pass buffer="),
        (
            lambda layer: FullyShardedDataParallel(layer, device_id=torch.device("cpu")),
            "got FullyShardedDataParallel, ",
        ),
        (lambda layer: fully_shard(layer, mesh=init_device_mesh("cpu", (1,))), "got FSDPModule, .*; prune before"),
        (parameter_of, r"got '(0\.)?weight' as a DTensor, .*; prune before"),
    ],
    ids=["DDP", "FSDP", "fully_shard", "DTensor"],
)
def test_refused(group, wrap, message):
    for model in (wrap(nn.Linear(4, 3)), nn.Sequential(wrap(nn.Linear(4, 3)))):
        with pytest.raises(ValueError, match="model: expected a model on one process, " + message):
            refuse_distributed(model)


def test_accepted():
    for model in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
        refuse_distributed(model)
