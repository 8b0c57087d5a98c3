"""What the callbacks share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mfac.checks import check_choice, warn
from mfac.distributed.shards import has_shards
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.gradual import Pruner
from mfac.pruning.masks import has_pruned, merge_masks
from mfac.recipe.manager import Manager, Session

UNITS = ("step", "epoch")


def check_unit(unit: str | None, recipe: Any = None) -> str:
    """Return the unit of time, ``"step"`` or ``"epoch"``; a recipe counts in epochs."""
    if unit is not None:
        check_choice("unit", unit, UNITS if recipe is None else ("epoch",))
    return unit or ("step" if recipe is None else "epoch")


def needs_batches(settings: Mapping[str, Any]) -> bool:
    """Return whether a Pruner with these settings takes its gradients from batches."""
    criterion = CRITERIA.get(settings.get("criterion", "fisher"))
    return settings.get("buffer") is None and (criterion is None or criterion.needs_gradients)


def all_processes(count: int, model: nn.Module) -> dict[str, Any]:
    """Return the setting ``process_group`` of a trainer with so many processes.

    Nothing for one, and for a model that ``fully_shard`` has cut, which brings its own group.
    """
    return {} if count == 1 or has_shards(model) else {"process_group": distributed.group.WORLD}


def masks_so_far(pruner: Pruner | Session | None, model: nn.Module) -> dict[str, Any]:
    """Return the setting ``masks`` for a model that an earlier Pruner has pruned; nothing for another model."""
    return {"masks": pruner.masks} if pruner is not None and pruner.model is model and pruner.masks else {}


_BESIDE_A_RECIPE = ("forward", "progress", "process_group")  # settings that no recipe has


def check_recipe(recipe: Any, settings: Mapping[str, Any]) -> None:
    """Check that a callback is given a recipe or settings, not both."""
    others = [name for name in settings if name not in _BESIDE_A_RECIPE]
    if recipe is not None and others:
        raise TypeError(f"recipe: expected no settings beside it, got {', '.join(others)}; change the recipe")


def apply_recipe(
    recipe: Any,
    recipe_args: Any,
    epochs: float,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any] | None,
    loss_fn: Callable | None,
    settings: Mapping[str, Any],
) -> Session:
    """Bind a recipe to a training run of so many epochs.

    Args:
        recipe: A path or text.
        recipe_args: Values for its variables.
        epochs: That the trainer trains.
        model: The model.
        optimizer: Its optimizer.
        batches: Where gradients come from.
        loss_fn: Loss of (outputs, targets), or None.
        settings: ``forward``, ``progress`` and ``process_group``.

    Returns:
        The session.

    Raises:
        ValueError: If the recipe is longer, or wrong.
    """
    manager = Manager.from_recipe(recipe, recipe_args)
    if epochs < manager.epochs - 1e-9:
        raise ValueError(f"recipe: expected a trainer of at least its {manager.epochs:g} epochs, got {epochs:g}")
    session = manager.apply(model, optimizer, batches, loss_fn, **{"progress": True, **settings})
    if session.sets_learning_rate:
        logging.getLogger("mfac").info("the recipe sets the learning rate, in place of the trainer's scheduler")
    return session


def full_state(pruner: Pruner | Session) -> dict[str, Any]:
    """Return what a checkpoint holds: the state, and a Pruner's results."""
    return pruner.state_dict(results=True) if isinstance(pruner, Pruner) else pruner.state_dict()


def masks_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the masks that are held, in the state of a Pruner or a Session."""
    parts = state.get("actions", [state])
    return merge_masks(part.get("masks", {}) for part in parts if not part.get("released"))


def warn_if_dense(pruner: Pruner | Session, model: nn.Module) -> None:
    """Warn of a model that is not pruned as the masks say, such as an earlier checkpoint that was loaded at the end."""
    params = pruner.params if pruner.model is model else {}
    if any(has_pruned(p, pruner.masks[name]) for name, p in params.items() if pruner.masks):
        warn(
            "model: weights that the Pruner has pruned are not zero; was a checkpoint from before loaded as the best? "
            "Choose among the checkpoints after the last update, or call mfac.apply_masks(model, callback.pruner.masks)"
        )
