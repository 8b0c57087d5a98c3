"""The graph of a model: BatchNorm folded into the layer before it, and the activation that follows a layer.

The model is traced by torch.fx. One that cannot be traced, or whose traced form computes something else on the example
inputs, is left as it is: its layers can still be replaced one by one, without folding and fusing.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_leaves

_RELU = {torch.relu, torch.relu_, F.relu, F.relu_}
_RELU_METHODS = {"relu", "relu_"}
_FUSIONS = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}
TRACED_TOLERANCE = 1e-3  # of the largest output: folding BatchNorm moves float32 results by some 1e-6, bfloat16 by 1e-2
TRACED_TOLERANCE_BFLOAT16 = 5e-2


class _Tracer(fx.Tracer):
    """Does not look into layers, whoever wrote them: a subclass of Linear stays a module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.Conv2d)) or super().is_leaf_module(m, module_qualified_name)


@dataclass
class Traced:
    """A model ready for the replacement of layers.

    Args:
        model: A copy of the user's model, in eval mode; a torch.fx.GraphModule if it could be traced.
        reason: Why it could not be traced; empty if it could.
        folded: Names of the BatchNorm layers that are folded away.
        activations: The activation that follows a layer and nothing else, by the layer's name.
        calls: How often each module is called in the graph; empty if there is none.
    """

    model: nn.Module
    reason: str
    folded: list[str] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def replace(self, name: str, layer: nn.Module, fuse: bool) -> None:
        """Put another layer in the place of one.

        Args:
            name: Of the layer.
            layer: The new one.
            fuse: Whether it applies the activation that follows, which then leaves the graph.
        """
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)
        if fuse and name in self.activations:
            (node,) = (n for n in self.model.graph.nodes if n.op == "call_module" and n.target == name)
            (after,) = node.users
            after.replace_all_uses_with(node)
            self.model.graph.erase_node(after)

    def finish(self) -> nn.Module:
        """Return the model after all replacements."""
        if isinstance(self.model, fx.GraphModule):
            self.model.delete_all_unused_submodules()
            self.model.graph.lint()
            self.model.recompile()
        return self.model


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def largest_difference(one: Any, other: Any) -> float:
    """Return max |one - other| / max |other| over all tensors of two outputs of the same structure.

    Args:
        one: An output of a model.
        other: Another one.

    Returns:
        The relative difference, infinity if the structures differ.
    """
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=False))
    worst = 0.0 if len(tree_leaves(one)) == len(tree_leaves(other)) else float("inf")
    for a, b in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape:
                return float("inf")
            if a.numel() and not torch.equal(a, b):
                size = b.double().abs().max().clamp_min(1e-30)
                worst = max(worst, float((a.double() - b.double()).abs().max() / size))
    return worst


def trace(model: nn.Module, inputs: Any = None, plain: bool = False) -> Traced:
    """Copy a model, trace the copy and fold BatchNorm into the layers before.

    Args:
        model: The user's model, which is not changed.
        inputs: Example inputs, on which the traced copy must give the same results; None: not checked.
        plain: Copy it only.

    Returns:
        The copy, in eval mode and without gradients.
    """
    untraced = copy.deepcopy(model).eval().requires_grad_(False)
    if plain:
        return Traced(untraced, "not asked for")
    try:
        source = copy.deepcopy(untraced)
        traced = fx.GraphModule(source, _Tracer().trace(source), type(model).__name__)
        out = Traced(traced, "", calls=Counter(n.target for n in traced.graph.nodes if n.op == "call_module"))
        _fold_batchnorm(out)
        _find_activations(out)
        for node in traced.graph.nodes:
            if isinstance(node.type, str):  # of a module with postponed annotations; torch cannot pickle such a graph
                node.type = None
        out.model.graph.lint()
        out.model.recompile()
        if inputs is not None:
            with torch.no_grad():
                right = call_model(untraced, inputs)
                difference = largest_difference(call_model(out.model, inputs), right)
            half = any(p.dtype == torch.bfloat16 for p in untraced.parameters())
            if not difference <= (TRACED_TOLERANCE_BFLOAT16 if half else TRACED_TOLERANCE):
                return Traced(untraced, f"the traced model differs from the model by {difference:.1e}")
        return out
    except Exception as error:  # whatever a forward does with a proxy: branches on it, calls len(), ...
        return Traced(untraced, f"torch.fx cannot trace it: {type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _hooked(module: nn.Module) -> bool:
    """Whether user code runs when the module is called: hooks on it must not be lost."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fold_batchnorm(traced: Traced) -> None:
    """Fold each BatchNorm whose only input is a layer with no other use; both are called once."""
    modules = dict(traced.model.named_modules())
    for node in list(traced.model.graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        layer, norm = modules[before.target], modules[node.target]
        fusion = _FUSIONS.get((type(layer), type(norm)))
        once = len(before.users) == 1 and traced.calls[before.target] == traced.calls[node.target] == 1
        if fusion is None or not once or norm.running_mean is None or _hooked(layer) or _hooked(norm):
            continue
        traced.replace(before.target, fusion(layer, norm).requires_grad_(False), fuse=False)
        node.replace_all_uses_with(before)
        traced.model.graph.erase_node(node)
        traced.folded.append(node.target)


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return ``"relu"`` or ``"relu6"`` if a node is one of these."""
    module = modules.get(node.target) if node.op == "call_module" else None
    if module is not None and _hooked(module):
        return None
    bounds = (node.kwargs.get("min_val", -1.0), node.kwargs.get("max_val", 1.0))
    if node.op == "call_function" and node.target in (F.hardtanh, F.hardtanh_):
        bounds = (*node.args[1:3], *bounds[len(node.args) - 1 :])[:2]
        return "relu6" if tuple(map(float, bounds)) == (0.0, 6.0) else None
    if type(module) is nn.Hardtanh:
        return "relu6" if (module.min_val, module.max_val) == (0.0, 6.0) else None
    if type(module) is nn.ReLU6 or (node.op == "call_function" and node.target is F.relu6):
        return "relu6"
    if (
        type(module) is nn.ReLU
        or (node.op == "call_function" and node.target in _RELU)
        or (node.op == "call_method" and node.target in _RELU_METHODS)
    ):
        return "relu"
    return None


def _find_activations(traced: Traced) -> None:
    """Note the activation of each layer whose result goes nowhere else."""
    modules = dict(traced.model.named_modules())
    for node in traced.model.graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) in (nn.Conv2d, nn.Linear) and len(node.users) == 1:
            (after,) = node.users
            activation = _activation_of(after, modules)
            if activation and after.args and after.args[0] is node and traced.calls[node.target] == 1:
                traced.activations[node.target] = activation
