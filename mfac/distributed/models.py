"""Which processes hold a model, and which models cannot be pruned there."""

from __future__ import annotations

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mfac.checks import check_instance, check_module, warn
from mfac.distributed.replicas import ALONE, Replicas
from mfac.distributed.shards import check_fully_sharded, check_shards, reshard

_warned = False  # of a group that is not used


def find_replicas(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> tuple[nn.Module, Replicas]:
    """Return the module that a process runs by itself, and the processes that have a copy of it.

    Args:
        model: Any module; a DistributedDataParallel module, also a compiled one, brings its process group with it.
        process_group: Ranks that hold the same model; None: those of DistributedDataParallel or of the mesh of
            ``fully_shard``, else this process.

    Returns:
        What DistributedDataParallel wraps, whose gradients are not averaged, or the model; and the ranks.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the model is sharded in another way than by ``fully_shard``, holds a DistributedDataParallel
            module without being one, or this process is not in the group.
    """
    global _warned
    refuse_flat(model)
    outer = getattr(model, "_orig_mod", model)  # of torch.compile
    inner = outer.module if isinstance(outer, DistributedDataParallel) else model
    if any(isinstance(module, DistributedDataParallel) for module in inner.modules()):
        raise ValueError(
            "model: expected DistributedDataParallel around the whole model, got it around a part, of which each rank "
            "would prune by other gradients; pass that part"
        )
    reshard(inner)
    group = check_shards(dict(inner.named_parameters()))
    check_fully_sharded(inner)
    if process_group is not None:
        check_instance("process_group", process_group, dist.ProcessGroup, "a torch.distributed process group")
        if dist.get_rank(process_group) < 0:
            raise ValueError("process_group: expected one that this process belongs to, got another")
    if group is not None:
        if process_group not in (None, group):
            raise ValueError("process_group: expected None or that of the sharded parameters, got another")
        process_group = group
    elif inner is not model:
        if process_group not in (None, outer.process_group):
            raise ValueError("process_group: expected None or that of DistributedDataParallel, got another")
        process_group = outer.process_group
    elif process_group is None and not _warned and dist.is_available() and dist.is_initialized():
        if dist.get_world_size() > 1:
            _warned = True
            warn(
                f"process_group: None, so each of the {dist.get_world_size()} processes prunes its model by itself; "
                "process_group=torch.distributed.group.WORLD, or a model in DistributedDataParallel, prunes them alike"
            )
    if process_group is None or dist.get_world_size(process_group) == 1:
        return inner, ALONE
    return inner, Replicas(process_group, lockstep=group is not None)


def refuse_flat(model: nn.Module) -> None:
    """Check that the parameters of a model are tensors of their shapes.

    Args:
        model: Any module.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it is or holds a FullyShardedDataParallel module, whose parameters are flat.
    """
    check_module("model", model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model: expected fully_shard or DistributedDataParallel, got FullyShardedDataParallel, which flattens "
            "parameters; use fully_shard, or prune before sharding"
        )
