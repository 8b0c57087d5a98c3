"""`mfac lint`, `plan` and `eval`: what a recipe does, what it costs, how good a model is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mfac.checks import suggestion
from mfac.gradients.collect import collect_gradients
from mfac.model.names import NameTable
from mfac.pruning.step import prune_step
from mfac.recipe.manager import Manager
from mfac.tutorial.data import Data
from mfac.tutorial.dense import load_weights
from mfac.tutorial.files import read_model
from mfac.tutorial.loop import evaluate as measure
from mfac.tutorial.models import Built, build_model
from mfac.tutorial.processes import find_device
from mfac.tutorial.settings import NETWORK, ModelSettings, TrainSettings, resolve
from mfac.tutorial.start import load_images, prepare
from mfac.tutorial.train import check_options

_MAX_SHOWN = 8  # updates of a plan
_KEYWORDS = ("__ALL__", "__ALL_PRUNABLE__")


def lint(
    recipe: str,
    recipe_args: str | None = None,
    *,
    strict: bool = False,
    arch_key: str | None = None,
    checkpoint_path: str | None = None,
) -> None:
    """Check a recipe and print what it does.

    Args:
        recipe: Its file.
        recipe_args: Values for its variables.
        strict: Refuse what otherwise gives a warning.
        arch_key: Check names against this network.
        checkpoint_path: Check names against the weights of this file.

    Raises:
        ValueError: If the recipe is wrong, or names parameters that the model does not have.
    """
    manager = Manager.from_recipe(recipe, recipe_args, strict=strict)
    loaded = manager.recipe
    length = f"{manager.epochs:g} epochs of training" if manager.epochs else "no length of training"
    tqdm.write(f"{loaded.name}: {len(manager.modifiers)} modifiers, {length}")
    for item in loaded.items:
        arguments = ", ".join(f"{key}={_short(value)}" for key, value in item.arguments.items())
        tqdm.write(f"  line {item.line}: {item.name}: {arguments}")
    for line in manager.describe():
        tqdm.write(f"  {line}")
    names = _parameter_names(arch_key, checkpoint_path)
    if names is None:
        tqdm.write("names of parameters are not checked: give --arch-key or --checkpoint-path")
        return
    table = NameTable(names)
    for item in loaded.items:
        for argument in ("params", "final_sparsity"):
            strict = item.arguments.get("params_strict", True) is True
            for entry in _entries(item.arguments.get(argument)) if strict else ():
                if entry not in _KEYWORDS and not table.find(entry):
                    raise ValueError(
                        f"{loaded.name} line {item.at(argument)}: !{item.name}: {argument}: expected names of the "
                        f"model's {len(names)} parameters, got {entry!r:.120}{suggestion(entry, names)}"
                    )
    tqdm.write(f"all names are among the model's {len(names)} parameters")
    if arch_key is not None:  # what else must fit: patterns, schedules
        model = build_model(arch_key, 10).model
        manager.apply(model, torch.optim.SGD(model.parameters(), lr=0.1), [], F.cross_entropy)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _entries(value: object) -> list[str]:
    """Names in `params`, or in {sparsity: names}."""
    if isinstance(value, dict):
        return [entry for names in value.values() for entry in _entries(names)]
    if isinstance(value, str):
        return [value]
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _parameter_names(arch_key: str | None, checkpoint_path: str | None) -> list[str] | None:
    if checkpoint_path is not None:
        state, _ = read_model("checkpoint_path", checkpoint_path)
        return [name for name, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]
    if arch_key is None:
        return None
    return [name for name, _ in build_model(arch_key, 10).model.named_parameters()]


def load_built(
    state: dict[str, Tensor],
    checkpoint_path: str,
    settings: ModelSettings,
    described: dict[str, Any],
    num_classes: int,
) -> Built:
    """Build the network of a file of weights and load them.

    Args:
        state: The weights.
        checkpoint_path: The file, for errors.
        settings: Which network, and on which device.
        described: What the file says of it.
        num_classes: Number of outputs.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: If there is no such network, or the weights are of another one.
    """
    built = build_model(
        settings.arch_key,
        num_classes,
        width=settings.width,
        image_size=settings.image_size,
        described=described,
    )
    built.model.to(find_device(settings.device), memory_format=torch.channels_last)
    load_weights(built.model, state, checkpoint_path, name="checkpoint_path")
    built.model.eval()
    return built


def evaluate(checkpoint_path: str, settings: ModelSettings) -> tuple[float, float, float]:
    """Measure a model on the validation images and print the result, with the sparsity of its layers.

    Args:
        checkpoint_path: A checkpoint of `mfac train`, or a state_dict.
        settings: Which model and data; what is not given is as the file says.

    Returns:
        Mean cross entropy, top-1 and top-5 accuracy in per cent.

    Raises:
        ValueError: If it is not such a file, its weights are not finite, or an option or the images do not go with its
            network.
    """
    state, described = read_model("checkpoint_path", checkpoint_path)
    settings = resolve(settings, described, checkpoint_path, (*NETWORK, "image_size"))
    data = load_images(settings, find_device(settings.device), train_batch_size=1)
    classes = described.get("num_classes", data.num_classes)
    if classes != data.num_classes:
        raise ValueError(
            f"dataset: expected images of {classes} classes, those of {checkpoint_path}, got {data.num_classes} in "
            f"{settings.dataset_path or settings.dataset}"
        )
    built = load_built(state, checkpoint_path, settings, described, data.num_classes)
    data.normalize(built.spec.mean, built.spec.std)
    model = built.model
    loss, top1, top5 = measure(model, data.validation)
    for name, weight in _weights(model).items():
        if bool((weight == 0).any()):
            tqdm.write(f"{name}: sparsity {100 * float((weight == 0).float().mean()):.2f} %")
    tqdm.write(f"loss {loss:.4f}, top-1 {top1:.2f} %, top-5 {top5:.2f} %, sparsity {100 * _sparsity(model):.2f} %")
    return loss, top1, top5


def plan(recipe: str, settings: TrainSettings) -> None:
    """Print what a recipe is going to do, step by step, and what it costs; the model is not changed.

    Args:
        recipe: Its file.
        settings: Which model and data.

    Raises:
        ValueError: If an option does not make sense here.
        MemoryError: If the gradients do not fit into memory; the text says what would.
    """
    for name in ("one_shot", "checkpoint_path", "resume", "overwrite"):
        if getattr(settings, name):
            raise ValueError(f"plan: expected options of a new run, got --{name.replace('_', '-')}")
    check_options(settings)
    manager = Manager.from_recipe(recipe, settings.recipe_args)
    manager.check_epochs()
    settings = replace(settings, pretrained=settings.pretrained or "False")  # costs are those of any weights
    settings, data, built = prepare(settings)
    model = built.model
    optimizer = torch.optim.Adam(model.parameters())
    session = manager.apply(model, optimizer, data.gradients, F.cross_entropy)
    steps = len(data.train)
    steps = steps if settings.max_train_steps < 0 else min(steps, settings.max_train_steps)
    tqdm.write(f"{manager.epochs:g} epochs of {steps} steps; final masks from epoch {manager.pruned_from:g} on")
    for line in manager.describe():
        tqdm.write(line)
    for pruner in session.pruners:
        updates = pruner.plan()
        names, d = list(pruner.params), sum(p.numel() for p in pruner.params.values())
        tqdm.write(f"{len(updates)} updates of {len(names)} parameters with {d:,} weights")
        gradient = _seconds_per_gradient(model, data, names) if any(update.gradients for update in updates) else 0.0
        weight = {m: _seconds_per_weight(m) for m in {update.num_grads for update in updates} - {0}}
        for update in updates if len(updates) <= _MAX_SHOWN else [*updates[: _MAX_SHOWN - 1], updates[-1]]:
            cost = ""
            if update.gradients:
                seconds = update.gradients * gradient + update.recomputations * d * weight[update.num_grads]
                cost = f", {update.gradients} gradients ({update.nbytes / 2**30:.2f} GiB), about {seconds:.0f} s"
            rounds = f" in {update.recomputations} recomputations" if update.recomputations > 1 else ""
            tqdm.write(f"  epoch {update.time:g}: to {100 * update.sparsity:.2f} %{rounds}{cost}")
            if update is updates[-1]:
                for name, sparsity in update.layers.items():
                    tqdm.write(f"    {name}: {100 * sparsity:.2f} %")
        if len(updates) > _MAX_SHOWN:
            tqdm.write(f"  (the first {_MAX_SHOWN - 1} and the last of {len(updates)})")


def _seconds_per_gradient(model: nn.Module, data: Data, names: list[str]) -> float:
    collect_gradients(model, data.gradients, F.cross_entropy, 1, params=names, progress=False)  # warm-up
    began = time.perf_counter()
    collect_gradients(model, data.gradients, F.cross_entropy, 3, params=names, progress=False)
    return (time.perf_counter() - began) / 3


def _seconds_per_weight(m: int) -> float:
    """Of one step with m gradients and default settings."""
    weights = 2**16
    grads = torch.randn(m, weights)
    prune_step(nn.Linear(weights, 1, bias=False), grads[:1], 0.5, progress=False)  # the kernels are loaded
    began = time.perf_counter()
    prune_step(nn.Linear(weights, 1, bias=False), grads, 0.5, substeps=1, progress=False)
    return (time.perf_counter() - began) / weights


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of layers, without biases and normalisation."""
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


def _sparsity(model: nn.Module) -> float:
    weights = _weights(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
