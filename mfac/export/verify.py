"""What is proven of a file of weights: its zeros, the pattern they keep, its sizes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mfac.checks import check_positive, check_sparsity, suggestion
from mfac.export.codes import plan
from mfac.export.stored import StoredTensor, WeightsFile
from mfac.export.weights import open_weights
from mfac.files.container import is_storable
from mfac.model.names import NameTable, shorten
from mfac.pruning.patterns import Pattern, parse_pattern

_QUANTIZED = "_quantized"  # what ONNX Runtime appends to the name of a weight


@dataclass(frozen=True)
class Layer:
    """A weight of a file.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: The type of its elements.
        zeros: Elements that are zero; under a pattern of blocks those in blocks of zeros alone.
        breaks: The first group that does not keep the pattern, in words; empty if all do, or no pattern was asked for.
        groups: Whole groups of the pattern in the weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: int
    breaks: str = ""
    groups: int = 0

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return torch.Size(self.shape).numel()

    @property
    def sparsity(self) -> float:
        """Share of its elements that are zero."""
        return self.zeros / max(self.numel, 1)


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; as text it is a table.

    Attributes:
        path: The file.
        format: In words.
        layers: The weights that were looked at.
        sizes: ``"file"``, ``"dense"``, ``"zipped"`` and ``"compressed"`` -> bytes.
        failures: What was asked and does not hold, each in a line; empty if all does.
        part: Of a checkpoint, the entry that was read, such as ``"model"``; empty if it is the whole file.
        unread: Other parts of a checkpoint that hold tensors, such as ``"optimizer"``; they were not looked at.
    """

    path: Path
    format: str
    layers: list[Layer] = field(repr=False)
    sizes: dict[str, int]
    failures: list[str]
    part: str = ""
    unread: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all that was asked holds."""
        return not self.failures

    @property
    def sparsity(self) -> float:
        """Share of the elements of all these weights that are zero."""
        return sum(layer.zeros for layer in self.layers) / max(sum(layer.numel for layer in self.layers), 1)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{self.path}: {self.format}, {len(self.layers)} weights, sparsity {100 * self.sparsity:.2f} %"]
        if self.part:
            lines.append(f"  read: {self.part}")
        if self.unread:
            lines.append(f"  not read, no weights: {shorten(self.unread)}")
        for layer in self.layers:
            shape, dtype = "x".join(map(str, layer.shape)), str(layer.dtype).removeprefix("torch.")
            line = f"  {layer.name:{width}}  {shape:>16}  {dtype:8}  {100 * layer.sparsity:6.2f} %  {layer.breaks}"
            lines.append(line.rstrip())
        for name, count in self.sizes.items():
            share = count / max(self.sizes["dense"], 1)
            lines.append(f"  {name:10} {count / 1e6:9.3f} MB  {100 * share:6.2f} % of dense")
        lines += [f"failed: {failure}" for failure in self.failures] or ["all that was asked holds"]
        return "\n".join(lines)


