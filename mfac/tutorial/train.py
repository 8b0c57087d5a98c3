"""The program behind `mfac train`: train and prune as a recipe says, with checkpoints and the tutorial's results."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mfac.checks import check_choice, check_int, check_number, check_positive
from mfac.pruning.result import write_csv
from mfac.recipe.manager import Manager
from mfac.tutorial.data import IMAGE_SIZE, TEST_BATCH, TRAIN_BATCH, Data, load_data
from mfac.tutorial.dense import DIGITS_WIDTH, dense_digits, load_weights, read_state, save
from mfac.tutorial.loop import Measurement, evaluate, fit
from mfac.tutorial.models import MobileNetV1

ARCHITECTURES = ("mobilenet",)
_MAX_TAG = 200  # bytes; file systems allow 255 for a name, and the log's ends in .csv


@dataclass(kw_only=True)
class TrainSettings:
    """The options of `mfac train`; `mfac train --help` explains them."""

    recipe_path: str
    recipe_args: str | None = None
    one_shot: bool = False
    arch_key: str = "mobilenet"
    width: float | None = None  # None: DIGITS_WIDTH for the digits, else 1.0
    pretrained: str | None = None  # True, False or a path; None: True for the digits, else False
    checkpoint_path: str | None = None
    dataset: str = "digits"
    dataset_path: str | None = None
    image_size: int = IMAGE_SIZE
    train_batch_size: int = TRAIN_BATCH
    test_batch_size: int = TEST_BATCH
    loader_num_workers: int = 0
    init_lr: float = 4e-4
    max_train_steps: int = -1
    device: str | None = None  # None: cuda if there is one
    seed: int = 0
    save_dir: str = "runs"
    model_tag: str | None = None  # a plain name; None: the recipe's stem
    save_best_after: int | None = None  # None: the first epoch that begins at the final sparsity
    logs_dir: str | None = None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:<index>, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, because CUDA is not available, got {name}")
    return device


def _model_tag(settings: TrainSettings) -> str:
    """Return the name of the run's folder, which must lie in `save_dir` itself."""
    tag = Path(settings.recipe_path).stem if settings.model_tag is None else settings.model_tag
    if (
        not isinstance(tag, str)
        or tag in ("", ".", "..")
        or tag != tag.strip()
        or not tag.isprintable()
        or any(separator in tag for separator in "/\\")
        or len(tag.encode()) > _MAX_TAG
    ):
        raise ValueError(
            f"model_tag: expected a plain folder name of at most {_MAX_TAG} bytes, without / and \\, got {tag!r:.120}"
        )
    return tag


