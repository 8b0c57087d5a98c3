"""Files of converted models: the compressed weights, and which layers have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfac.checks import check_module
from mfac.sparse.convert import apply_forms
from mfac.sparse.graph import trace
from mfac.sparse.modules import DepthwiseConv2d, SparseConv2d, SparseLinear

_KEY = "mfac.sparse"  # in a file's metadata
_FORMS = ("rows", "blocks", "depthwise")


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a file must say beside the weights of a converted model.

    Args:
        model: A model that :func:`mfac.sparse.convert` returned.

    Returns:
        ``traced``: whether BatchNorm is folded and activations are fused; ``layers``: the form of each layer that is
        replaced, ``"rows"``, ``"blocks"`` or ``"depthwise"``.
    """
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (SparseLinear, SparseConv2d)):
            layers[name] = layer.format
        elif isinstance(layer, DepthwiseConv2d):
            layers[name] = "depthwise"
    return {"traced": isinstance(model, fx.GraphModule), "layers": layers}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a converted model to a file: its state dict, in which sparse weights are compressed.

    Args:
        model: A model that :func:`mfac.sparse.convert` returned.
        path: Of the file; safetensors (which must be installed) if it ends in ``.safetensors``, else torch.save.

    Raises:
        TypeError: If `model` is not a module.
        ImportError: If safetensors is needed and not installed.

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
        _safetensors().torch.save_file(state, str(path), {_KEY: json.dumps(described)})
    else:
        torch.save({_KEY: described, "state_dict": state}, path)


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
        ImportError: If safetensors is needed and not installed.
    """
    check_module("model", model)
    described, state = _read(Path(path))
    traced = trace(model) if described["traced"] else None
    if traced is not None and traced.reason:
        raise ValueError(f"model: expected one that torch.fx can trace, as was the one in {path}, got {traced.reason}")
    if traced is None:
        traced = trace(model, plain=True)
    missing = [name for name in described["layers"] if name not in dict(traced.model.named_modules())]
    if missing:
        raise ValueError(f"model: expected the layers of {path}, got none called {missing[0]!r}")
    fast = apply_forms(traced, described["layers"], backend, empty=True)
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
    if path.suffix == ".safetensors":
        with _safetensors().safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            described = None if text is None else json.loads(text)
            state = {name: file.get_tensor(name) for name in file.keys()} if described else {}
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        described = content.get(_KEY) if isinstance(content, dict) else None
        state = content["state_dict"] if described else {}
    layers = described.get("layers") if isinstance(described, dict) else None
    if not isinstance(layers, dict) or not all(form in _FORMS for form in layers.values()):
        raise ValueError(f"path: expected a file of mfac.sparse.save, got {path} without its description")
    return described, state


def _safetensors() -> Any:
    """Return the package, with its functions for torch."""
    try:
        import safetensors
        import safetensors.torch  # noqa: F401  # its functions for torch
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install safetensors, or save to a .pt file") from error
    return safetensors
