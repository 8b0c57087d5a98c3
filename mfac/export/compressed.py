"""Models as compressed safetensors: the zeros of pruned weights take (almost) no space, and come back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfac.checks import check_instance, warn
from mfac.export.codes import CODES, SHAPE, VALUES, Plan, decode, encode, plan
from mfac.files.container import Entry, SafetensorsFile, is_storable, write_order, write_safetensors
from mfac.sparse.formats import CONVERTED

MARKER = "mfac"  # of the metadata: what is compressed, as JSON
_VERSION = 1
_MAX_NEGATIVE_ZEROS = 0.01  # share of elements that may be -0.0 without a warning


@dataclass(frozen=True)
class Compression:
    """What :func:`save_compressed` has written.

    Attributes:
        codes: Name of each tensor -> ``"dense"``, ``"bitmask"``, ``"gaps8"`` or ``"gaps4"``.
        dense: Bytes of all tensors before, each shared one once.
        nbytes: Bytes of the file.
    """

    codes: dict[str, str] = field(repr=False)
    dense: int
    nbytes: int

    @property
    def ratio(self) -> float:
        """Size of the file as a share of the tensors' size."""
        return self.nbytes / max(self.dense, 1)


def save_compressed(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> Compression:
    """Write a model's tensors as safetensors, each by the code that makes it smallest.

    At 95 % sparsity a float32 weight takes 6.2 % of its size. :mod:`mfac.export.codes` describes the codes; a tensor
    that none of them makes smaller is stored as it is, for any reader of safetensors. Every bit comes back, those of
    -0.0 and NaN too. Beside the model one tensor at a time is in memory. The file is written atomically.

    Args:
        model: A module, whose state_dict is written, or such a dict. Names of the same tensor share it in the file.
        path: The file.
        metadata: Strings to keep in the file; the key ``"mfac"`` is taken.

    Returns:
        The code of each tensor and the sizes.

    Raises:
        TypeError: If it is neither a module nor a dict of tensors, or a tensor is sparse, quantized, complex or
            otherwise not of the format, or ``metadata`` holds anything but strings.
        ValueError: If tensors share a part of their memory, ``metadata`` has a key of the format's own, or the file
            cannot be written.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(512, 512)
        >>> with torch.no_grad():
        ...     _ = model.weight.masked_fill_(torch.rand(512, 512) < 0.97, 0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save_compressed(model, f"{folder}/model.safetensors")
        ...     state = load_compressed(f"{folder}/model.safetensors")
        >>> written.codes["weight"], written.ratio < 0.08, torch.equal(state["weight"], model.weight)
        ('gaps8', True, True)
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    check_instance("model", state, Mapping, "a torch.nn.Module or a dict of tensors")
    for key, tensor in state.items():
        _check_tensor(key, tensor)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata: expected strings, got {key!r}: {value!r:.80}")
        if key == MARKER:
            raise ValueError(f"metadata: expected keys other than {MARKER!r}, which is the format's own, got it")
    aliases = _aliases(state)
    plans: dict[str, Plan] = {}
    stored: dict[str, Entry] = {}
    sources: dict[str, tuple[str, str]] = {}
    negative = 0
    for key in (key for key in state if key not in aliases):
        chosen = plan(state[key])
        negative += _negative_zeros(state[key])
        if any(_joined(key, part) in state for part in chosen.parts if part):
            chosen = Plan("dense", {"": Entry(state[key].dtype, tuple(state[key].shape))})
        plans[key] = chosen
        stored |= {_joined(key, part): entry for part, entry in chosen.parts.items()}
        sources |= {_joined(key, part): (key, part) for part in chosen.parts}
    if negative > _MAX_NEGATIVE_ZEROS * sum(tensor.numel() for tensor in state.values()):
        warn(f"model: {negative} elements are -0.0, which are stored as values are; tensor.add_(0) makes them zeros")
    about: dict[str, Any] = {
        "version": _VERSION,
        "codes": {key: chosen.code for key, chosen in plans.items() if chosen.code != "dense"},
        "aliases": aliases,
    }
    try:
        write_safetensors(
            path,
            stored,
            _parts(state, plans, stored, sources),
            {"format": "pt", **(metadata or {}), MARKER: json.dumps(about)},
        )
        nbytes = Path(path).stat().st_size
    except OSError as error:
        raise ValueError(f"path: expected a file that can be written, got {path}: {error.strerror}") from error
    return Compression(
        codes={key: plans[aliases.get(key, key)].code for key in state},
        dense=sum(state[key].nbytes for key in plans),
        nbytes=nbytes,
    )


def _check_tensor(key: Any, tensor: Any) -> None:
    if not isinstance(key, str):
        raise TypeError(f"model: expected names as keys, got {key!r}")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(f"model: expected plain tensors, got {type(tensor).__name__} as {key!r}")
    if tensor.layout is not torch.strided or tensor.is_meta or not is_storable(tensor.dtype):
        kind = "on the meta device" if tensor.is_meta else f"of {tensor.dtype} and {tensor.layout}"
        raise TypeError(f"model: expected dense tensors of a dtype that safetensors has, got {key!r} {kind}")


def _negative_zeros(tensor: Tensor) -> int:
    """Elements -0.0, as a product of a negative weight and a mask has them."""
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        return 0
    return int(((tensor == 0) & tensor.signbit()).sum())


def _joined(key: str, part: str) -> str:
    return f"{key}.{part}" if part else key


def _parts(
    state: Mapping[str, Tensor],
    plans: Mapping[str, Plan],
    stored: Mapping[str, Entry],
    sources: Mapping[str, tuple[str, str]],
) -> Iterator[Tensor]:
    """Yield the parts in the order of the file, encoding again for each."""
    for name in write_order(stored):
        key, part = sources[name]
        yield encode(state[key], plans[key].code)[part]


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of a tensor -> its first name; refuses tensors that share only a part of their memory."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    extents: dict[Any, list[tuple[int, int, str]]] = {}
    for key, tensor in state.items():
        if tensor.numel() == 0:
            continue
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if identity in first:
            aliases[key] = first[identity]
            continue
        first[identity] = key
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        begin = tensor.data_ptr()
        extents.setdefault(tensor.device, []).append((begin, begin + span * tensor.itemsize, key))
    for spans in extents.values():
        last, owner = 0, ""
        for begin, end, key in sorted(spans):
            if begin < last:
                raise ValueError(
                    f"model: expected tensors that share all of their memory or none, got {owner!r} and {key!r}; clone "
                    "one of them"
                )
            last, owner = end, key
    return aliases


class CompressedFile:
    """A file of :func:`save_compressed`, or any safetensors file, whose tensors are read one at a time.

    Attributes:
        codes: Name of each tensor, in the order of the file -> its code.
        aliases: Further name of a tensor -> the name in ``codes``.
        metadata: The strings that the file holds beside its tensors.

    Args:
        path: The file.
        name: Of the argument that names the file, for errors.

    Raises:
        ValueError: If it is not such a file, or parts of a compressed tensor are missing.
    """

    def __init__(self, path: str | Path, name: str = "path") -> None:
        self._file, self._name = SafetensorsFile(path, name), name
        self.metadata = dict(self._file.metadata)
        about = self._about(self.metadata.pop(MARKER, None))
        coded = self._written_elsewhere() if about is None else about["codes"]
        owners = {name: name for name in self._file.entries}
        for key, code in coded.items():
            for part in (VALUES, SHAPE, *CODES[code]):
                if owners.get(_joined(key, part)) != _joined(key, part):
                    raise self._wrong(key, f"it has no part {part!r}")
                owners[_joined(key, part)] = key
            if owners.get(key) == key:
                raise self._wrong(key, "it is there twice")
        self.codes = {key: coded.get(key, "dense") for key in owners.values()}
        self.aliases = {} if about is None else about["aliases"]
        for alias, key in self.aliases.items():
            if alias in self.codes or key not in self.codes:
                raise self._wrong(alias, f"it is said to be the same as {key!r:.80}")

    def _wrong(self, key: str, why: str) -> ValueError:
        return ValueError(
            f"{self._name}: expected a compressed model, got {self._file.path}, {key!r:.80} of which is wrong: {why}"
        )

    def _about(self, text: str | None) -> dict[str, Any] | None:
        if text is None:
            return None
        try:
            about = json.loads(text)
            version, codes, aliases = about["version"], about["codes"], about["aliases"]
            known = all(code in CODES for code in codes.values()) and all(isinstance(k, str) for k in aliases.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            known = False
        if not known or version != _VERSION:
            raise ValueError(
                f"{self._name}: expected a compressed model of version {_VERSION}, got {self._file.path}, which says "
                f"{text:.80}"
            )
        return about

    def _written_elsewhere(self) -> dict[str, str]:
        """Tensors in compressed-tensors' layout."""
        parts = (SHAPE, *CODES["bitmask"])
        keys = (name.removesuffix(f".{VALUES}") for name in self._file.entries if name.endswith(f".{VALUES}"))
        return {key: "bitmask" for key in keys if all(_joined(key, part) in self._file.entries for part in parts)}

    def nbytes(self, key: str) -> int:
        """Return the bytes that a tensor takes in the file.

        Args:
            key: Its name.

        Returns:
            Bytes of all its parts.
        """
        code = self.codes[key]
        parts = ("",) if code == "dense" else (VALUES, SHAPE, *CODES[code])
        return sum(self._file.entries[_joined(key, part)].nbytes for part in parts)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Args:
            key: Its name.

        Returns:
            The shape, of a compressed one as the file says it; :meth:`read` checks that.
        """
        if self.codes[key] == "dense":
            return self._file.entries[key].shape
        return tuple(self._file.read(_joined(key, SHAPE)).flatten().tolist())

    def read(self, key: str) -> Tensor:
        """Read one tensor.

        Args:
            key: Its name, none of ``aliases``.

        Returns:
            The dense tensor.

        Raises:
            ValueError: If its parts contradict each other.
        """
        code = self.codes[key]
        if code == "dense":
            return self._file.read(key)
        parts = {part: self._file.read(_joined(key, part)) for part in (VALUES, SHAPE, *CODES[code])}
        try:
            return decode(code, parts)
        except ValueError as error:
            raise self._wrong(key, str(error)) from error

    def state_dict(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read all tensors.

        Args:
            device: Where they go.

        Returns:
            The state_dict, in which names of one tensor have one tensor.
        """
        state = {key: self.read(key).to(device) for key in self.codes}
        return state | {alias: state[key] for alias, key in self.aliases.items()}


def load_compressed(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a file of :func:`save_compressed`, or any safetensors file.

    Args:
        path: The file. Bitmasks that compressed-tensors has written for matrices are understood too.
        device: Where the tensors go.

    Returns:
        The state_dict, dense, every bit as it was saved; names of one tensor have one tensor.

    Raises:
        ValueError: If it is not such a file, or what it says of its tensors is contradictory, or it is one of
            :func:`mfac.sparse.save`.
    """
    file = CompressedFile(path)
    if CONVERTED in file.metadata:
        raise ValueError(f"path: expected a file of mfac.save_compressed, got {path}, which mfac.sparse.load reads")
    return file.state_dict(device)
