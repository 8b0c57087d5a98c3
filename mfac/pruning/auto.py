"""``damping="auto"`` and ``block_size="auto"``: chosen by trial steps, and the loss that they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mfac.checks import warn
from mfac.distributed.shards import local, part_of, whole
from mfac.fisher import DEFAULT_BLOCK_SIZE, DEFAULT_DAMPING, Fisher
from mfac.interrupts import write_whole
from mfac.progress import progress_bar
from mfac.pruning.quadratic import Plan, prune_vector

DAMPINGS = ("1e-3*mean", "1e-2*mean", "1e-1*mean", "1*mean")  # candidates
BLOCK_SIZES = (64, 128, 256, 512, 2048, 8192)
MIN_GRADS = 4  # without batches a quarter of them is held back
NUM_JUDGES = 16  # batches whose mean loss judges a trial step
_FIRST_DAMPING = "1e-2*mean"  # with which the block sizes are compared
_MIN_Z = 3.0  # of a candidate that replaces the default by prediction alone (docs/defaults.md)


@dataclass(frozen=True)
class Candidate:
    """One setting that "auto" tried.

    Attributes:
        damping: λ.
        block_size: B.
        score: Loss of fresh batches right after the step; without batches ½ mean((G_B δ)²) over the gradients B that
            the step δ was not computed from.
        z_score: Without batches z of Wilcoxon's signed-rank test on their (g δ)² against the default; positive is
            better, 0 for the default. None with batches.
    """

    damping: float
    block_size: int
    score: float
    z_score: float | None


def choose_settings(
    fisher: Fisher,
    weights: Tensor,
    active: Tensor | None,
    plan: Plan,
    damping: float | str,
    block_size: int | str | None,
    loss_with: Callable[[Tensor], float] | None = None,
    progress: bool = False,
) -> tuple[Fisher, list[Candidate]]:
    """Turn ``"auto"`` and relative damping into numbers.

    For ``"auto"`` the step is tried with some ten candidates: block sizes from 64 to 8192 at λ = 1e-2 times the mean
    square of the gradients; then 1e-3, 0.1 and 1 times that at the best block size; then the neighbours of that size at
    the best λ. With ``loss_with`` the lowest loss wins.

    Without it no forward pass is made: the step is computed from three quarters of the gradients and judged by (g δ)²
    for each g of the rest, twice the increase of the loss predicted by gradients which it has not seen. The default
    settings stand unless these say by more than three standard errors that another is better (by chance 1 in 700 per
    candidate), by ranks, because a few gradients make up most of the mean.

    Args:
        fisher: Of all weights, with any settings.
        weights: [d] float32; not written.
        active: [d] bool or None.
        plan: The step that will be made.
        damping: λ, ``"auto"`` or ``"<number>*mean"``.
        block_size: B, None or ``"auto"``.
        loss_with: Returns the loss of the model with other weights [d].
        progress: Show a progress bar.

    Returns:
        The Fisher with its settings, and the candidates, the default first (none without ``"auto"``).

    Raises:
        ValueError: If there are fewer than 4 gradients for ``"auto"``, or a damping relative to gradients that are
            zero.
        RuntimeError: If no candidate gives a finite step and loss.
    """
    (m, d), candidates = fisher.shape, []
    if "auto" in (damping, block_size):
        if m < MIN_GRADS:
            raise ValueError(f"grads: expected at least {MIN_GRADS} gradients for 'auto', got {m}")
        asked = "damping" if damping == "auto" else "block_size"
        fisher = fisher.replace(**({} if damping == "auto" else {"damping": damping}))
        dampings, first = (DAMPINGS, _FIRST_DAMPING) if damping == "auto" else ([fisher.damping], fisher.damping)
        possible = [b for b in BLOCK_SIZES if b < d and fisher.accepts(b)]
        sizes = possible or [d] if block_size == "auto" else [block_size]
        default = (
            DEFAULT_DAMPING if damping == "auto" else fisher.damping,
            min(DEFAULT_BLOCK_SIZE, d) if block_size == "auto" else block_size,
        )
        judge = _Predictions(fisher) if loss_with is None else _Losses(fisher, loss_with)
        tried: dict[tuple[float | str, int | None], Candidate] = {}

        def compare(settings: list[tuple[float | str, int | None]]) -> tuple[float | str, int | None]:
            """Try settings, and return the best of all so far."""
            for value, size in settings:
                if (value, size) not in tried:
                    after, trial = weights.clone(), judge.fisher.replace(damping=value, block_size=size)
                    prune_vector(after, active, trial, plan)
                    tried[value, size] = Candidate(trial.damping, trial.block_size, *judge(weights, after))
                    bar.update()
            return max(tried, key=lambda key: judge.rank(tried[key]))

        with progress_bar(progress, "settings", 1 + len(dampings) + len(sizes)) as bar:
            compare([default])
            _, size = compare([(first, size) for size in sizes])
            best = value, size = compare([(value, size) for value in dampings])
            if size in sizes:
                near = sizes.index(size)
                best = compare([(value, size) for size in sizes[max(near - 1, 0) : near + 2]])
        candidates = list(tried.values())
        damping, block_size = best if judge.is_clear(tried[best]) else default
        if not tried[damping, block_size].score < math.inf:
            raise RuntimeError(f"{asked}: expected a candidate with a finite {judge.what}")
    fisher = fisher.replace(damping=damping, block_size=block_size)
    _warn_ill_conditioned(fisher)
    return fisher, candidates


def loss_at(params: Mapping[str, Tensor], measure: Callable[[], float], weights: Tensor) -> float:
    """Measure the loss of a model with other weights, and put its own back.

    Args:
        params: Name -> parameter, in the order of the weights; written, and as before afterwards, also after an error.
        measure: Returns the loss of the model as it is.
        weights: [d] float32.

    Returns:
        The loss.
    """
    before = {name: whole(p).clone() for name, p in params.items()}
    trial = dict(zip(params, weights.split([p.numel() for p in params.values()]), strict=True))

    def write(values: Mapping[str, Tensor]) -> None:
        for name, p in params.items():
            local(p).copy_(part_of(values[name].view(p.shape), p))

    try:
        write(trial)
        return measure()
    finally:
        write_whole(lambda: write(before))
        torch.clear_autocast_cache()


class _Losses:
    """Judges a step by the loss that is measured after it."""

    what = (
        "loss of the batches, got none; prune less at once, or leave out layers that are divided by their norm, which "
        "must not be pruned whole"
    )

    def __init__(self, fisher: Fisher, loss_with: Callable[[Tensor], float]) -> None:
        self.fisher, self._loss_with = fisher, loss_with

    def __call__(self, before: Tensor, after: Tensor) -> tuple[float, None]:
        loss = self._loss_with(after) if after.isfinite().all() else math.inf
        return (loss if math.isfinite(loss) else math.inf), None

    def rank(self, candidate: Candidate) -> float:
        return -candidate.score

    def is_clear(self, candidate: Candidate) -> bool:
        return True


class _Predictions:
    """Judges a step from three quarters of the gradients by what the others predict of it."""

    what = "step, got none; are the gradients huge?"

    def __init__(self, fisher: Fisher) -> None:
        m = fisher.shape[0]
        self.fisher, self._rest = fisher.rows(0, m * 3 // 4), fisher.rows(m * 3 // 4, m)
        self._default: Tensor | None = None  # its (g δ)², [m / 4]

    def __call__(self, before: Tensor, after: Tensor) -> tuple[float, float]:
        squares = self._rest.project(after - before).square().cpu()
        self._default = squares if self._default is None else self._default
        return 0.5 * float(squares.mean()), _signed_rank_z(self._default, squares)

    def rank(self, candidate: Candidate) -> float:
        return candidate.z_score

    def is_clear(self, candidate: Candidate) -> bool:
        return candidate.z_score > _MIN_Z


def _signed_rank_z(default: Tensor, other: Tensor) -> float:
    """Return z of the signed-rank test that `other` [n] is smaller than `default` [n]; -inf if it is not finite."""
    if not other.isfinite().all():
        return -math.inf
    if not default.isfinite().all():
        return math.inf
    difference, n = (default - other).double(), len(default)
    ranks = difference.abs().argsort(stable=True).argsort() + 1
    return float((ranks * difference.sign()).sum()) / math.sqrt(n * (n + 1) * (2 * n + 1) / 6)


def _warn_ill_conditioned(fisher: Fisher) -> None:
    """Warn of a damping that float64 cannot resolve beside the gradients, or that drowns them."""
    damping, scale = fisher.damping, fisher.mean_square
    trace = scale * fisher.block_size  # of a block of (1/m) GᵀG, on average
    advice = f"try damping={DEFAULT_DAMPING!r} or 'auto'"
    if trace > 1e13 * damping:
        problem = f"{damping / trace:.0e} of the trace of a block of the Fisher, too little for float64"
    elif 0 < 1e3 * scale < damping:
        problem = f"{damping / scale:.0e} times the mean square of the gradients: little but magnitudes counts then"
    else:
        return
    warn(f"damping: {damping:g} is {problem}; {advice}")
