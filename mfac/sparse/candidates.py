"""The layers that can be replaced, the forms that they can take, and the time of each form on this machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac.sparse.formats import MAX_INPUTS, SLICE_ROWS, count_blocks, slice_matrix
from mfac.sparse.modules import DepthwiseConv2d, SparseConv2d, SparseLinear
from mfac.sparse.reference import activate

MIN_SPARSITY = 0.3  # below it no kernel gains over a dense product; dense layers that are small are tried as blocks
SMALL_WEIGHTS = 1 << 16  # weights of a dense convolution that may be run as blocks, to stay in its neighbours' layout
_ROUNDS, _SECONDS = 20, 0.1  # of timing, per layer: rounds that are enough, and time at most after the third
_QUIET_SECONDS = 0.03  # time at least: longer than other work holds a core before the next turn of the scheduler


@dataclass
class Candidate:
    """A layer, and what was found out about it.

    Args:
        name: Of the layer.
        layer: The dense one.
        activation: What follows it and is fused.
        obstacle: Why it cannot be replaced; empty if it can.
        formats: The forms that it can take: ``"rows"``, ``"blocks"``, ``"depthwise"``.
        dense_ms: Time of torch's layer in the faster of the layouts, milliseconds.
        nchw_ms: Its time for contiguous inputs, as its neighbours here leave them.
        times: Time of each form.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    activation: str = "none"
    obstacle: str = ""
    formats: list[str] = field(default_factory=list)
    dense_ms: float | None = None
    nchw_ms: float | None = None
    times: dict[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of zeros in the weights."""
        weight = self.layer.weight
        return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)

    @property
    def kind(self) -> str:
        """The layer in words."""
        if isinstance(self.layer, nn.Linear):
            return f"Linear {self.layer.in_features} -> {self.layer.out_features}"
        conv = self.layer
        size = "x".join(map(str, conv.kernel_size)) + (f"/{conv.stride[0]}" if conv.stride[0] != 1 else "")
        if conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1:
            return f"Conv2d {size} depthwise, {conv.in_channels}"
        return f"Conv2d {size}, {conv.in_channels} -> {conv.out_channels}"

    @property
    def best(self) -> tuple[str, float]:
        """The fastest form and its time."""
        return min(self.times.items(), key=lambda item: item[1])


def examine(name: str, layer: nn.Module, activation: str, calls: int | None) -> Candidate:
    """Return whether a layer can be replaced, and by what.

    Args:
        name: Of the layer.
        layer: A Linear or Conv2d, or a subclass.
        activation: What follows it.
        calls: How often it is called in the graph; None: unknown.

    Returns:
        The candidate, its forms not timed.
    """
    out = Candidate(name, layer, activation)
    out.obstacle = find_obstacle(layer, calls)
    if out.obstacle:
        return out
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        out.formats = ["depthwise"]
        return out
    sparsity = out.sparsity
    small = isinstance(layer, nn.Conv2d) and layer.weight.numel() <= SMALL_WEIGHTS
    if sparsity < MIN_SPARSITY and not small:
        out.obstacle = f"{sparsity:.0%} zeros, fewer than {MIN_SPARSITY:.0%}"
        return out
    weight = layer.weight.detach().flatten(1)
    entries = int(torch.count_nonzero(weight))
    if sparsity >= MIN_SPARSITY:
        out.formats.append("rows")
    full = SLICE_ROWS * count_blocks(weight) <= 2 * entries  # at most half of what blocks hold is zero
    if sparsity < MIN_SPARSITY or full:
        out.formats.append("blocks")
    return out


def find_obstacle(layer: nn.Module, calls: int | None) -> str:
    """Return why a layer cannot be replaced; empty if it can.

    Args:
        layer: A Linear or Conv2d, or a subclass.
        calls: How often it is called in the graph; None: unknown.

    Returns:
        The reason in words.
    """
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(layer).__name__}, a class of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks (torch.nn.utils.prune.remove takes off those of torch's pruning)"
    if "forward" in vars(layer):
        return "its forward is replaced on the instance"
    if calls is not None and calls != 1:
        return f"it is called {calls} times"
    if layer.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{layer.weight.dtype}, neither float32 nor bfloat16"
    if layer.weight.numel() == 0:
        return "it has no weights"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.dilation != (1, 1):
            return "its padding or dilation has no kernel"
        if layer.groups > 1:
            conv = (layer.kernel_size, layer.padding)
            depthwise = layer.groups == layer.in_channels == layer.out_channels and conv == ((3, 3), (1, 1))
            return "" if depthwise and layer.stride in ((1, 1), (2, 2)) else "its groups have no kernel"
    if layer.weight[0].numel() > MAX_INPUTS:
        return f"it has more than {MAX_INPUTS} inputs per output"
    return ""


def build(layer: nn.Linear | nn.Conv2d, form: str, activation: str, backend: str = "auto", empty: bool = False):
    """Return the layer that replaces a dense one.

    Args:
        layer: The dense one.
        form: ``"rows"``, ``"blocks"`` or ``"depthwise"``.
        activation: What it applies at the end.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.
        empty: Leave the sparse weights out; a state dict will bring them.

    Returns:
        The module.
    """
    if form == "depthwise":
        return DepthwiseConv2d(layer.weight, layer.bias, layer.stride[0], activation, backend)
    matrix = None if empty else slice_matrix(layer.weight.flatten(1), form)
    if isinstance(layer, nn.Linear):
        return SparseLinear(layer.out_features, layer.in_features, matrix, layer.bias, activation, backend)
    return SparseConv2d(
        layer.out_channels, layer.in_channels, layer.kernel_size, layer.stride, layer.padding, matrix, layer.bias,
        activation, backend,
    )  # fmt: skip


def fastest(functions: dict[str, Callable[[], object]], seconds: float = _SECONDS) -> dict[str, float]:
    """Time functions side by side, in turns, and return the shortest time of each in milliseconds.

    The shortest is what the work takes without what else the machine does; turns spread the disturbances over all.

    Args:
        functions: What to time, by name.
        seconds: When to stop, after at least three rounds; earlier after 20 rounds that took long enough to see more
            than one turn of the scheduler.

    Returns:
        Milliseconds by name.
    """
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    start = time.perf_counter()
    for turn in itertools.count():
        passed = time.perf_counter() - start
        if turn >= 3 and (passed > seconds or (turn >= _ROUNDS and passed > _QUIET_SECONDS)):
            break
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def _convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a layer computes, with its weights in another layout."""
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def measure(candidate: Candidate, x: Tensor, backend: str = "auto") -> None:
    """Time a layer as it is and in every form that it can take, on the input that it gets in the model.

    Args:
        candidate: The layer; its times are filled in.
        x: Its input.
        backend: Of the forms.
    """
    layer, activation = candidate.layer, candidate.activation
    variants: dict[str, Callable[[], object]] = {}
    if isinstance(layer, nn.Linear):
        variants["dense"] = lambda: activate(layer(x), activation)
    else:
        for name, memory in (("dense", torch.contiguous_format), ("channels_last", torch.channels_last)):
            if name == "channels_last" and x.dim() != 4:
                continue
            inputs, weight = x.contiguous(memory_format=memory), layer.weight.contiguous(memory_format=memory)
            variants[name] = lambda i=inputs, w=weight: activate(_convolve(layer, i, w), activation)
    flat = x.contiguous()
    for form in candidate.formats:
        fast = build(layer, form, activation, backend)
        variants[form] = lambda fast=fast: fast(flat)
    with torch.no_grad():
        times = fastest(variants)
    candidate.nchw_ms = times.pop("dense")
    candidate.dense_ms = min(candidate.nchw_ms, times.pop("channels_last", float("inf")))
    candidate.times = times