def verify(
    path: str | Path,
    *,
    sparsity: float | None = None,
    layer_sparsity: float | None = None,
    pattern: str | Sequence[int] | None = None,
    max_size: float | None = None,
    zeros_of: str | Path | None = None,
    params: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Verification:
    """Check what a file of weights holds, without the model: the file alone is the proof.

    Looked at are the tensors with two axes or more; in an ONNX file the weights of convolutions and matrix products.
    In other files the first axis of a weight counts as its outputs and the second as its inputs, as in linear layers
    and convolutions, and convolutions as without groups. One tensor at a time is in memory. That weights are finite is
    always asked. Of a checkpoint the state dict in ``"model"`` or ``"state_dict"`` is read; masks and the states of
    optimizers beside it are named in the result, other weights are refused.

    Args:
        path: A checkpoint or state_dict of torch, a safetensors file, compressed or not, or an ONNX file. Of quantized
            weights the zeros are the elements that equal their zero point.
        sparsity: The least share of zeros of all weights together, up to rounding, of each layer or of all, to
            the nearest number of zeros that whole groups give.
        layer_sparsity: The same of each.
        pattern: What every weight must keep, as in :func:`mfac.prune_step`. Of ``"N:M"`` each whole group holds at
            most N values. Of blocks each holds no zero or zeros alone, and only whole blocks count as sparsity.
        max_size: The largest size of the file, as a share of its tensors stored densely.
        zeros_of: Another file, such as the pruned model before it was quantized; it must have zeros, and each of them
            must be one here.
        params: Names of the weights to look at, or ``"re:..."``; None: all.
        exclude: Names of weights that may be as they are, or ``"re:..."``.

    Returns:
        Zeros per layer, sizes and what does not hold.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If it is not such a file, a name is none of its weights, an argument is out of range, or it is a
            checkpoint with weights beside those of the state dict that is read, such as an average of them.
        ImportError: If it is an ONNX file and onnx is not installed.

    Example:
        >>> import tempfile
        >>> weight = torch.randn(8, 16).view(8, 4, 4)
        >>> weight[..., :2] = 0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"fc.weight": weight.view(8, 16)}, f"{folder}/model.pt")
        ...     print(verify(f"{folder}/model.pt", sparsity=0.5, pattern="1:4").failures[0])
        pattern: expected 1:4 in fc.weight, got 2 of 4 kept in the group that begins at [0, 0]
    """
    wanted = None if sparsity is None else check_sparsity("sparsity", sparsity)
    wanted_each = None if layer_sparsity is None else check_sparsity("layer_sparsity", layer_sparsity)
    limit = None if max_size is None else check_positive("max_size", max_size)
    rule = parse_pattern("unstructured" if pattern is None else pattern)
    file = open_weights(path)
    chosen = _choose(file, params, exclude)
    other = None if zeros_of is None else open_weights(zeros_of, "zeros_of").weights
    same = {} if other is None else _same_names(file.weights, other)
    compared, layers, failures, sizes = 0, [], [], dict.fromkeys(("file", "dense", "zipped", "compressed"), 0)
    for tensor in file.tensors:
        value = tensor.read()
        for name, count in _sizes(value).items():
            sizes[name] += count
        if not _is_finite(value):
            failures.append(f"weights: expected finite values, got NaN or infinity in {tensor.name}")
        if tensor.name in chosen:
            layers.append(_layer(tensor, value, rule))
            if other is not None:
                count, lost = _zeros_kept(tensor, value, other.get(same[tensor.name]), other)
                compared += count
                failures += lost
    if other is not None and not compared and not failures:
        failures.append(f"zeros_of: expected pruned weights, got none with zeros in {zeros_of}")
    for name, before in (other or {}).items():
        if params is None and name not in same.values() and bool(before.zeros(before.read()).any()):
            failures.append(f"zeros_of: expected {name} in this file too, got {shorten(same)}")
    sizes["file"] = file.nbytes
    found = Verification(file.path, file.format, layers, sizes, failures, file.part, file.unread)
    for layer in layers:
        if layer.breaks:
            failures.append(f"pattern: expected {rule.name} in {layer.name}, got {layer.breaks}")
    if wanted is not None:
        each = sum(_least_zeros([layer], wanted, rule) for layer in layers)  # pruning rounds each, or all together
        if sum(layer.zeros for layer in layers) < min(each, _least_zeros(layers, wanted, rule)):
            failures.append(f"sparsity: expected >= {100 * wanted:.2f} %, got {100 * found.sparsity:.2f} %")
    for layer in layers:
        if wanted_each is not None and layer.zeros < _least_zeros([layer], wanted_each, rule):
            got = f"{100 * layer.sparsity:.2f} % in {layer.name}"
            failures.append(f"layer_sparsity: expected >= {100 * wanted_each:.2f} %, got {got}")
    if limit is not None and file.nbytes > limit * sizes["dense"]:
        share = file.nbytes / max(sizes["dense"], 1)
        failures.append(f"max_size: expected a file of <= {100 * limit:.2f} % of dense, got {100 * share:.2f} %")
    return found


def _choose(file: WeightsFile, params: str | Iterable[str] | None, exclude: str | Iterable[str]) -> set[str]:
    """Names of the weights to look at."""
    names = list(file.weights)
    table = NameTable(names)

    def find(argument: str, entries: str | Iterable[str]) -> set[str]:
        found: set[str] = set()
        for entry in [entries] if isinstance(entries, str) else entries:
            several = table.find(entry, argument)
            if not several:
                raise ValueError(
                    f"{argument}: expected names of weights in {file.path} ({shorten(names)}), got "
                    f"{entry!r:.120}{suggestion(entry, names)}"
                )
            found.update(several)
        return found

    chosen = set(names) if params is None else find("params", params)
    if not chosen:
        raise ValueError(f"params: expected names of weights in {file.path} ({shorten(names)}), got none")
    chosen -= find("exclude", exclude)
    if not chosen:
        raise ValueError(f"exclude: expected to leave a weight of {file.path}, got all excluded")
    return chosen


def _layer(tensor: StoredTensor, value: Tensor, pattern: Pattern) -> Layer:
    kept = ~tensor.zeros(value).flatten()
    zeros, breaks, num_groups = int((~kept).sum()), "", len(kept)
    if pattern.size > 1:
        groups = pattern.groups(value.shape, tensor.axes)
        num_groups = len(groups)
        counts = kept[groups].sum(1)
        if pattern.pruned == pattern.size:
            zeros = pattern.size * int((counts == 0).sum())
            broken = (counts > 0) & (counts < pattern.size) & value.is_floating_point()  # integers are rounded to 0
        else:
            broken = counts > pattern.size - pattern.pruned
        if bool(broken.any()):
            first = int(broken.int().argmax())
            place = _place(int(groups[first, 0]), value.shape)
            breaks = f"{int(counts[first])} of {pattern.size} kept in the group that begins at {place}"
    return Layer(tensor.name, tuple(value.shape), value.dtype, zeros, breaks, num_groups)


def _least_zeros(layers: Sequence[Layer], sparsity: float, pattern: Pattern) -> float:
    """The zeros of layers at a sparsity: the nearest number that whole groups give, if there are any."""
    exact = sparsity * sum(layer.numel for layer in layers)
    if not any(layer.groups for layer in layers):
        return exact
    nearest = pattern.pruned * math.ceil(exact / pattern.pruned - 0.5 - 1e-9)  # the lower of two
    return min(exact, nearest)


def _place(index: int, shape: Sequence[int]) -> list[int]:
    """The position in a tensor of an element of the flattened one."""
    place = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        place.append(rest)
    return place[::-1]


def _is_finite(value: Tensor) -> bool:
    """Whether all elements are, which torch does not say of 8-bit types."""
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return bool((value.float() if value.itemsize == 1 else value).isfinite().all())


def _same_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Name of a weight -> its name in another file, empty if it is not there."""
    table = NameTable(others)
    return {name: next(iter(table.find(name.removesuffix(_QUANTIZED))), "") for name in names}


def _zeros_kept(
    tensor: StoredTensor, value: Tensor, before: StoredTensor | None, other: Iterable[str]
) -> tuple[int, list[str]]:
    """The zeros of the same weight in another file, and what is wrong with those of a weight, compared with them."""
    name = tensor.name
    assert tensor.axes is not None
    if before is None:
        return 0, [f"zeros_of: expected {name} in the other file too, got {shorten(other)}"]
    zeros = before.zeros(before.read())
    count = int(zeros.sum())
    if zeros.dim() == 2 and before.axes is not None and before.axes.outputs != tensor.axes.outputs:
        zeros = zeros.T  # of a matrix product in ONNX
    if zeros.shape != value.shape:
        return count, [f"zeros_of: expected {name} of shape {list(zeros.shape)}, got {list(value.shape)}"]
    lost = (zeros & ~tensor.zeros(value)).flatten()
    if not bool(lost.any()):
        return count, []
    place = _place(int(lost.int().argmax()), value.shape)
    return count, [f"zeros_of: expected its zeros in {name}, got {int(lost.sum())} other values, the first at {place}"]


def _sizes(value: Tensor) -> dict[str, int]:
    """Bytes of a tensor: dense, zipped and compressed."""
    raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    compressed = plan(value).nbytes if is_storable(value.dtype) else len(raw)
    return {"dense": len(raw), "zipped": len(zlib.compress(raw, 6)), "compressed": compressed}
