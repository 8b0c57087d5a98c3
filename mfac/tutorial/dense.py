"""Dense models to start from: trained once on the digits and cached, or loaded from a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfac._build import cache_dir, make_private
from mfac.pruning.result import PruneResult
from mfac.tutorial.data import DIGITS_SIZE, load_data
from mfac.tutorial.files import save
from mfac.tutorial.loop import evaluate, fit
from mfac.tutorial.models import MobileNetV1, stem_stride

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
        model = MobileNetV1(data.num_classes, width, stem_stride(DIGITS_SIZE))
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


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    num_classes: int | None = None,
    report: Callable[[str], None] = tqdm.write,
    name: str = "pretrained",
) -> None:
    """Load the weights of a file into a model.

    Args:
        model: The model.
        state: Their names and values, from :func:`mfac.tutorial.files.read_model`.
        path: The file, for the errors.
        num_classes: Outputs of the model: a classifier for another number of classes is left as it is, and that is
            reported. None: the weights must have the model's own number.
        report: Takes a line of text about what was left out.
        name: Of the option that names the file, for the error.

    Raises:
        ValueError: If they do not fit the model.
    """
    own = model.state_dict()
    unmatched = sorted(set(own) ^ set(state))
    if unmatched:
        raise ValueError(
            f"{name}: expected the names of the model's weights, got {path}, in which {len(unmatched)} names differ, "
            f"for example {unmatched[0]}"
        )
    differing = [key for key in own if own[key].shape != state[key].shape]
    for key in differing:
        if own[key].shape[:1] != (num_classes,) or own[key].shape[1:] != state[key].shape[1:]:
            raise ValueError(
                f"{name}: expected shape {list(own[key].shape)} of {key}, got {list(state[key].shape)} in {path} "
                f"(another {'width' if num_classes else 'width or number of classes'}?)"
            )
    if differing:
        report(f"{path} was trained for another number of classes: the classifier starts anew")
    model.load_state_dict({**state, **{key: own[key] for key in differing}})
