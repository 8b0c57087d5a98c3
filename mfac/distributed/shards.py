"""Parameters of which each process holds a part: DTensors sharded along the first dimension, as by ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfac.interrupts import write_whole

_FLAGS = {"reduce_grads": True, "all_reduce_grads": True}  # of a parameter group of fully_shard


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def has_shards(model: nn.Module) -> bool:
    """Return whether a parameter of a model is a DTensor."""
    return any(is_sharded(p) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, detached; a collective call for a DTensor, the tensor's own memory for another."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part, detached; what is written there is written to the tensor."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def part_of(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a whole value that lies where this process's part of a tensor does.

    Args:
        value: Of the tensor's shape.
        tensor: A tensor, or a DTensor that is replicated or sharded along its first dimension.

    Returns:
        A view.
    """
    if not is_sharded(tensor) or tensor.placements[0].is_replicate():
        return value
    size = tensor.device_mesh.size()
    rows = -(-len(value) // size)  # as torch.chunk cuts, which Shard follows
    begin = min(len(value), rows * tensor.device_mesh.get_local_rank())
    return value[begin : begin + rows]


def reshard(model: nn.Module) -> None:
    """Free the whole weights that ``fully_shard`` keeps after a forward pass: parameters are the parts again."""
    for module in model.modules():
        kind = type(module)  # a missing attribute takes nn.Module.__getattr__ long to look up
        if hasattr(kind, "reshard") and hasattr(kind, "unshard"):
            module.reshard()


@contextmanager
def no_accumulation(model: nn.Module) -> Iterator[None]:
    """Within it a backward pass of a model under ``fully_shard`` reduces its own gradients, and nothing else.

    Gradients that a training loop accumulates without communication (``set_requires_gradient_sync(False)``) lie in
    ``fully_shard``'s own objects rather than in ``.grad``. They are put aside, and back on exit, as are its flags.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    states = _fsdp_states(model)
    groups = [group for state in states for group in _param_groups(state)]
    holders: list[tuple[Any, dict[str, Any]]] = [(group, _FLAGS) for group in groups]
    holders += [(state._state_ctx, {"is_last_backward": True}) for state in states]
    for param in (param for group in groups for param in group.fsdp_params):
        holders.append((param, {"unsharded_accumulated_grad": None}))
        if hasattr(param, "_unsharded_param"):
            holders.append((param._unsharded_param, {"grad": None}))
    saved = [(holder, {name: getattr(holder, name) for name in values}) for holder, values in holders]

    def write(assignments: list[tuple[Any, dict[str, Any]]]) -> None:
        for holder, values in assignments:
            for name, value in values.items():
                setattr(holder, name, value)

    try:
        write(holders)
        yield
    finally:
        write_whole(partial(write, saved))


def _fsdp_states(model: nn.Module) -> list[Any]:
    """Return the state of each module that ``fully_shard`` was called for."""
    return [module._get_fsdp_state() for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def _param_groups(state: Any) -> list[Any]:
    """Those of a module, of which newer versions of torch may have several."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]


def check_shards(params: Mapping[str, Tensor]) -> torch.distributed.ProcessGroup | None:
    """Check how parameters are spread over processes.

    Args:
        params: Name -> parameter.

    Returns:
        The group of the DTensors among them; None if there are none.

    Raises:
        ValueError: If one is cut in another way than along its first dimension over one mesh of one dimension.
    """
    mesh = None
    for name, p in params.items():
        if not is_sharded(p):
            continue
        placement = p.placements[0]
        plain = type(placement).__name__ in ("Shard", "Replicate")  # others cut within a dimension
        if p.device_mesh.ndim != 1 or not plain or not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(
                f"model: expected parameters cut along their first dimension over a mesh of one dimension, as by "
                f"fully_shard, got {name!r} with {p.placements} over {p.device_mesh}"
            )
        if mesh is not None and p.device_mesh != mesh:
            raise ValueError(f"model: expected all parameters on one mesh, got {mesh} and {p.device_mesh} ({name!r})")
        mesh = p.device_mesh
    return None if mesh is None else mesh.get_group()


def check_fully_sharded(model: nn.Module) -> None:
    """Check that all DTensors of a model are those of ``fully_shard``, whose ranks have batches of their own.

    Args:
        model: Any module, of which no parameter is a whole one for a while (:func:`reshard`).

    Raises:
        ValueError: If another parameter is a DTensor: with tensor parallelism all ranks need the same batch.
    """
    groups = [group for state in _fsdp_states(model) for group in _param_groups(state)]
    owners = [param._module_info for group in groups for param in group.fsdp_params]
    own = {id(getattr(owner.module, owner.param_name)) for owner in owners}
    for name, p in model.named_parameters():
        if is_sharded(p) and id(p) not in own:
            raise ValueError(
                f"model: expected parameters that fully_shard has cut, got {name!r}, a DTensor of another kind, such "
                "as of tensor parallelism"
            )


def check_all_sharded(params: Mapping[str, Tensor]) -> None:
    """Check that no parameter is left out of a model that is sharded: ``fully_shard`` averages the others' gradients.

    Args:
        params: Name -> parameter, those that are pruned.

    Raises:
        ValueError: If one is a tensor of this process.
    """
    names = [name for name, p in params.items() if not is_sharded(p)]
    if names:
        raise ValueError(
            f"params: expected parameters that fully_shard has sharded, as others of the model are, got {names[0]!r}, "
            "whose gradient is that of each rank's own batch; call fully_shard for the whole model too, or leave it "
            "out with exclude="
        )
