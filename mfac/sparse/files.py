"""Files of converted models: the compressed weights, and which layers have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfac.checks import check_module
from mfac.files.container import SafetensorsFile, is_safetensors, write_tensors
from mfac.files.states import read_state, write_state
from mfac.sparse.candidates import find_obstacle
from mfac.sparse.convert import apply_forms
from mfac.sparse.example import check_given
from mfac.sparse.formats import CONVERTED, FORMATS, read_description
from mfac.sparse.graph import trace
from mfac.sparse.modules import DepthwiseConv2d, SparseConv2d, SparseLinear

_FORMS = (*FORMATS, "depthwise")
_VOLATILE = ("training", "backend")  # attributes that differ between equal networks


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a file must say beside the weights of a converted model.

    Args:
        model: A model that :func:`mfac.sparse.convert` returned.

    Returns:
        ``traced``: whether BatchNorm is folded and activations are fused; ``layers``: the form of each layer that is
        replaced, ``"rows"``, ``"blocks"`` or ``"depthwise"``; ``shapes``: that of the weight of each sparse layer, for
        :func:`mfac.verify`; ``modules``: of every module its class and its attributes of plain types, such as a
        stride, so that :func:`load` refuses another network; ``given``: of each optional argument whether the graph
        expects it.
    """
    layers, shapes = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, (SparseLinear, SparseConv2d)):
            layers[name] = layer.format
            kernel = list(getattr(layer, "kernel", ()))
            shapes[name] = [layer.shape[0], layer.shape[1] // math.prod(kernel), *kernel]
        elif isinstance(layer, DepthwiseConv2d):
            layers[name] = "depthwise"
    modules = {name: _settings(module) for name, module in model.named_modules()}
    traced = isinstance(model, fx.GraphModule)
    checks = [node.args for node in model.graph.nodes if node.target is check_given] if traced else []
    given = {name: is_given for name, _, is_given in checks}
    return {"traced": traced, "layers": layers, "shapes": shapes, "modules": modules, "given": given}


def _settings(module: nn.Module) -> dict[str, str]:
    """Return the class of a module and its public attributes of plain types, as text; of a traced one its steps."""
    if isinstance(module, fx.GraphModule):
        return _steps(module.graph)
    settings = {"class": type(module).__name__}
    for name, value in vars(module).items():
        text = _text(value)
        if text is not None and not name.startswith("_") and name not in _VOLATILE:
            settings[name] = text
    return settings


def _steps(graph: fx.Graph) -> dict[str, str]:
    """Return the calls of a graph as text, in which "%3" is the result of step 3; numbers in a forward are there."""
    results = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    steps = {"number of steps": str(len(results))}
    for index, node in enumerate(graph.nodes):
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "function")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), results.__getitem__)
        steps[f"step {index}"] = f"{node.op} {target} {args} {kwargs}"
    return steps


