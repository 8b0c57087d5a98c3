"""The program's files: folders that can be written to, and models beside what describes their network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfac.export.compressed import CompressedFile
from mfac.files.atomic import replaced
from mfac.files.container import is_safetensors
from mfac.files.states import read_state, write_state
from mfac.tutorial.data import DATASETS, DIGITS_SIZE
from mfac.tutorial.models import MAX_WIDTH, stem_stride

NETWORK_FILE = "network.json"  # the description beside a bare state_dict
_OLD_SETTINGS = ("arch_key", "width", "image_size", "dataset")  # of files from before networks were described


_OF_MOBILENET = ("width", "stem_stride")  # None for other networks
_LARGE = 1e6  # for mean and std


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _are_numbers(value: Any, low: float) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 3 and all(_is_number(v, low, _LARGE) for v in value)


# What the fields of a description must be.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arch_key": ("the name of a network", lambda value: isinstance(value, str) and value != ""),
    "num_classes": ("an int >= 1", _is_int),
    "width": (f"a number > 0, at most {MAX_WIDTH},", lambda value: _is_number(value, 0, MAX_WIDTH) and value > 0),
    "stem_stride": ("1 or 2", lambda value: _is_int(value) and value <= 2),
    "relu6": ("True or False", lambda value: isinstance(value, bool)),
    "image_size": ("an int >= 1", _is_int),
    "mean": (f"3 numbers in [{-_LARGE:g}, {_LARGE:g}]", lambda value: _are_numbers(value, -_LARGE)),
    "std": (f"3 numbers in [{1 / _LARGE:g}, {_LARGE:g}]", lambda value: _are_numbers(value, 1 / _LARGE)),
    "dataset": (f"one of {', '.join(DATASETS)}", lambda value: isinstance(value, str) and value in DATASETS),
}


def make_folder(name: str, path: str | Path) -> Path:
    """Make the folder of an option, if it is not there.

    Args:
        name: Of the option, for the error.
        path: The folder.

    Returns:
        The folder.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    folder, reason = Path(path), "it is not writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: expected a folder that can be written to, got {path}: {reason}")
    return folder


def save(state: dict[str, Any], path: Path) -> None:
    """Save atomically: the file is the old one or the new one, never half of it.

    Args:
        state: What to save.
        path: The file; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, state)


def save_text(text: str, path: Path) -> None:
    """Write a text file atomically, as :func:`save` does.

    Args:
        text: What to write.
        path: The file, in a folder that is there.
    """
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def description(state: Any, name: str, path: str | Path) -> dict[str, Any]:
    """Return what the content of a file says of its network: see :class:`mfac.tutorial.models.NetworkSpec`.

    Args:
        state: What the file holds.
        name: Of the option that names the file, for the error.
        path: The file.

    Returns:
        The description, of an older file completed by its options; empty if the file has none, as a bare state_dict.

    Raises:
        ValueError: If a field of it is not as expected.
    """
    network = state.get("network") if isinstance(state, dict) else None
    if not isinstance(network, dict):
        return {}
    settings = state.get("settings")
    if isinstance(settings, dict):
        network = {**_described_by_settings(settings), **network}
    mobilenet = network.get("arch_key", "mobilenet") == "mobilenet"
    for field, (wanted, is_valid) in _FIELDS.items():
        if field not in network:
            continue
        value = network[field]
        absent = value is None and field in _OF_MOBILENET and not mobilenet
        if not absent and not is_valid(value):
            raise ValueError(f"{name}: expected {wanted} as {field} of the network in {path}, got {value!r:.80}")
    return network


def _described_by_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the options in an older file of the program say of its network, which that does not say itself."""
    found = {name: settings[name] for name in _OLD_SETTINGS if settings.get(name) is not None}
    if found.get("dataset") == "digits":
        found["image_size"] = DIGITS_SIZE  # whatever the option
    if found.get("arch_key") != "mobilenet":
        found.pop("width", None)
    elif isinstance(found.get("image_size"), int):
        found["stem_stride"] = stem_stride(found["image_size"])
    return found


def check_finite(name: str, path: str | Path, weights: Mapping[str, Any]) -> None:
    """Check the weights of a file.

    Args:
        name: Of the option that names the file, for the error.
        path: The file.
        weights: What it holds.

    Raises:
        ValueError: If a tensor holds NaN or infinity.
    """
    for key, value in weights.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite weights, got NaN or infinity in {key} of {path}")


def read_model(
    name: str, path: str | Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file with a state_dict, or with one under `model` or `state_dict`, or a safetensors file.

    Args:
        name: Of the option that names the file, for the error.
        path: The file.
        device: Where the tensors go.

    Returns:
        The state_dict, and what the file says of its network: see :func:`description`. For a bare state_dict that is
        in `network.json` beside it, if that is there; `mfac export` writes it, and into its safetensors files.

    Raises:
        ValueError: If there is no such file, or no weights in it, or some that are not finite, or its description is
            not as expected.
    """
    if is_safetensors(path):
        file = CompressedFile(path, name)
        weights = file.state_dict(device)
        state = {"network": _parsed(name, path, file.metadata["network"])} if "network" in file.metadata else weights
    else:
        state = weights = read_state(name, path, "a state_dict", device)
    for key in ("model", "state_dict"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f"{name}: expected a model of `mfac train` or a state_dict, got {path}, which holds no weights"
        )
    check_finite(name, path, weights)
    beside = Path(path).with_name(NETWORK_FILE)
    if weights is state and beside.is_file():
        state, path = {"network": _read_network(name, beside)}, beside
    return weights, description(state, name, path)


def _read_network(name: str, path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: expected a description of the network in {path}, got {error}") from error
    return _parsed(name, path, text)


def _parsed(name: str, path: str | Path, text: str) -> dict[str, Any]:
    try:
        network = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected a description of the network in {path}, got {error}") from error
    if not isinstance(network, dict):
        raise ValueError(f"{name}: expected a description of the network in {path}, got {network!r:.80}")
    return network
