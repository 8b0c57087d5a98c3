"""The safetensors container: read one tensor at a time, and written one at a time.

The format (https://github.com/huggingface/safetensors): the length n of the header in 8 bytes, n bytes of JSON that
give dtype, shape and place of every tensor, then the tensors without gaps. The library of that name writes a file from
tensors that are all in memory; the writer here holds one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfac.files.atomic import replaced

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # bytes, the limit of the format
_ALIGNMENT = 8  # bytes, of the tensors in the file: the largest element


@dataclass(frozen=True)
class Entry:
    """What a file says of a tensor.

    Attributes:
        dtype: Of its elements.
        shape: Of the tensor.
        begin: Its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file that is open for reading, its tensors still on disk.

    Attributes:
        path: The file.
        entries: Name -> dtype, shape and place, in the order of the header.
        metadata: The strings that the file holds beside its tensors.

    Args:
        path: The file.
        name: Of the argument that names the file, for errors.

    Raises:
        ValueError: If it is not a safetensors file, or is cut off, or its header does not describe the bytes after it.
    """

    def __init__(self, path: str | Path, name: str = "path") -> None:
        self.path, self._name = Path(path), name
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                    raise self._wrong("its first 8 bytes are not the length of a header")
                header = json.loads(file.read(length).decode("utf-8"))
        except OSError as error:
            raise ValueError(f"{name}: expected a file that can be read, got {path}: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise self._wrong(f"its header is not JSON: {error}") from error
        self.metadata = self._metadata(header)
        self.entries = self._entries(header, 8 + length, size)

    def _wrong(self, why: str) -> ValueError:
        return ValueError(f"{self._name}: expected a safetensors file, got {self.path}: {why}")

    def _metadata(self, header: Any) -> dict[str, str]:
        metadata = header.pop(_METADATA, {}) if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._wrong("its header is not a table of tensors and strings")
        return metadata

    def _entries(self, header: dict[str, Any], begin: int, size: int) -> dict[str, Entry]:
        entries = {}
        for key, value in header.items():
            try:
                dtype, shape, (first, last) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
                whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
            except (KeyError, TypeError, ValueError):
                whole = False
            if not whole or last - first != math.prod(shape) * dtype.itemsize:
                raise self._wrong(f"{key!r:.80} has no known dtype, shape and place, got {value!r:.120}")
            entries[key] = Entry(dtype, shape, begin + first)
        for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
            if entry.begin != begin:
                raise self._wrong(f"{key!r:.80} begins at byte {entry.begin}, where {begin} is next")
            begin += entry.nbytes
        if begin != size:
            raise self._wrong(f"its header describes {begin} bytes, the file has {size}")
        return entries

    def read(self, key: str) -> Tensor:
        """Read one tensor.

        Args:
            key: Its name.

        Returns:
            The tensor, a copy in memory.

        Raises:
            ValueError: If the file has become shorter meanwhile.
        """
        entry = self.entries[key]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            if file.readinto(raw.numpy().data) != entry.nbytes:
                raise self._wrong(f"{key!r:.80} is cut off")
        return raw.view(entry.dtype).view(entry.shape)


def is_safetensors(path: str | Path) -> bool:
    """Return whether a file begins as a safetensors file does; such a file may still be damaged."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER


def is_storable(dtype: torch.dtype) -> bool:
    """Return whether the format has a dtype."""
    return dtype in _NAMES


def write_order(entries: Mapping[str, Entry]) -> list[str]:
    """Return the order in which tensors are written: by size of an element, which keeps every one aligned.

    Args:
        entries: Name -> dtype and shape.

    Returns:
        The names, of large elements first.
    """
    return sorted(entries, key=lambda key: -entries[key].dtype.itemsize)


def write_safetensors(
    path: str | Path, entries: Mapping[str, Entry], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file atomically, holding one tensor at a time.

    Args:
        path: The file, in a folder that is there.
        entries: Name -> dtype and shape of what is to come; ``begin`` is ignored.
        tensors: The tensors, in the order of :func:`write_order`, of any device and stride.
        metadata: Strings to keep beside the tensors.

    Raises:
        RuntimeError: If a tensor is not as its entry says.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    order, end = write_order(entries), 0
    places = {}
    for key in order:
        places[key] = [end, end + entries[key].nbytes]
        end += entries[key].nbytes
    for key, entry in entries.items():
        header[key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": places[key]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replaced(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in zip(order, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (entries[key].dtype, entries[key].shape):
                raise RuntimeError(
                    f"{key}: expected {entries[key].dtype} {entries[key].shape}, got {tensor.dtype} {tensor.shape}"
                )
            raw = tensor.detach().resolve_neg().cpu().contiguous().view(-1).view(torch.uint8)
            file.write(raw.numpy().data)


def write_tensors(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that are all there, as :func:`write_safetensors` does.

    Args:
        path: The file, in a folder that is there.
        state: Name -> tensor.
        metadata: Strings to keep beside the tensors.
    """
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_safetensors(path, entries, (state[name] for name in write_order(entries)), metadata)
