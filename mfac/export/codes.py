"""Codes for the zeros of a tensor: which of its elements are stored, and where they belong.

An element is a zero where all its bits are: -0.0 is stored as a value, and so is NaN with its payload. Three codes:

``bitmask``
    A bit per element, 1 where a value is stored; the layout of compressed-tensors' ``sparse-bitmask``
    (https://github.com/vllm-project/compressed-tensors, up to version 0.14) for matrices. Other tensors are seen as
    matrices [shape[0], rest].
``gaps8``, ``gaps4``
    The number of zeros before each value, and after the last, in digits of b = 8 or 4 bits: the column indices of
    compressed rows, as differences, with one row. The largest digit, M = 2^b - 1, stands for M zeros and no value.

With n elements of which k are stored, the positions cost n bits by ``bitmask`` and about b·k / (1 - (1 - k/n)^M) bits
by gaps: ``gaps4`` is the smallest between densities of about 24 % and 5 %, ``gaps8`` below. Each of these codes
describes the whole tensor, so that a file expands to at most a known multiple of its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfac.files.container import Entry

VALUES, SHAPE = "compressed", "shape"  # parts of every code but "dense"
CODES: dict[str, tuple[str, ...]] = {  # further parts
    "bitmask": ("bitmask", "row_offsets"),
    "gaps8": ("gaps8",),
    "gaps4": ("gaps4",),
}
_BITS = {"gaps8": 8, "gaps4": 4}
_PART = 96  # bytes that a part costs in the header of the file, about
_AS_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Plan:
    """How a tensor is going to be stored.

    Attributes:
        code: ``"dense"`` or a key of ``CODES``.
        parts: Name of each part -> dtype and shape; for ``"dense"`` the only name is empty.
    """

    code: str
    parts: dict[str, Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(entry.nbytes for entry in self.parts.values())


def plan(tensor: Tensor) -> Plan:
    """Choose the smallest code for a tensor.

    Args:
        tensor: Strided, of any shape and dtype of the format.

    Returns:
        The code and the dtype and shape of its parts.

    Example:
        >>> weight = torch.zeros(64, 64)
        >>> weight[:, ::16] = 1
        >>> chosen = plan(weight)
        >>> chosen.code, chosen.nbytes, weight.nbytes
        ('gaps8', 1297, 16384)
    """
    dense = Plan("dense", {"": Entry(tensor.dtype, tuple(tensor.shape))})
    best, least = dense, tensor.nbytes
    if tensor.dim() == 0 or tensor.numel() == 0:
        return best
    bits = _bits(tensor)
    kept = int(torch.count_nonzero(bits))
    if kept * tensor.itemsize >= least:
        return best
    rows, cols = _matrix(tuple(tensor.shape))
    found = {
        "bitmask": {
            "bitmask": Entry(torch.uint8, (rows, -(-cols // 8))),
            "row_offsets": Entry(torch.int64, (rows,)),
        }
    }
    if kept * min(_BITS.values()) < tensor.numel():
        gaps = _gaps(bits)
        for code, width in _BITS.items():
            digits = int((gaps // (2**width - 1)).sum()) + len(gaps)
            found[code] = {code: Entry(torch.uint8, (-(-digits * width // 8),))}
    for code, parts in found.items():
        common = {VALUES: Entry(tensor.dtype, (kept,)), SHAPE: Entry(torch.int64, (tensor.dim(),))}
        candidate = Plan(code, {**common, **parts})
        cost = candidate.nbytes + _PART * (len(candidate.parts) - 1)
        if cost < least:
            best, least = candidate, cost
    return best


def encode(tensor: Tensor, code: str) -> dict[str, Tensor]:
    """Store a tensor by a code.

    Args:
        tensor: Strided, of any shape and dtype of the format.
        code: ``"dense"`` or a key of ``CODES``.

    Returns:
        Name of each part -> tensor, as :func:`plan` describes them.
    """
    if code == "dense":
        return {"": tensor}
    bits = _bits(tensor)
    stored = bits != 0
    parts = {VALUES: bits[stored].view(tensor.dtype), SHAPE: torch.tensor(tensor.shape, dtype=torch.int64)}
    if code == "bitmask":
        matrix = stored.view(_matrix(tuple(tensor.shape)))
        counts = matrix.sum(1)
        parts["bitmask"] = torch.from_numpy(np.packbits(matrix.numpy(), axis=1, bitorder="little"))
        parts["row_offsets"] = counts.cumsum(0) - counts
        return parts
    width = _BITS[code]
    largest = 2**width - 1
    gaps = _gaps(bits)
    digits = np.full(int((gaps // largest).sum()) + len(gaps), largest, dtype=np.uint8)
    digits[np.cumsum(gaps // largest + 1) - 1] = gaps % largest
    if width == 4:
        padded = np.append(digits, np.full(len(digits) % 2, largest, dtype=np.uint8))
        parts[code] = torch.from_numpy(padded[::2] | padded[1::2] << 4)
    else:
        parts[code] = torch.from_numpy(digits)
    return parts


def decode(code: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that was stored, bit for bit.

    Args:
        code: A key of ``CODES``.
        parts: Name of each part -> tensor; nothing is taken for granted.

    Returns:
        The tensor.

    Raises:
        ValueError: If the parts contradict each other; the text says how.
    """
    values, shape = parts[VALUES], parts[SHAPE]
    if shape.dtype != torch.int64 or shape.dim() != 1 or len(shape) == 0 or bool((shape < 0).any()):
        raise ValueError(f"shape is not a list of sizes: {shape.dtype} {list(shape.shape)}")
    sizes = tuple(shape.tolist())
    if values.dim() != 1:
        raise ValueError(f"the values have {values.dim()} axes, not 1")
    places = _of_bitmask(sizes, parts) if code == "bitmask" else _of_gaps(code, sizes, parts[code])
    if len(places) != len(values):
        raise ValueError(f"{len(values)} values for {len(places)} places")
    bits = torch.zeros(math.prod(sizes), dtype=_AS_INT[values.itemsize])
    bits[torch.from_numpy(places)] = values.view(bits.dtype)
    return bits.view(values.dtype).view(sizes)


