"""Runs of a model on its example inputs, and what they tell: whether two models agree, which arguments are given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

_RUNS = 2  # state that a forward keeps outside of tensors shows from the second call on
_LEAST_SCALE = 1e-30


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments."""
    args, kwargs = _split(inputs)
    return model(*args, **kwargs)


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def clone_tensors(values: Any) -> Any:
    """Return a structure with copies of its tensors, for a model that changes its inputs in place."""
    values = dict(values) if isinstance(values, dict) else values
    return tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, values)


def run_example(model: nn.Module, inputs: Any) -> list[Any]:
    """Return the outputs of consecutive calls of a copy of a model in eval mode, without gradients.

    The random numbers are the same in every run, so that models which draw some can be compared.

    Args:
        model: The model; neither it nor its state is changed.
        inputs: Its example inputs, which are not changed either.

    Returns:
        The output of each call.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return [clone_tensors(call_model(model, clone_tensors(inputs))) for _ in range(_RUNS)]


def largest_difference(found: Any, expected: Any, least_scale: float = _LEAST_SCALE) -> float:
    """Return the largest difference of two outputs, each element relative to what is expected.

    An element that is smaller than the tensor's typical magnitude counts relative to that: the median of the distinct
    finite magnitudes above zero of what is expected. A constant that fills masked
    elements, such as -1e9, counts once there and cannot hide what the other elements differ by.

    Args:
        found: An output of a model: tensors, numbers and other values, in containers or attributes of objects.
        expected: The output to compare with.
        least_scale: Smaller magnitudes are replaced by it.

    Returns:
        The relative difference. It is infinite if structures, shapes, types, or values other than finite numbers
        differ; NaN equals NaN.
    """
    ones, others = _leaves(found, set()), _leaves(expected, set())
    if len(ones) != len(others):
        return float("inf")
    return max((_difference(a, b, least_scale) for a, b in zip(ones, others, strict=True)), default=0.0)


def _leaves(value: Any, seen: set[int]) -> list[Any]:
    """Return the tensors and other values of an output, also those that are attributes of objects."""
    leaves: list[Any] = []
    for leaf in tree_leaves(value):
        content = dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)
        if isinstance(leaf, (Tensor, type)) or not content:
            leaves.append(leaf)
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            leaves += [type(leaf), *_leaves(dict(content), seen)]
    return leaves


def _difference(one: Any, other: Any, least_scale: float) -> float:
    if isinstance(one, (float, complex, np.ndarray)) and type(one) is type(other):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return 0.0 if one is other or (type(one) is type(other) and bool(one == other)) else float("inf")
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (one.detach(), other.detach()))
    a, b = a.double(), b.double()
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(differ.any()):
        return 0.0
    if not bool((a[differ].isfinite() & b[differ].isfinite()).all()):
        return float("inf")
    magnitudes = b[b.isfinite() & (b != 0)].abs().unique()
    scale = max(least_scale, float(magnitudes.median()) if len(magnitudes) else 0.0)
    return float(((a - b).abs()[differ] / b[differ].abs().clamp_min(scale)).max())


def optional_arguments(model: nn.Module, inputs: Any) -> dict[str, bool]:
    """Return for each argument of a model whose default is None whether it is given, and is not None itself."""
    args, kwargs = _split(inputs)
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    return {
        name: bound.get(name) is not None
        for name, parameter in signature.parameters.items()
        if parameter.default is None
    }


@fx.has_side_effect
def check_given(name: str, value: Any, given: bool) -> None:
    """Refuse an optional argument if it was not among the example inputs, and its absence if it was.

    Args:
        name: Of the argument.
        value: Of the argument; None: absent.
        given: Whether the example inputs have it, so that the traced graph is of the branch with it.

    Raises:
        ValueError: If the call is another one.
    """
    if (value is not None) != given:
        expected, got = ("a value", "None") if given else ("None", type(value).__name__)
        raise ValueError(f"{name}: expected {expected}, as in the example_inputs of the conversion, got {got}")


class _Watched:
    """A layer that notes whether code outside of its forward reads what a layer on sparse kernels does not have."""

    def __getattribute__(self, name: str) -> Any:
        state = object.__getattribute__(self, "__dict__")
        if name in state["_watched_names"] and not state["_running"]:
            state["_read"] = True
        return super().__getattribute__(name)

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["_running"] = True
        try:
            return super().forward(input)
        finally:
            self.__dict__["_running"] = False


class _WatchedLinear(_Watched, nn.Linear):
    pass


class _WatchedConv2d(_Watched, nn.Conv2d):
    pass


_WATCHED = {nn.Linear: _WatchedLinear, nn.Conv2d: _WatchedConv2d}


def layers_read(model: nn.Module, inputs: Any) -> set[str]:
    """Return the layers whose weights or sizes other code reads, such as the fast path of nn.TransformerEncoderLayer.

    Args:
        model: The model, which is not changed.
        inputs: Its example inputs.

    Returns:
        Names of Linear layers and 2-d convolutions.
    """
    model = copy.deepcopy(model).eval()
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in _WATCHED}
    common = vars(nn.Module()).keys()
    for layer in layers.values():
        names = (vars(layer).keys() | layer._parameters.keys()) - common
        vars(layer).update(_watched_names=names, _running=False, _read=False)
        layer.__class__ = _WATCHED[type(layer)]
    with torch.no_grad():
        call_model(model, clone_tensors(inputs))
    return {name for name, layer in layers.items() if vars(layer)["_read"]}
