"""Pruning a flat vector of weights under the quadratic model of the loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mfac.fisher import Fisher
from mfac.pruning.criteria import Criterion
from mfac.pruning.selection import Selection, Sparsities


@dataclass(frozen=True)
class Plan:
    """What a step prunes, and how.

    Args:
        selection: Units and segments.
        sparsities: Sparsity by key.
        criterion: What scores the units.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        substeps: Sub-steps of selection and update.
        kernels: :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`.
        dense: Names of parameters that stay dense.
    """

    selection: Selection
    sparsities: Sparsities
    criterion: Criterion
    update: str
    substeps: int
    kernels: ModuleType
    dense: frozenset[str] = frozenset()


def prune_vector(
    weights: Tensor,
    active: Tensor | None,
    fisher: Fisher | None,
    plan: Plan,
    seconds: dict[str, float] | None = None,
) -> tuple[Tensor, float | None]:
    """Prune a vector of weights in place, in S sub-steps of selection and update under one Fisher.

    A sub-step ends where the quadratic model has its minimum given the mask (joint update), so the model about that
    point is the same one, restricted to the weights that are left: later sub-steps know what earlier ones did, no
    gradient is needed for it, their losses add up, and the end is the joint update of the last mask.

    Sub-step k ends at 1 - (1 - k/S)² of the way, in the logarithm of the density: smaller steps towards the end,
    where each weight counts more.

    Args:
        weights: [d] float32; zero where not active.
        active: [d] bool, the weights not pruned before; None: all.
        fisher: Of all weights; it is restricted to the active ones here. None: zeros only, for a criterion that needs
            no gradients.
        plan: What goes, and how.
        seconds: Wall time by stage is added to it, if given.

    Returns:
        The mask [d], and ½ δᵀFδ of the whole step (None without a Fisher).
    """
    before, kept, loss, diagonal = weights.clone(), active, 0.0, None
    seconds = {} if seconds is None else seconds
    update = "none" if fisher is None else plan.update
    single = plan.selection.positions is None
    joint_step = update == "joint" and single and plan.criterion.needs_diagonal  # gives the next sub-step's diagonal
    memory = fisher.step_memory() if update == "joint" and plan.criterion.needs_diagonal and plan.substeps > 1 else None
    for left in range(plan.substeps, 0, -1):
        restricted = None if fisher is None else fisher.replace(active=kept, memory=memory)
        with timed(seconds, "saliency"):
            scores, diagonal = _score(weights, restricted, plan, diagonal if joint_step else None)
        with timed(seconds, "selection"):
            zeroed = weights if update == "none" else None
            share = 1 - (1 - 1 / left) ** 2
            kept = plan.selection.select(scores, kept, plan.sparsities, share, plan.kernels, zeroed, plan.dense)
            del scores
        with timed(seconds, "update"):
            if joint_step and left > 1:
                increase, diagonal = restricted.joint_step(weights, kept)
                loss += increase
            elif update == "joint":
                loss += restricted.joint_update(weights, kept)
            elif update == "independent":
                restricted.independent_update(weights, kept, diagonal)
            if left > 1 and not torch.isfinite(weights).all():
                break  # the caller says so
    if fisher is None:
        return kept, None
    if update != "joint":
        loss = fisher.replace(active=active).quadratic_form(weights - before)
    return kept, loss


def _score(weights: Tensor, fisher: Fisher | None, plan: Plan, diagonal: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores [d] or [groups, k], and diag(F⁻¹) where criterion or update need it, if it is not given."""
    single = plan.selection.positions is None
    needed = plan.update == "independent" or (single and plan.criterion.needs_diagonal)
    if diagonal is None and fisher is not None and needed:
        diagonal = fisher.inverse_diagonal()
    if single:
        return plan.criterion.score_weights(weights, diagonal), diagonal
    groups = plan.selection.positions, plan.selection.subsets
    return plan.criterion.score_groups(weights, fisher, *groups), diagonal


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to a stage.

    Args:
        seconds: By stage; written.
        stage: Its name.

    Yields:
        Nothing.
    """
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