def _of_bitmask(shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> np.ndarray:
    mask, offsets = parts["bitmask"], parts["row_offsets"]
    rows, cols = _matrix(shape)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (rows, -(-cols // 8)):
        raise ValueError(f"the bitmask is {mask.dtype} {list(mask.shape)}, which does not fit the shape {list(shape)}")
    stored = np.unpackbits(mask.numpy(), axis=1, bitorder="little")
    if stored[:, cols:].any():
        raise ValueError("the bitmask has bits beyond the end of a row")
    counts = stored.sum(1, dtype=np.int64)
    if not np.array_equal(np.cumsum(counts) - counts, offsets.numpy()):
        raise ValueError("row_offsets is not the number of bits before each row")
    return np.flatnonzero(stored[:, :cols])


def _of_gaps(code: str, shape: tuple[int, ...], packed: Tensor) -> np.ndarray:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"{code} is {packed.dtype} {list(packed.shape)}, not a list of bytes")
    digits, largest = packed.numpy(), 2 ** _BITS[code] - 1
    if _BITS[code] == 4:
        digits = np.stack([digits & largest, digits >> 4], axis=1).reshape(-1)
        digits = digits[: len(digits) - int(len(digits) > 0 and digits[-1] == largest)]
    ends = digits < largest
    places: np.ndarray = np.cumsum(digits.astype(np.int64) + ends)[ends] - 1
    if len(digits) == 0 or not ends[-1] or places[-1] != math.prod(shape):
        raise ValueError(f"{code} does not describe the {math.prod(shape)} elements of the shape {list(shape)}")
    return places[:-1]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix [rows, cols] as which a tensor is seen."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def _bits(tensor: Tensor) -> Tensor:
    """The elements as integers of the same bits, [n], on the CPU."""
    return tensor.detach().resolve_neg().cpu().contiguous().view(-1).view(_AS_INT[tensor.itemsize])


def _gaps(bits: Tensor) -> np.ndarray:
    """Zeros before each value, and after the last, [k + 1] int64."""
    places = np.flatnonzero(bits.numpy())
    return np.diff(places, prepend=-1, append=len(bits)) - 1
