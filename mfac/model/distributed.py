"""Models that are spread over processes."""

from __future__ import annotations

from torch import nn


def refuse_distributed(model: nn.Module) -> None:
    """Check that the model belongs to one process.

    Args:
        model: Any module.

    Raises:
        ValueError: If it is or holds a DistributedDataParallel or FullyShardedDataParallel module, one that
            ``fully_shard`` was applied to, or a parameter that is a DTensor.
    """
    for module in model.modules():
        classes = {cls.__name__ for cls in type(module).__mro__}
        if "DistributedDataParallel" in classes:
            raise ValueError(
                "model: expected a model on one process, got DistributedDataParallel, whose ranks would prune by "
                "different gradients and drift apart; prune before wrapping it (on rank 0, then broadcast), or feed "
                "the averaged gradients of the training itself to a GradientBuffer after backward() and pass buffer="
            )
        for sharded in ("FullyShardedDataParallel", "FSDPModule"):
            if sharded in classes:
                raise ValueError(_sharded(sharded))
    for name, parameter in model.named_parameters():
        if any(cls.__name__ == "DTensor" for cls in type(parameter).__mro__):
            raise ValueError(_sharded(f"{name!r} as a DTensor"))


def _sharded(got: str) -> str:
    return (
        f"model: expected a model on one process, got {got}, of which each rank holds only a part; prune before "
        "sharding it, or gather the full weights on one rank, prune them there and shard the result"
    )
