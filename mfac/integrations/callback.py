"""What the callbacks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfac.checks import check_choice
from mfac.pruning.criteria import CRITERIA

UNITS = ("step", "epoch")


def check_unit(unit: str) -> str:
    """Check the unit of time, ``"step"`` or ``"epoch"``, and return it."""
    return check_choice("unit", unit, UNITS)


def needs_batches(settings: Mapping[str, Any]) -> bool:
    """Return whether a Pruner with these settings takes its gradients from batches."""
    criterion = CRITERIA.get(settings.get("criterion", "fisher"))
    return settings.get("buffer") is None and (criterion is None or criterion.needs_gradients)
