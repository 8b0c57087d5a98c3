"""The weights in an ONNX file: the constants behind its convolutions and matrix products, quantized ones too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfac.export.stored import StoredTensor, WeightsFile, along
from mfac.extras import install_hint
from mfac.model.layers import Axes

# Operators of ONNX with weights; of each: its input, the input with its zero point if it is quantized, outputs, inputs.
_PLAIN = ((1, None, -1, -2),)
_CHANNELS = ((1, None, 0, 1),)
_RECURRENT = ((1, None, 1, 2), (2, None, 1, 2))
_OPERATORS: dict[str, tuple[tuple[int, int | None, int, int], ...]] = {
    "Conv": _CHANNELS,
    "ConvTranspose": ((1, None, 1, 0),),
    "Gemm": _PLAIN,
    "MatMul": _PLAIN,
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "ConvInteger": ((1, 3, 0, 1),),
    "MatMulInteger": ((1, 3, -1, -2),),
    "QLinearConv": ((3, 5, 0, 1),),
    "QLinearMatMul": ((3, 5, -1, -2),),
}
_MAX_STEPS = 8  # between an operator and the constant that is its weight
# Types that onnx has from ml_dtypes -> those of torch; integers of 2 and 4 bits widen.
_EXTENSIONS = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    **dict.fromkeys(("int2", "uint2", "int4", "uint4"), torch.int8),
}
_BETWEEN = ("DequantizeLinear", "Transpose", "Identity")


@dataclass(frozen=True)
class _Found:
    """The constant behind the weight of an operator."""

    key: str
    transposed: bool
    zero_point: str  # name of a constant; empty: none
    axis: int | None  # of the zero points; None: that of the outputs


def of_onnx(path: Path, name: str) -> WeightsFile:
    """Open an ONNX file.

    Args:
        path: The file, its external data beside it.
        name: Of the argument that names the file, for errors.

    Returns:
        Its initializers; the weights of convolutions and matrix products have axes.

    Raises:
        ValueError: If it is not such a file.
        ImportError: If onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(install_hint("onnx", "onnx")) from error
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path)
    except Exception as error:  # of protobuf, of external data, of the checker
        raise ValueError(f"{name}: expected an ONNX file, got {path}: {type(error).__name__}: {error}") from error
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}

    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:
                return _tensor(numpy_helper.to_array(constants[key]))
            except Exception as error:  # of another type of elements than the format has
                raise ValueError(
                    f"{name}: expected an ONNX file, got {path}: {type(error).__name__}: {error}"
                ) from error

        return read

    tensors = {}
    operands = [(node, operand) for node in model.graph.node for operand in _OPERATORS.get(node.op_type, ())]
    for node, (index, point, outputs, inputs) in operands:
        found = _find(node, index, point, constants, producers)
        if found is None or len(constants[found.key].dims) < 2:
            continue
        rank = len(constants[found.key].dims)
        axes = _axes(node, rank, outputs, inputs, found.transposed)
        points = None
        if found.zero_point in constants:
            axis = axes.outputs if found.axis is None else found.axis % rank
            points = along(axis, reader(found.zero_point)(), rank)
        tensors[found.key] = StoredTensor(found.key, axes, reader(found.key), points)
    for key in (key for key, constant in constants.items() if constant.data_type != onnx.TensorProto.STRING):
        tensors.setdefault(key, StoredTensor(key, None, reader(key)))
    places = {entry.value for t in constants.values() for entry in t.external_data if entry.key == "location"}
    beside = [path.parent / place for place in places]
    nbytes = path.stat().st_size + sum(file.stat().st_size for file in beside if file.is_file())
    return WeightsFile(path, "ONNX", list(tensors.values()), nbytes)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array of a type that numpy has or not."""
    kind = _EXTENSIONS.get(array.dtype.name)
    if kind is None:
        return torch.from_numpy(array.copy())
    if kind is torch.int8:
        return torch.from_numpy(array.astype(np.int8))
    return torch.from_numpy(array.copy().view(f"u{array.itemsize}")).view(kind)


def _find(
    node: Any, index: int, point: int | None, constants: dict[str, Any], producers: dict[str, Any]
) -> _Found | None:
    """Go from an input of an operator back to the constant that is its weight."""
    key, transposed, axis = node.input[index], False, None
    zero_point = node.input[point] if point is not None and len(node.input) > point else ""
    for _ in range(_MAX_STEPS):
        before = producers.get(key)
        if key in constants or before is None or before.op_type not in _BETWEEN:
            break
        if before.op_type == "DequantizeLinear":
            axis = next((attribute.i for attribute in before.attribute if attribute.name == "axis"), 1)
            zero_point = before.input[2] if len(before.input) > 2 else ""
        transposed ^= before.op_type == "Transpose"
        key = before.input[0]
    return _Found(key, transposed, zero_point, axis) if key in constants else None


def _axes(node: Any, rank: int, outputs: int, inputs: int, transposed: bool) -> Axes:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Gemm" and attributes.get("transB", 0):
        outputs, inputs = 0, 1
    outputs, inputs = outputs % rank, inputs % rank
    if transposed:  # axes in reverse order
        outputs, inputs = rank - 1 - outputs, rank - 1 - inputs
    return Axes(outputs, inputs, attributes.get("group", 1))
