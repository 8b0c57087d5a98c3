"""What the callbacks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mfac.checks import check_choice, warn
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.gradual import Pruner

UNITS = ("step", "epoch")


def check_unit(unit: str) -> str:
    """Check the unit of time, ``"step"`` or ``"epoch"``, and return it."""
    return check_choice("unit", unit, UNITS)


def needs_batches(settings: Mapping[str, Any]) -> bool:
    """Return whether a Pruner with these settings takes its gradients from batches."""
    criterion = CRITERIA.get(settings.get("criterion", "fisher"))
    return settings.get("buffer") is None and (criterion is None or criterion.needs_gradients)


def masks_so_far(pruner: Pruner | None, model: nn.Module) -> dict[str, Any]:
    """Return the setting ``masks`` for a model that an earlier Pruner has pruned; nothing for another model."""
    return {"masks": pruner.masks} if pruner is not None and pruner.model is model and pruner.masks else {}


def warn_if_dense(pruner: Pruner, model: nn.Module) -> None:
    """Warn of a model that is not pruned as the masks say, such as an earlier checkpoint that was loaded at the end."""
    params = pruner.params if pruner.model is model else {}
    if any(
        bool((p.detach()[~pruner.masks[name].to(p.device)] != 0).any()) for name, p in params.items() if pruner.masks
    ):
        warn(
            "model: weights that the Pruner has pruned are not zero; was a checkpoint from before loaded as the best? "
            "Choose among the checkpoints after the last update, or call mfac.apply_masks(model, callback.pruner.masks)"
        )
