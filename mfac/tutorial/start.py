"""What a run starts from: the images, and the network with its weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfac._build import cache_dir
from mfac.distributed.replicas import ALONE, Replicas
from mfac.tutorial.data import DIGITS_MEAN, DIGITS_STD, Data, load_data
from mfac.tutorial.dense import dense_digits, load_weights
from mfac.tutorial.download import fetch_imagenette
from mfac.tutorial.files import check_finite, description, read_model
from mfac.tutorial.loop import evaluate
from mfac.tutorial.models import Built, build_model
from mfac.tutorial.processes import find_device
from mfac.tutorial.settings import NETWORK, ModelSettings, RunSettings, TrainSettings, resolve


def dataset_path(settings: ModelSettings) -> str | Path | None:
    """Return the folder of the images, downloaded if that is asked for.

    Args:
        settings: The options.

    Returns:
        The folder; None for the digits.

    Raises:
        ValueError: If another dataset than imagenette is to be downloaded.
    """
    if not settings.download:
        return settings.dataset_path
    if settings.dataset != "imagenette":
        raise ValueError(f"download: expected --dataset imagenette, got {settings.dataset}")
    return fetch_imagenette(settings.dataset_path or cache_dir() / "datasets", settings.image_size)


def load_images(
    settings: ModelSettings,
    device: torch.device,
    train_batch_size: int,
    seed: int = 0,
    replicas: Replicas = ALONE,
) -> Data:
    """Return the data that the options name.

    Args:
        settings: The options.
        device: Where batches go.
        train_batch_size: Images per training step.
        seed: Of the order of the training images.
        replicas: Processes that train together.

    Returns:
        The data.
    """
    return load_data(
        settings.dataset,
        dataset_path(settings),
        image_size=settings.image_size,
        train_batch_size=train_batch_size,
        test_batch_size=settings.test_batch_size,
        workers=settings.loader_num_workers,
        device=device,
        seed=seed,
        replicas=replicas,
    )


def read_pretrained(settings: RunSettings) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Return what the file of the initial weights holds; nothing if the options name none.

    Args:
        settings: The options.

    Returns:
        The weights, what the file says of their network, and its path.
    """
    path = settings.initial_weights
    return ({}, {}, "") if path in ("True", "False") else (*read_model("pretrained", path), path)


def prepare(
    settings: TrainSettings,
    state: dict[str, Any] | None = None,
    path: str = "",
    fixed: Collection[str] = NETWORK,
    replicas: Replicas = ALONE,
) -> tuple[TrainSettings, Data, Built]:
    """Return what a run starts from.

    Args:
        settings: The options.
        state: The checkpoint that it goes on from, if any.
        path: The checkpoint's file.
        fixed: The options that must be as the file of weights, or the checkpoint, says of its network.
        replicas: Processes that train together.

    Returns:
        The options with network, images and their size filled in; the images, normalised as the network expects; and
        the network: dense and trained, loaded from a file, with random weights, or of the checkpoint.
    """
    if state is None:
        weights, described, path = read_pretrained(settings)
    else:
        weights, described = state["model"], description(state, "checkpoint_path", path)
    settings = resolve(settings, described, path, fixed)
    pretrained = settings.initial_weights if state is None else "False"
    digits = settings.dataset == "digits"
    device = find_device(settings.device)
    data = load_images(settings, device, settings.train_batch_size, settings.seed, replicas)
    if digits:
        described = {**described, "mean": DIGITS_MEAN, "std": DIGITS_STD}
    dense = pretrained == "True" and digits and settings.arch_key == "mobilenet"
    torch.manual_seed(settings.seed)
    built = build_model(
        settings.arch_key,
        data.num_classes,
        width=settings.width,
        image_size=settings.image_size,
        pretrained=pretrained == "True" and not dense,
        described=described,
    )
    built.model.to(device, memory_format=torch.channels_last)
    data.normalize(built.spec.mean, built.spec.std)
    if state is not None:
        _load_state(built.model, weights, path)
    elif dense:
        built.model.load_state_dict(dense_digits(settings.width, device).state_dict())
    elif weights:
        load_weights(built.model, weights, path, data.num_classes)
    return settings, data, built


def _load_state(model: nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    check_finite("checkpoint_path", path, state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()  # one of the names that differ; there may be a hundred
        raise ValueError(
            f"checkpoint_path: expected a checkpoint of the same width and number of classes, got {path}: {detail}"
        ) from error


def measure_initial(settings: TrainSettings) -> tuple[float, float, float]:
    """Measure the model that a run would start from.

    Args:
        settings: The options.

    Returns:
        Mean cross entropy, top-1 and top-5 accuracy in per cent, on the validation images.
    """
    _, data, built = prepare(settings)
    return evaluate(built.model, data.validation)
