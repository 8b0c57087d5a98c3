"""Models that are spread over processes."""

from __future__ import annotations

from torch import nn

from mfac.checks import check_module


def refuse_distributed(model: nn.Module) -> None:
    """Check that the model's gradients are those of one process.

    Args:
        model: Any module.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it is or holds a DistributedDataParallel module, or is sharded.
    """
    refuse_sharded(model)
    for module in model.modules():
        if "DistributedDataParallel" in _classes(module):
            raise ValueError(
                "model: expected a model on one process, got DistributedDataParallel, whose ranks would prune by "
                "different gradients and drift apart; prune before wrapping it (on rank 0, then broadcast), or feed "
                "the averaged gradients of the training itself to a GradientBuffer after backward() and pass buffer="
            )


def refuse_sharded(model: nn.Module) -> None:
    """Check that the weights of the model are whole.

    Args:
        model: Any module.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it is or holds a FullyShardedDataParallel module, one that ``fully_shard`` was applied to, or a
            parameter that is a DTensor.
    """
    check_module("model", model)
    for module in model.modules():
        for sharded in {"FullyShardedDataParallel", "FSDPModule"} & _classes(module):
            raise ValueError(_sharded(sharded))
    for name, parameter in model.named_parameters():
        if "DTensor" in _classes(parameter):
            raise ValueError(_sharded(f"{name!r} as a DTensor"))


def _classes(value: object) -> set[str]:
    return {cls.__name__ for cls in type(value).__mro__}


def _sharded(got: str) -> str:
    return (
        f"model: expected a model on one process, got {got}, of which each rank holds only a part; prune before "
        "sharding it, or gather the full weights on one rank, prune them there and shard the result"
    )
