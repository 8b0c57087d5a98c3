"""Which parameters of a model are pruned: chosen by type of layer or by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from mfac.checks import check_module
from mfac.model.layers import Axes, layer_weights
from mfac.model.names import NameTable, named_parameters, shorten
from mfac.model.reparametrized import reparametrized

_EXCLUDED = "excluded"


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter to prune.

    Attributes:
        name: Canonical name, without the components that wrappers add.
        parameter: The parameter.
        layer: Class name of the layer that it belongs to.
        axes: Meaning of its axes; None if unknown, or if it is shared by layers that differ.
        norm_dim: Under weight norm and spectral norm, the axis along which each slice is divided by its norm; -1 if the
            whole is. None otherwise.
    """

    name: str
    parameter: nn.Parameter
    layer: str
    axes: Axes | None
    norm_dim: int | None = None

    def divides_by_zero(self, values: Tensor) -> bool:
        """Return whether weight norm or spectral norm of these values is NaN, because a slice is zero as a whole.

        Args:
            values: What the parameter is to hold, of its shape.

        Returns:
            True if it is.
        """
        if self.norm_dim is None:
            return False
        slices = values[None] if self.norm_dim == -1 else values.movedim(self.norm_dim, 0)
        return not bool(slices.flatten(1).any(1).all())


