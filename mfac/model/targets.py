"""Which parameters of a model are pruned, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_parameters(model: nn.Module, params: str | Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters to prune, in the order of ``model.named_parameters()``.

    Args:
        model: Any module.
        params: ``None`` for the weights of all Linear and ConvNd layers, or names of parameters. Besides plain names,
            ``"re:<regex>"`` takes every parameter whose name matches from its start, ``"__ALL__"`` every parameter and
            ``"__ALL_PRUNABLE__"`` the same as ``None``.

    Returns:
        Name to parameter. A parameter that has two names appears once, under the first.

    Raises:
        TypeError: If ``model`` is not a module, ``params`` cannot be iterated or an entry is not a string.
        ValueError: If the model has no parameters, nothing prunable, or an entry of ``params`` matches nothing.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> list(prunable_parameters(model))
        ['0.weight', '2.weight']
        >>> list(prunable_parameters(model, "re:2[.]"))
        ['2.weight', '2.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    every = dict(model.named_parameters())
    if not every:
        raise ValueError("model: expected a module with parameters, got one without any")
    weights = {id(layer.weight) for layer in model.modules() if isinstance(layer, _LAYERS)}
    prunable = {name: p for name, p in every.items() if id(p) in weights}
    if params is None:
        if not prunable:
            raise ValueError(
                "model: expected at least one Linear or ConvNd layer, got none; name the parameters in params"
            )
        return prunable

    groups = {"__ALL__": list(every), "__ALL_PRUNABLE__": list(prunable)}
    chosen: set[str] = set()
    for entry in names_of(params):
        found = matching_names(entry, every) or groups.get(entry)
        if not found:
            raise ValueError(f"params: {entry!r} matches no parameter of the model, which has {_shorten(every)}")
        chosen.update(found)
    if not chosen:
        raise ValueError("params: expected at least one name, got none")
    return {name: p for name, p in every.items() if name in chosen}


def names_of(params: str | Iterable[str] | None) -> list[str] | None:
    """Return what the user wrote to choose parameters as a list.

    Args:
        params: See :func:`prunable_parameters`; an iterator is used up.

    Returns:
        The entries, or None.

    Raises:
        TypeError: If it cannot be iterated.
    """
    if params is None:
        return None
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected names of parameters or None, got {params!r}")
    return [params] if isinstance(params, str) else list(params)


def matching_names(entry: str, names: Iterable[str]) -> list[str]:
    """Return the names that a name or ``"re:<regex>"`` matches.

    Args:
        entry: A name, or ``re:`` and a regular expression matched from the start.
        names: What to choose from.

    Returns:
        The matches, in order.

    Raises:
        TypeError: If ``entry`` is not a string.
        ValueError: If the regular expression is not one.
    """
    if not isinstance(entry, str):
        raise TypeError(f"params: expected names of parameters, got {entry!r}")
    if not entry.startswith("re:"):
        return [name for name in names if name == entry]
    try:
        pattern = re.compile(entry[3:])
    except re.error as error:
        raise ValueError(f"params: {entry!r} is not a regular expression: {error}") from None
    return [name for name in names if pattern.match(name)]


def _shorten(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    rest = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