def _text(value: Any) -> str | None:
    """Return a number, word, dtype, None or a list or tuple of these as text, None for any other value."""
    if isinstance(value, (list, tuple)):
        parts = [_text(item) for item in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    return repr(value) if value is None or isinstance(value, (int, float, str, torch.dtype)) else None


def _first_difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Return where two networks differ, in words; empty if they do not.

    An attribute is compared where both have it: what is None here may be a tensor or a cache there.
    """
    for name in sorted([*expected, *found], key=lambda name: name == ""):  # the steps of the whole last
        if name not in expected or name not in found:
            return f"a module {name!r} is only {'there' if name in expected else 'here'}"
        there, here = expected[name], found[name]
        for setting in there:
            if there[setting] != here.get(setting, there[setting]):
                return f"{setting} of {name!r} is {there[setting]} there, {here[setting]} here"
    return ""


def save(model: nn.Module, path: str | Path) -> None:
    """Write a converted model to a file: its state dict, in which sparse weights are compressed.

    Args:
        model: A model that :func:`mfac.sparse.convert` returned.
        path: Path of the file: safetensors if it ends in ``.safetensors``, else torch.save.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import tempfile, torch, mfac
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
        >>> _ = model[0].weight.data.mul_(torch.rand(256, 256) < 0.05)
        >>> fast = mfac.sparse.convert(model, torch.randn(1, 256), policy="sparse")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mfac.sparse.save(fast, f"{folder}/model.pt")
        ...     with torch.device("meta"):  # the same network, without memory for dense weights
        ...         skeleton = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
        ...     again = mfac.sparse.load(skeleton, f"{folder}/model.pt")
        >>> x = torch.randn(1, 256)
        >>> torch.equal(again(x), fast(x))
        True
    """
    check_module("model", model)
    described = describe(model)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if Path(path).suffix == ".safetensors":
        write_tensors(path, state, {CONVERTED: json.dumps(described)})
    else:
        write_state(path, {CONVERTED: described, "state_dict": state})


def load(model: nn.Module, path: str | Path, *, backend: str = "auto") -> nn.Module:
    """Return the converted model of a file that :func:`save` wrote.

    No dense weights are made: what is read goes into the layers as it is.

    Args:
        model: The network that was converted. Its weights do not matter: build it under ``torch.device("meta")``, and
            they take no memory. It is not changed. Public attributes of its modules that are numbers or words must be
            those of the model that was saved, also a counter or a path, where no graph was traced.
        path: Of the file.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Returns:
        The model, in eval mode, with the layers that were replaced then; nothing is timed.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the file is not of a converted model, or the model is not the one that was converted: a module,
            an attribute of one that is a number, a word or a list of them, or a call in a traced forward is another.
    """
    check_module("model", model)
    described, state = _read(Path(path))
    traced = trace(model, given=described.get("given"), plain=not described["traced"])
    if described["traced"] and traced.reason:
        raise ValueError(f"model: expected one that torch.fx can trace, as was the one in {path}, got {traced.reason}")
    modules = dict(traced.model.named_modules())
    for name, form in described["layers"].items():
        if not isinstance(modules.get(name), nn.Conv2d if form == "depthwise" else (nn.Linear, nn.Conv2d)):
            got = type(modules[name]).__name__ if name in modules else "none of that name"
            raise ValueError(f"model: expected the layers of {path}, got {got} for {name!r}")
        obstacle = find_obstacle(modules[name], None)
        if obstacle:
            raise ValueError(f"model: expected the layers of {path}, got {name!r} that is not replaced: {obstacle}")
    fast = apply_forms(traced, described["layers"], backend, empty=True)
    difference = _first_difference(described["modules"], describe(fast)["modules"])
    if difference:
        raise ValueError(f"model: expected the network of {path}, got another: {difference}")
    try:
        fast.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"model: expected the network of {path}, got another: {error}") from error
    left = [name for name, t in [*fast.named_parameters(), *fast.named_buffers()] if t.is_meta]
    if left:
        raise ValueError(f"model: expected buffers that are not saved to be off the meta device, got {left[0]} there")
    return fast


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the state dict of a file."""
    if is_safetensors(path):
        file = SafetensorsFile(path)
        described = read_description(file.metadata, "path", path)
        state = {name: file.read(name) for name in file.entries} if described else {}
    else:
        content = read_state("path", path, "a file of mfac.sparse.save")
        content = content if isinstance(content, dict) else {}
        described, state = content.get(CONVERTED), content.get("state_dict")
    described = described if isinstance(described, dict) else {}
    layers, modules = described.get("layers"), described.get("modules")
    if not (
        isinstance(layers, dict)
        and all(isinstance(form, str) and form in _FORMS for form in layers.values())
        and isinstance(modules, dict)
        and isinstance(described.get("traced"), bool)
        and isinstance(state, dict)
        and all(isinstance(name, str) for name in state)
    ):
        raise ValueError(f"path: expected a file of mfac.sparse.save, got {path} without its description")
    if not all(isinstance(settings, dict) for settings in modules.values()):
        raise ValueError(
            f"path: expected a file of this version of mfac.sparse.save, got {path} of an earlier one, which does not "
            "say all settings of the network; convert and save the model again"
        )
    return described, state
