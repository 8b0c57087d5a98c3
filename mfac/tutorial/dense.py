"""Dense models to start from: trained once on the digits and cached, or loaded from a file."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mfac._build import cache_dir, make_private
from mfac.pruning.result import PruneResult
from mfac.tutorial.data import load_data
from mfac.tutorial.loop import evaluate, fit
from mfac.tutorial.models import MobileNetV1

# Reaches about 99 % on the validation digits, in about 40 s on one CPU core at this width.
DENSE_EPOCHS = 10
_BATCH, _RATE, _MOMENTUM, _DECAY, _SEED = 32, 0.05, 0.9, 5e-4, 0


class _Stepped:
    """A scheduler of torch that is stepped along with training."""

    sparsity = 0.0

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        self._scheduler = scheduler

    def step(self, epoch: float) -> list[PruneResult]:
        if self._scheduler.last_epoch < self._scheduler.total_steps:
            self._scheduler.step()
        return []


def save(state: dict[str, Any], path: Path) -> None:
    """Save atomically: the file is the old one or the new one, never half of it.

    Args:
        state: What to save.
        path: The file; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save(state, partial)
    partial.replace(path)


def read_state(name: str, path: str | Path, wanted: str, device: torch.device | str) -> Any:
    """Read a file of tensors and plain values, as :func:`torch.save` writes it.

    Args:
        name: Of the option that names the file, for the error.
        path: The file.
        wanted: What the file should hold, for the error: ``"a checkpoint"``.
        device: Where the tensors go.

    Returns:
        What the file holds.

    Raises:
        ValueError: If there is no such file, or it cannot be read or holds objects of other kinds.
    """
    if not Path(path).is_file():
        raise ValueError(f"{name}: expected an existing file, got {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except PermissionError as error:
        raise ValueError(f"{name}: expected {wanted}, got {path}, which cannot be read: {error}") from error
    except Exception as error:  # torch raises many kinds, whose texts advise to load such files without protection
        raise ValueError(
            f"{name}: expected {wanted}, got {path}, which is damaged, of another format, or holds more than tensors "
            f"and plain values"
        ) from error


def dense_digits(
    width: float,
    device: torch.device | str = "cpu",
    epochs: float = DENSE_EPOCHS,
    report: Callable[[str], None] = tqdm.write,
    progress: bool = True,
) -> MobileNetV1:
    """Return a dense MobileNetV1 trained on the digits: the cached one if there is one, else train it once.

    Args:
        width: Multiplier of the channel counts.
        device: Where the model goes.
        epochs: The length of training.
        report: Takes lines of text about what is done.
        progress: Show progress bars (on a terminal).

    Returns:
        The model, in training mode.
    """
    settings = f"2 {width} {epochs} {_BATCH} {_RATE} {_MOMENTUM} {_DECAY} {_SEED}"  # 2: OneCycleLR, seeded epochs
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    path = cache_dir() / "models" / f"digits-mobilenet-{width:g}-{key}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        data = load_data(train_batch_size=_BATCH, device=device, seed=_SEED)
        model = MobileNetV1(data.num_classes, width, data.stem_stride)
        model = model.to(device, memory_format=torch.channels_last)
        if path.is_file():
            try:
                model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
            except Exception:  # torch raises many kinds for a file that it cannot read
                report(f"{path} is damaged and is removed")
                path.unlink()
                return dense_digits(width, device, epochs, report, progress)
            report(f"dense model from {path}")
            return model
        report(f"training the dense model once ({epochs:g} epochs on the digits); it is kept in {path}")
        optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=_MOMENTUM, nesterov=True, weight_decay=_DECAY)
        steps = max(2, math.ceil(epochs * len(data.train)))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, cycle_momentum=False)
        fit(model, optimizer, _Stepped(schedule), data, epochs, report=lambda line: None, progress=progress)
    report(f"dense model trained: top-1 {evaluate(model, data.validation)[1]:.1f} %")
    make_private(path.parent)
    save(model.state_dict(), path)
    return model


def read_weights(name: str, path: str | Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Read a file with a state_dict, or with one under `model` or `state_dict`.

    Args:
        name: Of the option that names the file, for the error.
        path: The file.
        device: Where the tensors go.

    Returns:
        The state_dict; empty if there is none.
    """
    state = read_state(name, path, "a state_dict", device)
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state if isinstance(state, dict) else {}


def read_described(pretrained: str | Path) -> dict[str, Any] | None:
    """Return what a file of weights says of its network, or None: see :meth:`mfac.tutorial.models.Built.description`.

    Args:
        pretrained: The file.

    Returns:
        The description.
    """
    state = read_state("pretrained", pretrained, "a state_dict", "cpu")
    return state.get("network") if isinstance(state, dict) and isinstance(state.get("network"), dict) else None


def load_weights(
    model: nn.Module, pretrained: str | Path, num_classes: int, report: Callable[[str], None] = tqdm.write
) -> None:
    """Load weights into a model; a classifier for another number of classes is left as it is, and that is reported.

    Args:
        model: The model.
        pretrained: A file with a state_dict, or with one under `model` or `state_dict`.
        num_classes: Outputs of the model.
        report: Takes a line of text about what was left out.

    Raises:
        ValueError: If there is no such file, or it does not fit the model.
    """
    state = read_weights("pretrained", pretrained, next(model.parameters()).device)
    own = model.state_dict()
    unmatched = sorted(set(own) ^ set(state))
    if unmatched:
        raise ValueError(
            f"pretrained: expected the names of the model's weights, got {pretrained}, in which {len(unmatched)} names "
            f"differ, for example {unmatched[0]}"
        )
    differing = [name for name in own if own[name].shape != state[name].shape]
    for name in differing:
        if own[name].shape[:1] != (num_classes,) or own[name].shape[1:] != state[name].shape[1:]:
            raise ValueError(
                f"pretrained: expected shape {list(own[name].shape)} of {name}, got {list(state[name].shape)} in "
                f"{pretrained} (another width?)"
            )
    if differing:
        report(f"{pretrained} was trained for another number of classes: the classifier starts anew")
    model.load_state_dict({**state, **{name: own[name] for name in differing}})
