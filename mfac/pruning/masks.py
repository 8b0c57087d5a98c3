"""Masks by parameter name: check them, and apply them to a model or to a copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mfac.checks import check_instance
from mfac.distributed.shards import local, part_of, reshard
from mfac.model.names import NameTable, named_parameters, shorten


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of a model to zero, in place.

    For what training leaves beside the pruned model: averages of weights (EMA, SWA), copies, checkpoints from before.
    Names may come with or without the prefixes of wrappers such as DistributedDataParallel, on either side.

    Args:
        model: Any module that has parameters of these names.
        masks: Name -> bool tensor of the parameter's shape, True = kept.

    Raises:
        TypeError: If ``masks`` is not a mapping.
        ValueError: If a name, type or shape does not fit; nothing is changed then.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> apply_masks(model, {"weight": torch.tensor([[True, False]])})
        >>> model.weight[0, 1].item()
        0.0
    """
    reshard(model)
    params = named_parameters(model)
    zero_pruned(params, check_masks("masks", masks, params, NameTable.of_model(model)))


def zero_pruned(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set pruned weights to zero, with arguments that have been checked.

    Args:
        params: Name -> parameter.
        masks: Name -> bool tensor, True = kept, of some of them.
    """
    for name, mask in masks.items():
        zero_elements(params[name], mask)


def zero_elements(values: Tensor, mask: Tensor) -> None:
    """Set the elements to zero where a mask of the same shape is False; in a DTensor those of this process's part."""
    own = local(values)
    own.masked_fill_(~part_of(mask, values).to(own.device), 0)


def has_pruned(values: Tensor, mask: Tensor) -> bool:
    """Return whether elements are not zero where the mask is False, in this process's part of a DTensor."""
    own = local(values)
    return bool((own[~part_of(mask, values).to(own.device)] != 0).any())


def merge_masks(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the masks of several holders together: a weight is kept where all of them keep it.

    Args:
        parts: Name -> bool tensor, True = kept, of each.

    Returns:
        Name -> mask.
    """
    masks: dict[str, Tensor] = {}
    for part in parts:
        for name, mask in part.items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def mask_gradients(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the gradients of pruned weights to zero.

    Args:
        params: Name -> parameter.
        masks: Name -> bool tensor, True = kept, of some of them.
    """
    for name, mask in masks.items():
        if params[name].grad is not None:
            zero_elements(params[name].grad, mask)


def check_masks(
    name: str, masks: Mapping[str, Tensor], params: Mapping[str, Tensor], table: NameTable | None = None
) -> dict[str, Tensor]:
    """Check masks against parameters.

    Args:
        name: Of the argument, for errors.
        masks: Name -> bool tensor.
        params: The parameters that may have one, by canonical name.
        table: What a user may write for these names; None: little beside themselves.

    Returns:
        Canonical name -> mask, as given.

    Raises:
        TypeError: If it is not a mapping.
        ValueError: If a name, type or shape does not fit.
    """
    check_instance(name, masks, Mapping, "name -> bool tensor")
    checked = (table or NameTable(params)).translate(name, masks)
    for key, mask in checked.items():
        if key not in params:
            raise ValueError(f"{name}: expected names among {shorten(params)}, got {key!r}")
        shape = list(params[key].shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != shape:
            got = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}[{key!r}]: expected bool of shape {shape}, got {got}")
        if mask.is_meta:
            raise ValueError(f"{name}[{key!r}]: expected a tensor with data, got one on the meta device")
    return checked


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the sparsity of masks; 0 if there are none."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0


def count_kept(masks: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    """Return (name, weights, weights kept) of each mask."""
    return [(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]


def complete_masks(masks: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a mask for every parameter, on its device; those that are missing keep every weight."""
    return {
        name: masks[name].to(p.device) if name in masks else torch.ones(p.shape, dtype=torch.bool, device=p.device)
        for name, p in params.items()
    }


def flatten_masks(masks: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Tensor | None:
    """Return masks as one vector.

    Args:
        masks: Some of the parameters' masks; the others are dense.
        params: Name -> parameter, in the order of the vector.

    Returns:
        [d] bool on the parameters' device; None without masks.
    """
    if not masks:
        return None
    return torch.cat([mask.reshape(-1) for mask in complete_masks(masks, params).values()])
