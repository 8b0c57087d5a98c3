"""Names of parameters: one canonical name for each, and what a user may write for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from mfac.model.regex import compile_regex
from mfac.model.reparametrized import reparametrized

T = TypeVar("T")

# Components that torch.compile, FSDP and activation checkpointing add to the path of a parameter.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Classes that hold the model in an attribute `module`, an ordinary name elsewhere.
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "AveragedModel"}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by canonical name.

    The canonical name is the one of the unwrapped model: without the components that ``torch.compile``, FSDP and
    activation checkpointing add (``_orig_mod``, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``), and without
    the ``module`` of DistributedDataParallel, DataParallel and AveragedModel.

    Args:
        model: Any module.

    Returns:
        Name to parameter, each parameter once, in the order of ``model.named_parameters()``.

    Example:
        >>> import torch
        >>> list(named_parameters(torch.nn.DataParallel(torch.nn.Linear(4, 3))))
        ['weight', 'bias']
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters: dict[str, nn.Parameter] = {}
    for raw, parameter in model.named_parameters():
        name = _canonical(raw, modules)
        parameters[raw if name in parameters else name] = parameter
    return parameters


class NameTable:
    """Finds the canonical names that a name or regular expression written by a user stands for.

    A name is looked up among the canonical names, the names in the wrapped model, and the aliases: further names of a
    shared parameter, and ``0.weight`` for the parameter that a weight with weight norm or spectral norm is computed
    from. If none is equal, one is taken that is equal without all components that wrappers add, ``module`` anywhere
    included, provided that it is the only one.

    Args:
        names: Canonical names.
        others: Other names -> canonical names, in the order in which they are tried.

    Example:
        >>> import torch
        >>> table = NameTable.of_model(torch.nn.Sequential(torch.nn.Linear(4, 3)))
        >>> table.find("0.weight"), table.find("module.0.weight"), table.find("re:0[.]b")
        (['0.weight'], ['0.weight'], ['0.bias'])
    """

    def __init__(self, names: Iterable[str], *others: Mapping[str, str]) -> None:
        self._stages = [{name: name for name in names}, *others]

    @classmethod
    def of_model(cls, model: nn.Module) -> NameTable:
        """Return the table of all parameters of a model.

        Args:
            model: Any module.

        Returns:
            The table.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = named_parameters(model)
        names = {id(parameter): name for name, parameter in parameters.items()}
        raw_names = {raw: names[id(parameter)] for raw, parameter in model.named_parameters()}
        aliases = {}
        every = dict(model.named_parameters(remove_duplicate=False))
        for raw, parameter in every.items():
            if raw not in raw_names:
                aliases[raw] = aliases[_canonical(raw, modules)] = names[id(parameter)]
        for path, module in modules.items():
            prefix = f"{path}." if path else ""
            for attribute, computed in reparametrized(module).items():
                original = every.get(prefix + computed.pruned)
                if original is not None:
                    raw = prefix + attribute
                    aliases[raw] = aliases[_canonical(raw, modules)] = names[id(original)]
        return cls(parameters, raw_names, aliases)

    def find(self, entry: str, what: str = "params") -> list[str]:
        """Return the canonical names that a name or ``"re:<regex>"`` stands for.

        Args:
            entry: A name, or ``re:`` and a regular expression. It is matched from the start of the canonical names; if
                it matches none, of the names in the wrapped model, of the aliases, and of the canonical names after
                ``module.``.
            what: Argument that the entry comes from, for the errors.

        Returns:
            The names in their order; empty if there is none.

        Raises:
            TypeError: If ``entry`` is not a string.
            ValueError: If the regular expression is not one, or would take too long, or the name is one of a parameter
                in the wrapped model and of another one in the unwrapped model.
        """
        if not isinstance(entry, str):
            raise TypeError(f"{what}: expected names of parameters, got {entry!r}")
        if not entry.startswith("re:"):
            name = self._resolve(entry, what)
            return [] if name is None else [name]
        names = self._stages[0]
        stages = [*self._stages, {f"module.{name}": name for name in names}]
        pattern = compile_regex(
            what, entry[3:], max((len(written) for stage in stages for written in stage), default=0)
        )
        for stage in stages:
            found = {name for written, name in stage.items() if pattern.match(written)}
            if found:
                return [name for name in names if name in found]
        return []

    def translate(self, what: str, values: Mapping[str, T]) -> dict[str, T]:
        """Return a mapping whose keys are what a user may write with canonical names as keys.

        Args:
            what: Name of the argument, for the errors.
            values: For example masks that were saved from a model in DistributedDataParallel.

        Returns:
            Canonical name to value.

        Raises:
            TypeError: If a key is not a string.
            ValueError: If a key is no name of a parameter, or one of two as for :meth:`find`, or two are names of the
                same one.

        Example:
            >>> NameTable(["0.weight", "1.weight"]).translate("masks", {"module.0.weight": 1})
            {'0.weight': 1}
        """
        translated: dict[str, Any] = {}
        keys: dict[str, str] = {}
        for key, value in values.items():
            if not isinstance(key, str):
                raise TypeError(f"{what}: expected names of parameters as keys, got {key!r}")
            name = self._resolve(key, what)
            if name is None:
                raise ValueError(f"{what}: expected names among {shorten(self._stages[0])}, got {key!r}")
            if name in keys:
                raise ValueError(f"{what}: expected one entry for {name!r}, got both {keys[name]!r} and {key!r}")
            translated[name], keys[name] = value, key
        return translated

    def _resolve(self, written: str, what: str) -> str | None:
        exact = {stage[written]: None for stage in self._stages[:2] if written in stage}
        if len(exact) > 1:
            raise ValueError(
                f"{what}: expected names of one parameter each, got {written!r}, which in the wrapped model is that of "
                f"{list(exact)[1]!r} as well; take the model out of its wrapper"
            )
        for stage in self._stages:
            if written in stage:
                return stage[written]
        found = self._unwrapped.get(without_wrappers(written), ())
        return next(iter(found)) if len(found) == 1 else None

    @cached_property
    def _unwrapped(self) -> dict[str, set[str]]:
        """All names without components of wrappers -> the canonical names that have them."""
        table: dict[str, set[str]] = {}
        for stage in self._stages:
            for written, name in stage.items():
                table.setdefault(without_wrappers(written), set()).add(name)
        return table


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """Return names as text, with a count in place of those beyond the limit.

    Args:
        names: Any strings.
        limit: Names that are written out.

    Returns:
        Names separated by commas.
    """
    names = list(names)
    rest = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _canonical(raw: str, modules: Mapping[str, nn.Module]) -> str:
    """The name without the components of wrappers; modules by their paths say which `module` is one."""
    kept, parts = [], raw.split(".")
    for i, part in enumerate(parts):
        parent = modules.get(".".join(parts[:i]))
        held = part == "module" and any(cls.__name__ in _WRAPPERS for cls in type(parent).__mro__)
        if not held and part not in _WRAPPED:
            kept.append(part)
    return ".".join(kept)


def without_wrappers(written: str) -> str:
    """Return a name without all components that wrappers add, ``module`` anywhere included.

    Args:
        written: A name in a model, wrapped or not.

    Returns:
        The name, which may stand for several parameters.
    """
    return ".".join(part for part in written.split(".") if part not in _WRAPPED and part != "module")
