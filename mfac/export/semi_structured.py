"""2:4 weights of linear layers as torch's semi-structured tensors, which the sparse tensor cores multiply."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from mfac.checks import check_module
from mfac.model.names import NameTable, named_parameters, shorten
from mfac.pruning.patterns import parse_pattern

_PATTERN = "2:4"
_LEAST_CAPABILITY = (8, 0)  # Ampere


@dataclass(frozen=True)
class SemiStructured:
    """What :func:`to_semi_structured` has done.

    Attributes:
        swapped: Names of the weights that are semi-structured now.
        skipped: Name of each other weight of a linear layer -> why it is as it was.
    """

    swapped: list[str]
    skipped: dict[str, str] = field(repr=False)


def to_semi_structured(model: nn.Module, params: str | Iterable[str] | None = None) -> SemiStructured:
    """Swap the 2:4 weights of the linear layers of a model on a GPU for ``torch.sparse.SparseSemiStructuredTensor``.

    It is for inference, in half precision or int8, from compute capability 8.0 on. torch's own function takes it for
    granted that a weight is 2:4; here a weight is swapped only if it keeps 2:4 and comes back with the same values.
    torch supports no convolutions. On an H200 (torch 2.11) it pays from about 16,000 rows of
    inputs on.

    Args:
        model: Any module; its linear layers are changed in place.
        params: Names of the weights to swap, or ``"re:..."``, each of which must be fit for it; None: all that are fit.

    Returns:
        What was swapped, and why the others were not.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If a name is no weight of a linear layer, or one of the weights named is not fit; nothing is changed
            then.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> to_semi_structured(model).skipped
        {'0.weight': 'expected on CUDA, got on cpu'}
    """
    check_module("model", model)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    owners: dict[str, list[nn.Module]] = {}
    for layer in model.modules():
        for key, parameter in layer.named_parameters(recurse=False):
            if key == "weight" and id(parameter) in names:
                owners.setdefault(names[id(parameter)], []).append(layer)
    linear = {name: layers for name, layers in owners.items() if any(type(layer) is nn.Linear for layer in layers)}
    chosen = list(linear) if params is None else _find(params, list(linear))
    why = {name: _unfit(linear[name]) for name in chosen}
    for name, reason in why.items() if params is not None else ():
        if reason:
            raise ValueError(f"params: expected a weight that can be semi-structured, got {name}: {reason}")
    swapped = {}
    for name in (name for name in chosen if not why[name]):
        weight = linear[name][0].get_parameter("weight").detach().contiguous()
        try:
            sparse = to_sparse_semi_structured(weight)
            exact = bool(torch.equal(sparse.to_dense(), weight))
            reason = "" if exact else "expected the same weight back from torch, got another"
        except RuntimeError as error:  # shape, dtype or capability
            reason = f"expected a weight that torch supports, got {' '.join(str(error).split())}"
        if reason and params is not None:
            raise ValueError(f"params: expected a weight that can be semi-structured, got {name}: {reason}")
        why[name] = reason
        if not reason:
            swapped[name] = sparse
    for name, sparse in swapped.items():
        linear[name][0].weight = nn.Parameter(sparse, requires_grad=False)
    return SemiStructured(list(swapped), {name: reason for name, reason in why.items() if reason})


def _find(params: str | Iterable[str], names: list[str]) -> list[str]:
    table = NameTable(names)
    found: list[str] = []
    for entry in [params] if isinstance(params, str) else params:
        several = table.find(entry)
        if not several:
            raise ValueError(f"params: expected weights of linear layers among {shorten(names)}, got {entry!r:.120}")
        found += [name for name in several if name not in found]
    return found


def _unfit(layers: list[nn.Module]) -> str:
    """Why the weight of these layers cannot be swapped; empty if it can, as far as is seen without trying."""
    weight = layers[0].weight
    assert isinstance(weight, Tensor)
    if len(layers) > 1:
        return f"expected a weight of one layer, got one that {len(layers)} layers share"
    if not weight.is_cuda:
        return f"expected on CUDA, got on {weight.device}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _LEAST_CAPABILITY:
        return f"expected compute capability {_LEAST_CAPABILITY[0]}.0 or more, got {capability[0]}.{capability[1]}"
    return why_not_2_4(weight)


def why_not_2_4(weight: Tensor) -> str:
    """Return why a matrix is not 2:4 along its second axis.

    Args:
        weight: [outputs, inputs].

    Returns:
        The first group that breaks it, in words; empty if none does.
    """
    pattern = parse_pattern(_PATTERN)
    if weight.shape[1] % pattern.cols:
        return f"expected a multiple of {pattern.cols} inputs, got {weight.shape[1]}"
    counts = (weight.detach() != 0).view(len(weight), -1, pattern.cols).sum(-1)
    broken = counts > pattern.cols - pattern.pruned
    if not bool(broken.any()):
        return ""
    row, group = divmod(int(broken.flatten().int().argmax()), counts.shape[1])
    place = f"[{row}, {group * pattern.cols}]"
    return f"expected {_PATTERN}, got {int(counts[row, group])} of 4 kept in the group that begins at {place}"
