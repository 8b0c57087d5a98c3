"""Files of converted models: the compressed weights, and which layers have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from mfac.checks import check_module
from mfac.files.container import SafetensorsFile, is_safetensors, write_tensors
from mfac.files.states import read_state, write_state
from mfac.sparse.convert import apply_forms
from mfac.sparse.example import check_given
from mfac.sparse.formats import CONVERTED
from mfac.sparse.graph import trace
from mfac.sparse.modules import DepthwiseConv2d, SparseConv2d, SparseLinear

_FORMS = ("rows", "blocks", "depthwise")
_SETTINGS = ("shape", "kernel", "kernel_size", "stride", "padding", "dilation", "groups", "activation", "eps")


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a file must say beside the weights of a converted model.

    Args:
        model: A model that :func:`mfac.sparse.convert` returned.

    Returns:
        ``traced``: whether BatchNorm is folded and activations are fused; ``layers``: the form of each layer that is
        replaced, ``"rows"``, ``"blocks"`` or ``"depthwise"``; ``shapes``: that of the weight of each sparse layer, for
        :func:`mfac.verify`; ``modules``: of every layer what its tensors do not say, such as a stride, so that
        :func:`load` refuses another network; ``given``: of each optional argument whether the graph expects it.
    """
    layers, shapes = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, (SparseLinear, SparseConv2d)):
            layers[name] = layer.format
            kernel = list(getattr(layer, "kernel", ()))
            shapes[name] = [layer.shape[0], layer.shape[1] // math.prod(kernel), *kernel]
        elif isinstance(layer, DepthwiseConv2d):
            layers[name] = "depthwise"
    modules = {name: _settings(module) for name, module in model.named_modules() if not list(module.children())}
    traced = isinstance(model, fx.GraphModule)
    checks = [n.args for n in model.graph.nodes if n.target is check_given] if traced else []
    given = {name: is_given for name, _, is_given in checks}
    return {"traced": traced, "layers": layers, "shapes": shapes, "modules": modules, "given": given}


def _settings(module: nn.Module) -> str:
    """Return the class of a layer and what decides about its result beside its tensors."""
    words = [type(module).__name__]
    for name in _SETTINGS:
        value = getattr(module, name, None)
        value = list(value) if isinstance(value, tuple) else value
        if isinstance(value, (int, float, str)) or (isinstance(value, list) and all(type(x) is int for x in value)):
            words.append(f"{name}={value}")
    return ", ".join(words)


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
            they take no memory. It is not changed.
        path: Of the file.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Returns:
        The model, in eval mode, with the layers that were replaced then; nothing is timed.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If the file is not of a converted model, or the model is not the one that was converted.
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
    fast = apply_forms(traced, described["layers"], backend, empty=True)
    expected, found = described["modules"], describe(fast)["modules"]
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"model: expected the network of {path}, got another: {name!r} is {expected.get(name)} there, "
                f"{found.get(name)} here"
            )
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
        text = file.metadata.get(CONVERTED)
        described = None if text is None else json.loads(text)
        state = {name: file.read(name) for name in file.entries} if described else {}
    else:
        content = read_state("path", path, "a file of mfac.sparse.save")
        described = content.get(CONVERTED) if isinstance(content, dict) else None
        state = content["state_dict"] if described else {}
    layers = described.get("layers") if isinstance(described, dict) else None
    modules = described.get("modules") if isinstance(described, dict) else None
    if not isinstance(layers, dict) or not isinstance(modules, dict) or not set(layers.values()) <= set(_FORMS):
        raise ValueError(f"path: expected a file of mfac.sparse.save, got {path} without its description")
    return described, state
