"""Models as ONNX: BatchNorm folded into convolutions, zeros exact, checked against torch by ONNX Runtime."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mfac.checks import check_module, check_positive
from mfac.export.weights import open_weights
from mfac.extras import install_hint
from mfac.model.layers import LayerWeight, layer_weights
from mfac.sparse.example import largest_difference

TOLERANCE = 1e-4
_LEAST_SCALE = 1e-2  # outputs that are smaller are compared with this


@dataclass(frozen=True)
class OnnxExport:
    """What :func:`export_onnx` has written.

    Attributes:
        path: The file.
        error: Largest difference between the outputs of ONNX Runtime and torch, each element relative to the largest of
            its magnitude, the typical one of its tensor and 0.01; None if it was not measured.
        batchnorms: BatchNormalization nodes that are left because none of the layers before takes them in.
    """

    path: Path
    error: float | None
    batchnorms: int


def export_onnx(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float = TOLERANCE,
) -> OnnxExport:
    """Write a model as ONNX, in evaluation mode, and prove that the file is the model.

    The exporter of torch (``dynamo=True``) and the optimizer of onnxscript fold BatchNorm into the convolution,
    transposed convolution or linear layer before it. A negative scale turns zeros into -0.0; in the file they are +0.0.
    Weights have their names in the model, also where the file has them transposed. The file appears only after all
    checks. The model is not changed; a copy of it is exported from the CPU.

    Args:
        model: Any module that torch exports.
        inputs: Its positional arguments; the outputs are compared on them, so give typical values.
        path: The file.
        dynamic_batch: Leave the size of the first axis of every input open, unless the model fixes it. The inputs then
            hold two samples or more.
        check: Compare ONNX Runtime's outputs with torch's.
        tolerance: The largest relative difference.

    Returns:
        The file and how exact it is.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If an input has fewer than two samples and ``dynamic_batch``, a weight is not finite, or bfloat16 is
            to be checked, or there is no such folder.
        RuntimeError: If torch cannot export the model, zeros got lost, or the outputs differ by more.
        ImportError: If onnx, onnxscript or, to check, onnxruntime is not installed.
    """
    check_module("model", model)
    check_positive("tolerance", tolerance)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    for index, value in enumerate(arguments):
        if dynamic_batch and (not isinstance(value, Tensor) or value.dim() == 0 or len(value) < 2):
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"inputs: expected tensors of two samples or more, got {got} as number {index}")
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {key}")
        if check and value.dtype is torch.bfloat16:
            raise ValueError(f"check: expected False for bfloat16, which ONNX Runtime's CPU lacks, got True and {key}")
    _import("onnx")
    _import("onnxscript")
    runtime = _import("onnxruntime") if check else None
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: expected a file in an existing folder, got {path}")
    model = copy.deepcopy(model).cpu().eval()
    arguments = tuple(value.detach().cpu() if isinstance(value, Tensor) else value for value in arguments)
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in arguments) if dynamic_batch else None
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial.onnx")
    data = partial.with_name(f"{partial.name}.data")
    try:
        batchnorms = _write(model, arguments, shapes, partial)
        _check_zeros(model, partial)
        error = _difference(runtime, model, arguments, partial) if runtime is not None else None
        if error is not None and not error <= tolerance:
            raise RuntimeError(
                f"model: expected ONNX Runtime's outputs within {tolerance:g} of torch's, got {error:.3g}"
            )
        if data.is_file():  # weights of 2 GB or more: their file is named in the other
            _write(model, arguments, shapes, path)
        else:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    return OnnxExport(path, error, batchnorms)


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(install_hint(package, "onnx")) from error


def _write(model: nn.Module, arguments: tuple[Any, ...], shapes: Any, path: Path) -> int:
    """Export the model; return the number of BatchNorms that are left."""
    import onnx_ir

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, dynamic_shapes=shapes)
    except Exception as error:  # of the exporter, of many kinds
        cause = error.__cause__ or error  # torch wraps it into advice
        first = next(iter(str(cause).strip().splitlines()), "")
        raise RuntimeError(
            f"model: expected one that torch.onnx exports, got {type(cause).__name__}: {first}"
        ) from error
    assert program is not None
    graph = program.model.graph
    unnamed = {name: w.parameter.detach() for name, w in _weights(model).items() if name not in graph.initializers}
    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy() if value.const_value is not None else None
        if array is None or array.dtype.kind in "biuOSU" or array.ndim < 2:
            continue
        for found in (key for key, weight in unnamed.items() if _is_transposed(array, weight)):
            del graph.initializers[name], unnamed[found]
            name = value.name = found  # of a matrix product, whose weight the optimizer transposes
            graph.register_initializer(value)
            break
        value.const_value = onnx_ir.tensor(array + array.dtype.type(0), name=name)  # -0.0 + 0.0 is +0.0
    program.save(str(path))
    return sum(node.op_type == "BatchNormalization" for node in graph)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's log, which tells of packages that nobody asked for, and torch's warnings about itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _weights(model: nn.Module) -> dict[str, LayerWeight]:
    """The weights of layers that can be pruned."""
    return {
        f"{prefix}.{weight.attribute}" if prefix else weight.attribute: weight
        for prefix, layer in model.named_modules()
        for weight in layer_weights(layer)
    }


def _is_transposed(array: Any, weight: Tensor) -> bool:
    return weight.dim() == 2 and array.shape == weight.shape[::-1] and bool((array == weight.T.numpy()).all())


def _check_zeros(model: nn.Module, path: Path) -> None:
    """Raise if a zero of the model's layers is another value in the file."""
    weights = _weights(model)
    if not weights:
        return
    stored = open_weights(path).weights
    found_as = {id(weight.parameter) for name, weight in weights.items() if name in stored}
    renamed = 0  # zeros of weights that have other names in the file, such as those of an LSTM
    for name, weight in weights.items():
        zeros = weight.parameter.detach() == 0
        if name not in stored:
            renamed += 0 if id(weight.parameter) in found_as else int(zeros.sum())
            continue
        tensor = stored.pop(name)
        found = tensor.read() == 0
        if found.dim() == 2 and tensor.axes is not None and tensor.axes.outputs != weight.axes.outputs:
            found = found.T
        if bool((zeros & ~found).any()):
            raise RuntimeError(f"model: expected the zeros of {name} in the ONNX file, got other values")
    others = sum(int((tensor.read() == 0).sum()) for tensor in stored.values())
    if others < renamed:
        raise RuntimeError(f"model: expected {renamed} zeros in renamed weights, got {others}")


def _difference(runtime: Any, model: nn.Module, arguments: tuple[Any, ...], path: Path) -> float:
    with torch.no_grad():
        wanted = [value.float() for value in tree_leaves(model(*arguments)) if isinstance(value, Tensor)]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), arguments, strict=True)}
    got = [torch.from_numpy(value).float() for value in session.run(None, feeds)]
    if [value.shape for value in got] != [value.shape for value in wanted]:
        raise RuntimeError(
            f"model: expected outputs of the shapes {[list(value.shape) for value in wanted]} from ONNX Runtime, got "
            f"{[list(value.shape) for value in got]}"
        )
    return largest_difference(got, wanted, _LEAST_SCALE)
