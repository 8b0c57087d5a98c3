"""Types of layers whose weights can be pruned, and which axes of a weight are outputs and inputs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from mfac.checks import check_int
from mfac.model.reparametrized import reparametrized


@dataclass(frozen=True)
class Axes:
    """Meaning of the axes of a weight; axes that are neither outputs nor inputs are positions of a kernel.

    Attributes:
        outputs: Axis of the output channels.
        inputs: Axis of the input channels.
        groups: Groups of channels that do not mix, as in grouped convolutions. They split axis 0 of the weight into
            equal parts: the outputs of a convolution, the inputs of a transposed one.
    """

    outputs: int
    inputs: int
    groups: int = 1


@dataclass(frozen=True)
class _LayerType:
    weights: tuple[str, ...]  # attributes; a last * stands for the rest
    outputs: int = 0
    inputs: int = 1
    grouped: bool = False  # the layer's `groups` split axis 0
    by_default: bool = True  # pruned without being named


_RECURRENT = _LayerType(("weight_ih*", "weight_hh*", "weight_hr*"), by_default=False)
_TRANSFORMERS_CONV1D = _LayerType(("weight",), outputs=1, inputs=0)  # weight [in, out]
_TYPES: dict[type[nn.Module], _LayerType] = {
    nn.Linear: _LayerType(("weight",)),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _LayerType(("weight",), grouped=True)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),  # weight [in, out / groups, *kernel]
        _LayerType(("weight",), outputs=1, inputs=0, grouped=True),
    ),
    nn.MultiheadAttention: _LayerType(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
}


def register_layer(cls: type[nn.Module], weight: str = "weight", *, outputs: int = 0, inputs: int = 1) -> None:
    """Make the weight of a layer type of your own prunable by default.

    It holds for subclasses too; of several registered base classes the most derived one counts. A class that is
    registered again, or one of torch, takes the new axes. Instances without the weight are skipped.

    Args:
        cls: Class of the layer.
        weight: Attribute that holds the parameter.
        outputs: Axis of the output channels.
        inputs: Axis of the input channels, along which ``N:M`` and blocks group weights. The other axes are positions
            of a kernel.

    Raises:
        TypeError: If ``cls`` is not a class of modules, ``weight`` is not a string or an axis not an integer.
        ValueError: If an axis is negative or both are the same.

    Example:
        >>> import torch
        >>> class Scores(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = torch.nn.Parameter(torch.randn(8, 3))  # [in, out]
        >>> register_layer(Scores, "table", outputs=1, inputs=0)
        >>> [(weight.attribute, weight.axes) for weight in layer_weights(Scores())]
        [('table', Axes(outputs=1, inputs=0, groups=1))]
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    if not isinstance(weight, str):
        raise TypeError(f"weight: expected the name of an attribute, got {weight!r}")
    outputs, inputs = check_int("outputs", outputs, 0), check_int("inputs", inputs, 0)
    if outputs == inputs:
        raise ValueError(f"inputs: expected another axis than that of the outputs, got {inputs} for both")
    _TYPES[cls] = _LayerType((weight,), outputs, inputs)


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """A weight of one layer.

    Attributes:
        attribute: Of the layer, such as ``"weight"``.
        parameter: What is pruned: the weight, or what it is computed from under weight norm or spectral norm.
        axes: Meaning of its axes.
        by_default: Whether it is pruned without being named.
    """

    attribute: str
    parameter: nn.Parameter
    axes: Axes
    by_default: bool


def layer_weights(layer: nn.Module) -> Iterator[LayerWeight]:
    """Yield the weights of a layer that can be pruned, by its type; none for an unknown type.

    Args:
        layer: Any module; its children are not searched.

    Yields:
        Weights in the order in which the layer registered them.
    """
    known = _type_of(layer)
    if known is None:
        return
    axes = Axes(known.outputs, known.inputs, layer.groups if known.grouped else 1)
    computed = reparametrized(layer)
    hidden = {original for site in computed.values() for original in site.originals}
    paths = {name: name for name in layer._parameters if name not in hidden}
    paths |= {name: site.pruned for name, site in computed.items()}
    parameters = dict(layer.named_parameters(remove_duplicate=False))
    for name, path in paths.items():
        if path in parameters and any(fnmatchcase(name, weight) for weight in known.weights):
            yield LayerWeight(name, parameters[path], axes, known.by_default)


def _type_of(layer: nn.Module) -> _LayerType | None:
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)  # only if it is in use
    for cls in type(layer).__mro__:
        if cls in _TYPES:
            return _TYPES[cls]
        if cls is conv1d:
            return _TRANSFORMERS_CONV1D
    return None