class PrunableParameters(dict[str, nn.Parameter]):
    """The parameters to prune by canonical name, in the order of the model; ``print`` shows them as a table.

    Args:
        targets: What is pruned.
        left_out: What is not.

    Attributes:
        targets: Name to :class:`Target`, for every parameter.
        left_out: Name to the reason, for weights that are not pruned: frozen, tied to an embedding, excluded, or of a
            layer whose weights are pruned only if named.
    """

    def __init__(self, targets: Iterable[Target], left_out: Mapping[str, str]) -> None:
        self.targets = {target.name: target for target in targets}
        self.left_out = dict(left_out)
        super().__init__((target.name, target.parameter) for target in self.targets.values())

    def __str__(self) -> str:
        rows = [("name", "layer", "shape", "weights")]
        for t in self.targets.values():
            rows.append((t.name, t.layer, str(list(t.parameter.shape)), f"{t.parameter.numel():,}"))
        rows.append(("total", "", "", f"{sum(p.numel() for p in self.values()):,}"))
        name, layer, shape, weights = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [f"{a:{name}}  {b:{layer}}  {c:{shape}}  {d:>{weights}}" for a, b, c, d in rows]
        if self.left_out:
            lines += ["left out:", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(lines)


def prunable_parameters(
    model: nn.Module, params: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> PrunableParameters:
    """Return the parameters to prune, in the order of ``model.named_parameters()``.

    By default these are the weights of Linear, ConvNd, ConvTransposeNd and MultiheadAttention layers, of Conv1D of
    transformers, and of layers registered with :func:`register_layer`, except frozen ones (``requires_grad`` is False)
    and ones shared with an embedding. What is left out is logged once, at level INFO of the logger ``mfac``.

    Names are those of the unwrapped model: without the components that ``torch.compile``, DataParallel and other
    wrappers add, though names with them are understood. A weight with weight norm or spectral norm is pruned through
    the parameter that it is computed from, whose zeros it shares, and may be named as if it were plain.

    Args:
        model: Any module.
        params: ``None`` for the default, or names of parameters, which are then pruned even if frozen or shared with
            an embedding. Besides plain names, ``"re:<regex>"`` takes every parameter whose name matches from its
            start, ``"__ALL__"`` every parameter and ``"__ALL_PRUNABLE__"`` the default.
        exclude: Parameters to leave out of these, written in the same way.

    Returns:
        Name to parameter; ``targets`` has the layers and axes, ``left_out`` the reasons. A parameter that has two names
        appears once, under the first.

    Raises:
        TypeError: If ``model`` is not a module, ``params`` or ``exclude`` cannot be iterated or an entry is not a
            string.
        ValueError: If the model has no parameters, nothing is left to prune, an entry of ``params`` or ``exclude``
            matches nothing or is ambiguous, or a parameter cannot be pruned: it is uninitialised, masked by
            ``torch.nn.utils.prune``, used through an unknown parametrization, or shares its memory with another one.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> list(prunable_parameters(model))
        ['0.weight', '2.weight']
        >>> list(prunable_parameters(model, "re:2[.]"))
        ['2.weight', '2.bias']
        >>> print(prunable_parameters(model, exclude="2.weight"))
        name      layer   shape   weights
        0.weight  Linear  [3, 4]       12
        total                          12
        left out:
          2.weight: excluded
    """
    check_module("model", model)
    parameters = named_parameters(model)
    if not parameters:
        raise ValueError("model: expected a module with parameters, got one without any")
    names = {id(parameter): name for name, parameter in parameters.items()}
    targets, known, left_out = _targets(model, names)
    default = [name for name in parameters if name in known and name not in left_out]
    table = NameTable.of_model(model)

    entries = names_of("params", params)
    if not default and (entries is None or "__ALL_PRUNABLE__" in entries):
        raise ValueError(_nothing(left_out))
    keywords = {"__ALL__": list(parameters), "__ALL_PRUNABLE__": default}
    chosen = set(default) if entries is None else _matching("params", entries, table, keywords)
    if not chosen:
        raise ValueError("params: expected at least one name, got none")
    excluded = _matching("exclude", names_of("exclude", exclude) or [], table, keywords)
    if chosen <= excluded:
        raise ValueError(f"exclude: expected to leave at least one parameter, got all of {shorten(sorted(chosen))}")

    by_default = entries is None or "__ALL_PRUNABLE__" in entries
    reasons = {name: why for name, why in left_out.items() if by_default and name not in chosen}
    reasons |= dict.fromkeys(chosen & excluded, _EXCLUDED)
    chosen -= excluded
    _check_prunable(model, {name: parameters[name] for name in parameters if name in chosen}, names)
    _check_own_memory(parameters, chosen)
    reasons = {name: reasons[name] for name in parameters if name in reasons}
    if reasons:
        _log_once(_summary(reasons))
    return PrunableParameters((targets[name] for name in parameters if name in chosen), reasons)


def names_of(name: str, value: str | Iterable[str] | None) -> list[str] | None:
    """Return what the user wrote to choose parameters as a list.

    Args:
        name: Of the argument, for the error.
        value: Names as for :func:`prunable_parameters`; an iterator is used up.

    Returns:
        The entries, or None.

    Raises:
        TypeError: If it cannot be iterated.
    """
    if value is None:
        return None
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected names of parameters or None, got {value!r}")
    return [value] if isinstance(value, str) else list(value)


def _targets(model: nn.Module, names: Mapping[int, str]) -> tuple[dict[str, Target], set[str], dict[str, str]]:
    """Targets of all parameters, names of the weights of known layers, and which of them are left out by default."""
    parameters: dict[str, nn.Parameter] = {}
    layers: dict[str, str] = {}
    axes: dict[str, Axes | None] = {}
    by_default: set[str] = set()
    for layer in model.modules():
        for weight in layer_weights(layer):
            name = names[id(weight.parameter)]
            layers.setdefault(name, type_before_parametrizations(layer).__name__)
            axes[name] = weight.axes if axes.get(name, weight.axes) == weight.axes else None
            by_default.update([name] if weight.by_default else [])
    embeddings, norm_dims = {}, {}
    for layer in model.modules():
        for computed in reparametrized(layer).values():
            original = dict(layer.named_parameters(remove_duplicate=False)).get(computed.pruned)
            if original is not None:
                norm_dims[names[id(original)]] = computed.norm_dim
        for parameter in layer.parameters(recurse=False):
            name = names[id(parameter)]
            parameters[name] = parameter
            layers.setdefault(name, type_before_parametrizations(layer).__name__)
            if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
                embeddings[name] = type(layer).__name__
    left_out = {}
    for name in axes:
        if not parameters[name].requires_grad:
            left_out[name] = "frozen (requires_grad is False)"
        elif name in embeddings:
            left_out[name] = f"tied to an {embeddings[name]}"
        elif name not in by_default:
            left_out[name] = f"weight of {layers[name]}, pruned only if named in params"
    targets = {
        name: Target(name, p, layers[name], axes.get(name), norm_dims.get(name)) for name, p in parameters.items()
    }
    return targets, set(axes), left_out


def _matching(what: str, entries: list[str], table: NameTable, keywords: Mapping[str, list[str]]) -> set[str]:
    chosen: set[str] = set()
    for entry in entries:
        found = table.find(entry, what) or keywords.get(entry)
        if not found:
            names = shorten(keywords["__ALL__"])
            raise ValueError(f"{what}: expected names among {names}, got {entry!r}, which matches none")
        chosen.update(found)
    return chosen


def _nothing(left_out: Mapping[str, str]) -> str:
    if left_out:
        return (
            f"model: expected at least one weight to prune by default, got only ones that are left out ("
            f"{_summary(left_out)}); name them in params to prune them"
        )
    return (
        "model: expected at least one Linear or ConvNd layer, or another of a known type, got none; name the "
        "parameters in params, or make the type known with mfac.register_layer"
    )


def _check_prunable(model: nn.Module, chosen: Mapping[str, nn.Parameter], names: Mapping[int, str]) -> None:
    for layer in model.modules():
        kind = type_before_parametrizations(layer).__name__
        for attribute, computed in reparametrized(layer).items():
            for path, parameter in layer.named_parameters():
                name = names[id(parameter)]
                if computed.refusal and path in computed.originals and name in chosen:
                    raise ValueError(
                        f"model: expected parameters that can be pruned, got {name!r}: {attribute} of the {kind} is "
                        f"{computed.refusal}"
                    )
    for name, parameter in chosen.items():
        if is_lazy(parameter):
            raise ValueError(
                f"model: expected initialised parameters, got {name!r} uninitialised; run the model on a batch first"
            )


def _check_own_memory(parameters: Mapping[str, nn.Parameter], chosen: set[str]) -> None:
    """Check that no other parameter is written with a chosen one: tied weights are a single parameter."""
    spans = []
    for name, p in parameters.items():
        dense = type(p.data) is Tensor and p.layout == torch.strided and p.device.type != "meta" and not is_lazy(p)
        if dense and p.data_ptr() and torch.ops.aten.is_non_overlapping_and_dense(p):
            spans.append((p.device.type, p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name))
    before = ("", 0, 0, "")  # of those that begin earlier the one that ends last
    for span in sorted(spans):
        pair = {before[3], span[3]}
        if before[0] == span[0] and span[1] < before[2] and chosen & pair:
            first, second = (name for name in parameters if name in pair)
            raise ValueError(
                f"model: expected parameters with memory of their own, got {first!r} and {second!r}, which share it "
                "without being one parameter, as after load_state_dict(..., assign=True); tie them again, by assigning "
                "the parameter of one layer to the other"
            )
        before = max(before, span, key=lambda x: (x[0] == span[0], x[2]))


def _summary(reasons: Mapping[str, str]) -> str:
    """Names by reason, on one line."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{shorten(found)}: {reason}" for reason, found in names.items())


@functools.cache
def _log_once(summary: str) -> None:
    logging.getLogger("mfac").info("not pruned: %s", summary)
