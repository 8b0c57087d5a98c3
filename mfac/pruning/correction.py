"""Natural-gradient corrections: the linear term that the quadratic model of a pruning step leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mfac.distributed.shards import local, part_of, whole
from mfac.interrupts import write_whole
from mfac.progress import progress_bar

MOMENTUM = 0.5  # share of the last direction in the next; measured (docs/defaults.md)
FIRST_LENGTH = 0.01  # of the weights' own length: the first step that is tried
_FACTOR = 3.0  # between two lengths that are tried: a parabola refines what it brackets
_MAX_UP, _MAX_DOWN = 9, 5  # trials: up to 3⁹ times the first length; down, where rather nothing helps, to 3⁻⁵


@dataclass
class Descent:
    """What a correction leaves to the next one.

    Attributes:
        direction: [d] float32, the last direction, which goes on by ``MOMENTUM``; None at the start, and after a
            correction that no step length made better.
        step_length: The last η > 0, the first that is tried; None at the start.
    """

    direction: Tensor | None = None
    step_length: float | None = None


@dataclass(frozen=True)
class Correction:
    """What a correction did.

    Attributes:
        step_length: η; 0 if no step lowered the loss.
        loss_before: Mean loss of the batches that judge it, without it.
        loss_after: The same with it.
        evaluations: Step lengths that were tried, 0 included.
    """

    step_length: float
    loss_before: float
    loss_after: float
    evaluations: int


def search_step_length(loss: Callable[[float], float], start: float) -> tuple[float, dict[float, float]]:
    """Find a step length of low loss: brackets a minimum by factors of 3, then tries that of a parabola.

    Args:
        loss: Loss at a step length; called once for each.
        start: The first that is tried, > 0.

    Returns:
        The best length, 0 if none is better than 0, and the loss at all that were tried.
    """
    losses: dict[float, float] = {}

    def at(length: float) -> float:
        if length not in losses:
            value = loss(length)
            losses[length] = value if math.isfinite(value) else math.inf
        return losses[length]

    nothing, middle = at(0.0), start
    if nothing == math.inf:  # the model is broken, and no step can be judged
        return 0.0, losses
    for _ in range(_MAX_UP if at(middle) < nothing else 0):
        if at(middle * _FACTOR) >= at(middle):
            break
        middle *= _FACTOR
    for _ in range(_MAX_DOWN):
        if at(middle / _FACTOR) >= at(middle) and at(middle) < nothing:
            break
        middle /= _FACTOR
    left, right = losses.get(middle / _FACTOR, math.inf), losses.get(middle * _FACTOR, math.inf)
    bend = left + right - 2 * at(middle)
    if at(middle) < nothing and 0 < bend < math.inf:
        at(middle * _FACTOR ** (0.5 * (left - right) / bend))
    best = min(losses, key=lambda length: (losses[length], length))
    return best, losses


def correct(
    params: Mapping[str, Tensor], direction: Tensor, measure: Callable[[], float], start: float, progress: bool = False
) -> Correction:
    """Move the weights by -η times a direction, η being the best of a few by the measured loss.

    Args:
        params: Name to parameter, in the order of the direction; written. As they were after an error.
        direction: [d] float32, zero where pruned.
        measure: Returns the loss of the model as it is.
        start: The first η that is tried.
        progress: Show a progress bar.

    Returns:
        What was done; the loss is never higher than before.
    """
    before = {name: whole(p).clone() for name, p in params.items()}
    parts = dict(zip(params, direction.split([p.numel() for p in params.values()]), strict=True))

    def move(length: float) -> bool:
        """Return whether all weights are finite."""
        finite = True
        for name, p in params.items():
            old, part = before[name], parts[name].view(before[name].shape)
            new = (old.float() - length * part).to(old.dtype)
            new = torch.where((part == 0) | (length == 0), old, new)  # what does not move keeps its digits
            local(p).copy_(part_of(new, p))
            finite = finite and bool(torch.isfinite(new).all())
        return finite

    best = 0.0
    with progress_bar(progress, "correction", unit=" losses") as bar:

        def loss(length: float) -> float:
            finite = move(length)
            bar.update()
            return measure() if finite else math.inf

        try:
            best, losses = search_step_length(loss, start)
        finally:
            write_whole(lambda: move(best))
            torch.clear_autocast_cache()
    return Correction(best, losses[0.0], losses[best], len(losses))
