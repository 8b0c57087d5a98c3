"""Pruning a flat vector of weights under the quadratic model of the loss, and the choice of that model's settings."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mfac.fisher import Fisher, check_fisher_settings
from mfac.pruning.selection import Selection

DAMPINGS = ("1e-3*mean", "1e-2*mean", "1e-1*mean", "1*mean")  # candidates for "auto"
BLOCK_SIZES = (64, 128, 256, 512, 2048, 8192)


@dataclass(frozen=True)
class Candidate:
    """One setting that "auto" tried.

    Attributes:
        damping: λ.
        block_size: B.
        score: ½ mean((G_B δ)²) over the gradients B that the step δ was not computed from.
    """

    damping: float
    block_size: int
    score: float


@dataclass(frozen=True)
class Method:
    """How a step is made; see :func:`mfac.prune_step`."""

    update: str = "joint"
    criterion: str = "fisher"
    substeps: int = 1


def prune_vector(
    weights: Tensor,
    active: Tensor | None,
    fisher: Fisher,
    selection: Selection,
    method: Method,
    seconds: dict[str, float] | None = None,
) -> tuple[Tensor, float]:
    """Prune a vector of weights in place, in S sub-steps of selection and update under one Fisher.

    A sub-step ends where the quadratic model has its minimum given the mask (joint update), so the model about that
    point is the same one, restricted to the weights that are left: later sub-steps know what earlier ones did, no
    gradient is needed for it, their losses add up, and the end is the joint update of the last mask.

    Sub-step k ends at 1 - (1 - k/S)² of the way, in the logarithm of the density: smaller steps towards the end,
    where each weight counts more.

    Args:
        weights: [d] float32; zero where not active.
        active: [d] bool, the weights not pruned before; None: all.
        fisher: Of all weights; it is restricted to the active ones here.
        selection: How many weights go.
        method: Update, criterion and sub-steps.
        seconds: Wall time by stage is added to it, if given.

    Returns:
        The mask [d], and ½ δᵀFδ of the whole step.
    """
    before, kept, loss = weights.clone(), active, 0.0
    seconds = {} if seconds is None else seconds
    for left in range(method.substeps, 0, -1):
        model, diagonal = fisher.replace(active=kept), None
        with timed(seconds, "saliency"):
            if method.update == "independent" or (method.criterion == "fisher" and selection.positions is None):
                diagonal = model.inverse_diagonal()
            scores = saliencies(weights, model, selection, method.criterion, diagonal)
        with timed(seconds, "selection"):
            zeroed = weights if method.update == "none" else None
            kept = selection.select(scores, kept, 1 - (1 - 1 / left) ** 2, fisher.kernels, zeroed)
            del scores
        with timed(seconds, "update"):
            if method.update == "joint":
                loss += model.joint_update(weights, kept)
            elif method.update == "independent":
                model.independent_update(weights, kept, diagonal)
            if left > 1 and not torch.isfinite(weights).all():
                break  # the caller says so
    if method.update != "joint":
        loss = fisher.replace(active=active).quadratic_form(weights - before)
    return kept, loss


def saliencies(
    weights: Tensor, fisher: Fisher | None, selection: Selection, criterion: str, diagonal: Tensor | None = None
) -> Tensor:
    """Score every weight, or every way to prune every group.

    Args:
        weights: [d] float32.
        fisher: Of the weights; not needed for ``criterion="magnitude"``.
        selection: The groups.
        criterion: ``"fisher"``, or ``"magnitude"``: |w|, and for groups the sum of squares (F = I).
        diagonal: Of F⁻¹; needed for single weights and ``"fisher"``.

    Returns:
        [d], or [groups, k].
    """
    if selection.positions is None:
        return weights.abs() if criterion == "magnitude" else weights.square().div_(diagonal).mul_(0.5)
    if criterion == "fisher":
        return fisher.group_saliency(weights, selection.positions, selection.subsets)
    squares = weights.square()[selection.positions]
    return torch.stack([squares[:, subset].sum(1) for subset in selection.subsets], 1)


def check_settings(damping: float | str, block_size: int | str | None) -> None:
    """Check damping and block size as users give them.

    Args:
        damping: What :class:`Fisher` takes, or ``"auto"``.
        block_size: The same.

    Raises:
        TypeError: If one is of another type.
        ValueError: If a number is out of range or a string is another.
    """
    if isinstance(block_size, str) and block_size != "auto":
        raise ValueError(f"block_size: expected an int, None or 'auto', got {block_size!r}")
    check_fisher_settings(1.0 if damping == "auto" else damping, None if block_size == "auto" else block_size)


def choose_settings(
    fisher: Fisher,
    weights: Tensor,
    active: Tensor | None,
    selection: Selection,
    method: Method,
    damping: float | str,
    block_size: int | str | None,
    progress: bool = False,
) -> tuple[Fisher, list[Candidate]]:
    """Turn ``"auto"`` and relative damping into numbers, without a single forward pass.

    For ``"auto"`` the step is computed from three quarters of the gradients, A, and scored by ½ mean((G_B δ)²) on the
    rest, B: the increase of the loss predicted by gradients which it has not seen. The lowest score wins. (Halves would
    do as well, but favour blocks small enough for half of the gradients.) Candidates are block sizes from 64 to 8192 at
    λ = 1e-2 times the mean square of the gradients; then 1e-3, 0.1 and 1 times that at the best block size; then the
    neighbours of that size at the best λ: as long as some 10 steps.

    Args:
        fisher: Of all weights, with any settings.
        weights: [d] float32; not written.
        active: [d] bool or None.
        selection: How many weights go.
        method: How the step will be made.
        damping: λ, ``"auto"`` or ``"<number>*mean"``.
        block_size: B, None or ``"auto"``.
        progress: Show a progress bar.

    Returns:
        The Fisher with its settings, and the candidates (none without ``"auto"``).

    Raises:
        ValueError: If there are fewer than 4 gradients for ``"auto"``, or a damping relative to gradients that are
        zero.
        RuntimeError: If no candidate gives a finite step.
    """
    (m, d), candidates = fisher.shape, []
    if "auto" in (damping, block_size):
        if m < 4:
            raise ValueError(f"grads: 'auto' needs at least 4 gradients; got {m}")
        fisher = fisher.replace(**({} if damping == "auto" else {"damping": damping}))
        dampings = DAMPINGS if damping == "auto" else [fisher.damping]
        sizes = [b for b in BLOCK_SIZES if b < d] or [d] if block_size == "auto" else [block_size]
        options = {"backend": fisher.backend, "precision": fisher.precision, "device": fisher.device}
        part, rest = Fisher(fisher.grads[: m * 3 // 4], **options), fisher.grads[m * 3 // 4 :]
        tried: dict[tuple[float | str, int | None], Candidate] = {}

        def best_of(settings: list[tuple[float | str, int | None]]) -> tuple[float | str, int | None]:
            for value, size in settings:
                if (value, size) not in tried:
                    step, trial = weights.clone(), part.replace(damping=value, block_size=size)
                    prune_vector(step, active, trial, selection, method)
                    step -= weights
                    score = 0.5 * float(torch.stack([(row.to(step) @ step).square() for row in rest]).mean())
                    tried[value, size] = Candidate(trial.damping, trial.block_size, score)
                    bar.update()
            return min(tried, key=lambda key: tried[key].score if tried[key].score < math.inf else math.inf)  # nor NaN

        with tqdm(total=len(dampings) + len(sizes), desc="settings", disable=not progress, leave=False) as bar:
            _, size = best_of([(dampings[len(dampings) // 3], size) for size in sizes])
            value, size = best_of([(value, size) for value in dampings])
            near = sizes.index(size)
            damping, block_size = best_of([(value, size) for size in sizes[max(near - 1, 0) : near + 2]])
        candidates = list(tried.values())
        if not tried[damping, block_size].score < math.inf:
            raise RuntimeError("damping: no candidate gives a finite step; are the gradients far too large?")
    fisher = fisher.replace(damping=damping, block_size=block_size)
    _warn_ill_conditioned(fisher)
    return fisher, candidates


def _warn_ill_conditioned(fisher: Fisher) -> None:
    """Warn of a damping that float64 cannot resolve beside the gradients, or that drowns them."""
    damping, scale = fisher.damping, fisher.mean_square
    trace = scale * fisher.block_size  # of a block of (1/m) GᵀG, on average
    advice = f"try damping='3e-2*mean', {3e-2 * scale:.1e} here, or 'auto'"
    if trace > 1e13 * damping:
        problem = f"{damping / trace:.0e} of the trace of a block of the Fisher, too little for float64"
    elif 0 < 1e3 * scale < damping:
        problem = f"{damping / scale:.0e} times the mean square of the gradients: little but magnitudes counts then"
    else:
        return
    warnings.warn(f"damping: {damping:g} is {problem}; {advice}", stacklevel=4)


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