def _folder(settings: TrainSettings, tag: str) -> Path:
    """Return the run's folder, made; that of an earlier run only if the run goes on from its checkpoint."""
    wanted, number = Path(settings.save_dir) / tag, 1
    folder = wanted
    resumed = settings.checkpoint_path and Path(settings.checkpoint_path).resolve().parent
    while folder.resolve() != resumed and any((folder / name).exists() for name in ("model.pt", "checkpoint.pt")):
        number += 1
        folder = wanted.with_name(f"{tag}-{number}")
    if folder != wanted:
        tqdm.write(f"{wanted} holds an earlier run; this one goes to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _model(settings: TrainSettings, data: Data, device: torch.device) -> nn.Module:
    """Return the initial model: dense and trained, loaded from a file, or with random weights."""
    digits = settings.dataset == "digits"
    width = (DIGITS_WIDTH if digits else 1.0) if settings.width is None else settings.width
    pretrained = settings.pretrained or str(digits)
    if pretrained == "True" and not settings.checkpoint_path:
        if not digits:
            raise ValueError(
                f"pretrained: expected the path of a state_dict or False for the dataset {settings.dataset}, got True, "
                f"which is for the dataset digits"
            )
        return dense_digits(width, device)
    torch.manual_seed(settings.seed)
    model = MobileNetV1(data.num_classes, width, data.stem_stride)
    model = model.to(device, memory_format=torch.channels_last)
    if pretrained not in ("True", "False"):
        load_weights(model, pretrained)
    return model


def _write_model_text(path: Path, epoch: int, measured: Measurement) -> None:
    path.write_text(
        f"epoch: {epoch}\n__loss__: {measured.loss}\ntop1acc: {measured.top1}\ntop5acc: {measured.top5}\n",
        encoding="utf-8",
    )


def _load_checkpoint(path: str, device: torch.device) -> dict[str, Any]:
    state = read_state("checkpoint_path", path, "a checkpoint", device)
    if not isinstance(state, dict) or not {"model", "optimizer", "recipe", "epoch"} <= set(state):
        raise ValueError(
            f"checkpoint_path: expected a checkpoint of `mfac train`, got {path}; for weights use --pretrained {path}"
        )
    return state


def _restore(model: nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()  # one of the names that differ; there may be a hundred
        raise ValueError(
            f"checkpoint_path: expected a checkpoint of the same width and number of classes, got {path}: {detail}"
        ) from error


def train(settings: TrainSettings) -> list[Measurement]:
    """Train and prune a model as a recipe says.

    Writes into `<save_dir>/<model_tag>/`: `model.pt` and `model.txt`, the best epoch from `save_best_after` on, and
    `checkpoint.pt`, the last epoch, for `checkpoint_path`. If no epoch qualifies as the best (training ends before
    `save_best_after`, or was resumed in another folder and does not improve), `model.pt` is the last epoch. The
    optimizer is Adam: in the single epoch that such a recipe leaves for recovery, at a learning rate near 4e-4, SGD
    would hardly change the weights.

    Args:
        settings: The options.

    Returns:
        The measurements, one per epoch and one after every pruning step.

    Raises:
        TypeError: If an option that is a number is not one.
        ValueError: If an option, the recipe or the data are not as expected.
        ImportError: If the digits are requested and scikit-learn is not installed.
        RuntimeError: If the loss is not finite, or (a BuildError) if required kernels cannot be built.
    """
    check_choice("arch_key", settings.arch_key, ARCHITECTURES)
    if settings.max_train_steps != -1:
        check_int("max_train_steps", settings.max_train_steps, also=", or -1 for all steps")
    if settings.width is not None:
        check_positive("width", settings.width)
    check_int("seed", settings.seed, 0, 2**63 - 1)
    check_number("init_lr", settings.init_lr, 0)
    check_int("loader_num_workers", settings.loader_num_workers, 0)
    manager = Manager.from_recipe(settings.recipe_path, settings.recipe_args)
    tag = _model_tag(settings)
    device = _device(settings.device)
    state = _load_checkpoint(settings.checkpoint_path, device) if settings.checkpoint_path else None
    if state and not settings.one_shot and state["epoch"] + 1 >= manager.epochs:
        raise ValueError(
            f"checkpoint_path: expected training left to do, got {settings.checkpoint_path}, which has completed the "
            f"recipe's {manager.epochs:g} epochs"
        )
    data = load_data(
        settings.dataset,
        settings.dataset_path,
        image_size=settings.image_size,
        train_batch_size=settings.train_batch_size,
        test_batch_size=settings.test_batch_size,
        workers=settings.loader_num_workers,
        device=device,
        seed=settings.seed,
    )
    model = _model(settings, data, device)
    if state:
        _restore(model, state["model"], settings.checkpoint_path)
    folder = _folder(settings, tag)
    for line in manager.describe():
        tqdm.write(line)
    if settings.one_shot:
        return [_one_shot(manager, model, data, folder)]

    torch.manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.init_lr)
    session = manager.apply(model, optimizer, data.gradients, F.cross_entropy, progress=sys.stderr.isatty())
    first_epoch, best = 0, None
    if state:
        optimizer.load_state_dict(state["optimizer"])
        session.load_state_dict(state["recipe"])
        first_epoch, best = state["epoch"] + 1, state["best"]
        tqdm.write(f"resuming after epoch {state['epoch']}, sparsity {100 * session.sparsity:.2f} %")
    after = math.ceil(manager.pruned_from) if settings.save_best_after is None else settings.save_best_after
    final_epoch = math.ceil(manager.epochs) - 1

    def keep(epoch: int, measured: Measurement) -> None:
        nonlocal best
        is_best = epoch >= after and (best is None or measured.top1 > best)
        best = measured.top1 if is_best else best
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "recipe": session.state_dict(),
            "epoch": epoch,
            "best": best,
        }
        save(state, folder / "checkpoint.pt")
        if is_best or (epoch == final_epoch and (best is None or not (folder / "model.txt").exists())):
            save(state, folder / "model.pt")
            _write_model_text(folder / "model.txt", epoch, measured)

    measurements = fit(
        model,
        optimizer,
        session,
        data,
        manager.epochs,
        first_epoch=first_epoch,
        max_train_steps=settings.max_train_steps,
        on_epoch=keep,
    )
    if settings.logs_dir:
        logs = Path(settings.logs_dir)
        logs.mkdir(parents=True, exist_ok=True)
        write_csv(logs / f"{folder.name}.csv", Measurement, measurements, append=bool(settings.checkpoint_path))
    tqdm.write(f"saved in {folder}")
    return measurements


def _one_shot(manager: Manager, model: nn.Module, data: Data, folder: Path) -> Measurement:
    """Prune without training, measure and save."""
    session = manager.one_shot(model, data.gradients, F.cross_entropy, progress=sys.stderr.isatty())
    measured = Measurement(0, 0.0, True, math.nan, *evaluate(model, data.validation), session.sparsity, 0.0)
    save({"model": model.state_dict(), "recipe": session.state_dict()}, folder / "model.pt")
    _write_model_text(folder / "model.txt", 0, measured)
    tqdm.write(f"pruned to {100 * session.sparsity:.2f} %: top-1 {measured.top1:.1f} %; saved in {folder}")
    return measured
