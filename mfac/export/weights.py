"""Weights in files of several formats: checkpoints of torch, safetensors, compressed or not, and ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfac.export.compressed import CompressedFile
from mfac.export.converted import converted_layers, dense_weight
from mfac.export.onnx_weights import of_onnx
from mfac.export.stored import StoredTensor, WeightsFile, along
from mfac.files.container import is_safetensors
from mfac.files.states import read_state
from mfac.model.layers import Axes
from mfac.model.names import shorten
from mfac.sparse.formats import CONVERTED, PARTS, read_description

_AXES = Axes(outputs=0, inputs=1)  # of linear layers and convolutions, which is all that a state_dict says
_STATES = ("model", "state_dict")  # where a checkpoint has its state dict
_NOT_WEIGHTS = {"state": "param_groups", "rows": "num_grads"}  # beside these keys: of optimizers and a GradientBuffer


def open_weights(path: str | Path, name: str = "path") -> WeightsFile:
    """Open a file of weights; which format it has is seen from its first bytes.

    Args:
        path: A checkpoint or state_dict of :func:`torch.save`, a safetensors file, compressed or not, or an ONNX file.
        name: Of the argument that names the file, for errors.

    Returns:
        Its tensors, which are read when asked for.

    Raises:
        ValueError: If it is none of these, damaged, without weights, or a checkpoint with weights in several places.
        ImportError: If it is an ONNX file and onnx is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{name}: expected an existing file, got {path}")
    if is_safetensors(path):
        file = _of_safetensors(path, name)
    elif path.suffix == ".onnx":
        file = of_onnx(path, name)
    else:
        file = _of_torch(path, name)
    if not file.weights:
        raise ValueError(f"{name}: expected a file with weights of layers, got {path}, which has none")
    return file


def _of_safetensors(path: Path, name: str) -> WeightsFile:
    file = CompressedFile(path, name)
    kind = "compressed safetensors" if set(file.codes.values()) - {"dense"} else "safetensors"

    def stored(key: str) -> StoredTensor:
        return StoredTensor(key, _AXES if len(file.shape(key)) > 1 else None, lambda: file.read(key))

    described = read_description(file.metadata, name, path)
    return _with_converted(path, name, kind, {key: stored(key) for key in file.codes}, described)


def _with_converted(path: Path, name: str, kind: str, tensors: dict[str, StoredTensor], described: Any) -> WeightsFile:
    """Take the tensors of a converted layer together; ``described`` is what the file says of them."""
    layers = converted_layers(tensors)
    shapes = described.get("shapes") if isinstance(described, dict) else None

    def weight(layer: str) -> StoredTensor:
        start = f"{layer}." if layer else ""
        parts = {part: tensors.pop(start + part) for part in PARTS}
        inside = tensors.pop(f"{start}shape", None)
        shape = shapes.get(layer) if isinstance(shapes, dict) else None

        def read() -> Tensor:
            try:
                values = {part: tensor.read() for part, tensor in parts.items()}
                return dense_weight(values, shape if inside is None else inside.read().tolist())
            except ValueError as error:
                raise ValueError(
                    f"{name}: expected a converted model, got {path}, whose layer {layer!r:.80} is wrong: {error}"
                ) from error

        return StoredTensor(f"{start}weight", _AXES, read)

    found = [weight(layer) for layer in layers]
    kind = f"{kind} of a converted model" if found else kind
    return WeightsFile(path, kind, [*found, *tensors.values()], path.stat().st_size)


def _of_torch(path: Path, name: str) -> WeightsFile:
    state = read_state(name, path, "a checkpoint, a safetensors file or an ONNX file (FILE.onnx)", mmap=True)
    described = state.get(CONVERTED) if isinstance(state, dict) else None
    part, others = "", []
    for key in _STATES:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            others += [found for other, value in state.items() if other != key for found in _inside(other, value)]
            part, state = f"{part}.{key}".removeprefix("."), state[key]
    others += _nested(state)
    weights = [place for place, is_weight in others if is_weight]
    if weights:
        read = repr(part) if part else "the top level"
        raise ValueError(
            f"{name}: expected the weights of one state dict, got {path}, of which {read} is read, with more "
            f"weights in {shorten(dict.fromkeys(weights))}; save the state dict in a file of its own"
        )
    tensors: dict[str, StoredTensor] = {}
    seen = set()
    for key, value in _named_tensors(state):
        if value.layout is torch.strided and not value.is_quantized and value.numel():
            identity = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if identity in seen:
                continue  # a further name of a tensor
            seen.add(identity)
        tensors[key] = _stored(key, value)
    file = _with_converted(path, name, "checkpoint", tensors, described)
    return replace(file, part=part, unread=tuple(dict.fromkeys(place for place, _ in others)))


def _named_tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items() if isinstance(state, dict) else ():
        parts = value if isinstance(value, tuple) else (value,)  # (weight, bias) of torch's quantized layers
        for index, part in enumerate(parts):
            if isinstance(part, Tensor):
                yield f"{key}.{index}" if index else str(key), part


def _nested(state: Any) -> list[tuple[str, bool]]:
    """The tensors of a state dict that :func:`_named_tensors` passes over, as :func:`_inside` returns them."""
    found = []
    for key, value in state.items() if isinstance(state, dict) else ():
        for part in value if isinstance(value, tuple) else (value,):
            found += [] if isinstance(part, Tensor) else _inside(key, part)
    return found


def _inside(place: Any, value: Any, state: bool = True) -> list[tuple[str, bool]]:
    """The tensors in an entry of a checkpoint: the entry, and whether it is a weight, not a mask or a gradient."""
    if isinstance(value, Tensor):
        return [(str(place), state and value.dim() > 1 and value.dtype is not torch.bool)]
    if isinstance(value, dict):
        training = {key for key, other in _NOT_WEIGHTS.items() if other in value}
        return [found for key, item in value.items() for found in _inside(place, item, state and key not in training)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _inside(place, item, state)]
    return []


def _stored(name: str, value: Tensor) -> StoredTensor:
    """A tensor of torch, of any layout or quantized."""
    axes = _AXES if value.dim() > 1 else None
    if value.is_quantized:
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            points, axis = torch.tensor(value.q_zero_point()), 0
        else:
            points, axis = value.q_per_channel_zero_points(), value.q_per_channel_axis()
        return StoredTensor(name, axes, value.int_repr, along(axis, points, value.dim()))
    if value.layout is not torch.strided or type(value) is not Tensor:
        return StoredTensor(name, axes, value.to_dense)
    return StoredTensor(name, axes, value.detach)
