"""The graph of a model: BatchNorm folded into the layer before it, and the activation that follows a layer.

The model is traced by torch.fx. One that cannot be traced, or whose traced form computes something else on the example
inputs, is left as it is: its layers can still be replaced one by one, without folding and fusing.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_leaves

from mfac.sparse.example import check_given, largest_difference, optional_arguments, run_example

_RELU = {torch.relu, torch.relu_, F.relu, F.relu_}
_RELU_METHODS = {"relu", "relu_"}
_OWN_STATE = vars(nn.Module()).keys() - {"training"}
_FUSIONS = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}
_TOLERANCE = 1e-3  # relative: folding BatchNorm moves float32 results by some 1e-6
_TOLERANCE_BFLOAT16 = 0.3  # in deep networks for dense prediction the worst element moves by as much


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


def tolerance(model: nn.Module) -> float:
    """Return by how much the outputs of a converted model may differ (:func:`largest_difference`)."""
    return _TOLERANCE_BFLOAT16 if any(p.dtype == torch.bfloat16 for p in model.parameters()) else _TOLERANCE


def trace(
    model: nn.Module,
    inputs: Any = None,
    right: list[Any] | None = None,
    given: dict[str, bool] | None = None,
    plain: bool = False,
) -> Traced:
    """Copy a model, trace the copy and fold BatchNorm into the layers before.

    Args:
        model: The user's model, which is not changed.
        inputs: Example inputs, on which the traced copy must give the same results; None: not checked.
        right: With inputs: what :func:`~mfac.sparse.example.run_example` returns for the model and them.
        given: Without inputs: which of the optional arguments were given, by name.
        plain: Copy it only.

    Returns:
        The copy, in eval mode and without gradients.
    """
    untraced = copy.deepcopy(model).eval().requires_grad_(False)
    if plain:
        return Traced(untraced, "not asked for")
    try:
        given = optional_arguments(model, inputs) if inputs is not None else given or {}
        out = Traced(_trace(untraced, given), "")
        out.calls = Counter(n.target for n in out.model.graph.nodes if n.op == "call_module")
        _fold_batchnorm(out)
        _find_activations(out)
        out.model.graph.lint()
        out.model.recompile()
        if inputs is not None:
            difference = largest_difference(run_example(out.model, inputs), right)
            if not difference <= tolerance(untraced):
                return Traced(untraced, f"the traced model differs from the model by {difference:.1e}")
        return out
    except Exception as error:  # whatever a forward does with a proxy: branches on it, calls len(), ...
        return Traced(untraced, f"torch.fx cannot trace it: {first_line(error)}")


def first_line(error: Exception) -> str:
    """Return the class of an error and the beginning of its text."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def _trace(model: nn.Module, given: dict[str, bool]) -> fx.GraphModule:
    """Return the graph of a copy of a model, in which optional arguments are given or None as in the example."""
    tracer, source = _Tracer(), copy.deepcopy(model)
    for name, module in source.named_modules():
        if _hooked(module) and (module is source or not tracer.is_leaf_module(module, name)):
            raise ValueError(f"hooks or a replaced forward on {name or 'the model'}, which a graph would lose")
    before = _state(source)
    graph = tracer.trace(source, {name: None for name, is_given in given.items() if not is_given})
    after = _state(source)
    for name in before.keys() | after.keys():
        if not _same(before.get(name), after.get(name)):
            raise ValueError(f"its forward changes {name}")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # torch.fx has them last
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind not in variable]
    checks: list[tuple[str, fx.Node, bool]] = []
    for node, name in zip(placeholders, names, strict=False):
        if name not in given:
            continue
        argument = node
        if not given[name]:  # torch.fx numbers its name, and has a check of its own for it
            with graph.inserting_before(node):
                argument = graph.placeholder(name, default_value=None)
            for unneeded in [*node.users, node]:
                graph.erase_node(unneeded)
        checks.append((name, argument, given[name]))
    if checks:
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            for check in checks:
                graph.call_function(check_given, check)
    for node in graph.nodes:
        if isinstance(node.type, str):  # of a module with postponed annotations; torch cannot pickle such a graph
            node.type = None
    return fx.GraphModule(source, graph, type(model).__name__)


def _state(model: nn.Module) -> dict[str, list[Any]]:
    """Return what the attributes of all modules hold, each tensor with the number of its changes in place."""
    return {
        f"{name}.{key}".removeprefix("."): [(x, x._version if isinstance(x, Tensor) else 0) for x in tree_leaves(value)]
        for name, module in model.named_modules()
        for key, value in [*vars(module).items(), *module._buffers.items()]
        if key not in _OWN_STATE and not key.startswith(("_tensor_constant", "_param_constant"))  # set by torch.fx
    }


def _same(one: list[Any] | None, other: list[Any] | None) -> bool:
    """Whether an attribute holds the same objects, or plain values, as before."""
    if one is None or other is None or len(one) != len(other):
        return False
    for (a, changes), (b, changes_after) in zip(one, other, strict=True):
        equal = isinstance(a, (int, float, str)) and type(a) is type(b) and a == b
        if changes != changes_after or not (a is b or equal):
            return False
    return True


def _hooked(module: nn.Module) -> bool:
    """Whether user code runs when the module is called: hooks, or a forward set on the instance, must not be lost."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


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
