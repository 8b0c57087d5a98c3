"""Pruning a trained model in one call, without training: gradients, steps, measurements."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfac.fisher import check_precision
from mfac.gradients.buffer import check_grads_device
from mfac.gradients.source import GradientSource
from mfac.model.targets import names_of, prunable_parameters
from mfac.ops.backend import select_backend
from mfac.pruning.batchnorm import reestimate_batchnorm
from mfac.pruning.quadratic import Candidate, check_settings, choose_settings, timed
from mfac.pruning.result import PruneResult, PruneStep
from mfac.pruning.schedule import between
from mfac.pruning.selection import Selection
from mfac.pruning.step import Problem, check_method, prune_problem


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    sparsity: float | Mapping[str, float],
    *,
    recomputations: int = 16,
    num_grads: int = 256,
    refresh: int | None = None,
    params: str | Iterable[str] | None = None,
    damping: float | str = "3e-2*mean",
    block_size: int | str | None = 512,
    pattern: str | Sequence[int] = "unstructured",
    scope: str = "global",
    update: str = "joint",
    criterion: str = "fisher",
    substeps: int = 8,
    batchnorm_batches: int = 0,
    dtype: torch.dtype = torch.float32,
    grads_device: torch.device | str | None = None,
    backend: str = "auto",
    precision: str = "highest",
    progress: bool = True,
) -> PruneResult:
    """Prune a trained model in place, in one call and without training.

    It goes to the sparsity in R steps at equal ratios of the remaining weights, with new gradients at each: a big
    jump at once defeats every quadratic model. Collecting gradients is most of the cost, so a ring of ``num_grads``
    is kept of which ``refresh`` are renewed at each step ("rolling"); all together ``num_grads + (R - 1) · refresh``
    backward passes.

    Args:
        model: Its weights are written; BatchNorm statistics only if asked for.
        batches: Iterable of (inputs, targets) or dicts, as for :func:`collect_gradients`; gone through again and again.
            Some 32 samples a batch.
        loss_fn: Loss of (outputs, targets).
        sparsity: Share of zeros, or a dict by name; see :func:`prune_step`.
        recomputations: R >= 1.
        num_grads: m, gradients of the Fisher.
        refresh: How many of them are new at each step after the first, in [1, m]; None: a quarter. ``num_grads`` for
        all.
        params: What to prune; see :func:`prunable_parameters`.
        damping: See :func:`prune_step`. ``"auto"`` chooses once, for the final sparsity from the first gradients, and
            is relative to the gradients from then on.
        block_size: The same.
        pattern: See :func:`prune_step`, as for the next four.
        scope: ``"global"`` or ``"layer"``.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        criterion: ``"fisher"`` or ``"magnitude"``.
        substeps: Sub-steps of selection and update at each step.
        batchnorm_batches: Re-estimate the statistics of BatchNorm from so many batches at the end; 0: leave them.
        dtype: Type of the gradients, torch.float32 or torch.bfloat16.
        grads_device: Where the gradients are kept: the model's device, or ``"cpu"`` if they do not fit there.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.
        precision: See :func:`prune_step`.
        progress: Show progress bars.

    Returns:
        Masks, sparsity, settings, candidates, and predicted and measured loss of each of the steps.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value is wrong. If that shows at a step (a loader that ends early, gradients that are not
            finite), the model is as it was before that step.
        RuntimeError: If an update is not finite; the model is as before the step.

    Example:
        >>> model = nn.Linear(20, 2)
        >>> data = [(torch.randn(8, 20), torch.randint(2, (8,))) for _ in range(8)]
        >>> loss_fn = nn.functional.cross_entropy
        >>> result = prune(model, data, loss_fn, 0.75, recomputations=2, num_grads=8, progress=False)
        >>> int((model.weight == 0).sum()), len(result.steps)
        (30, 2)
    """
    began = time.perf_counter()
    method = check_method(scope, update, criterion, substeps)
    check_settings(damping, block_size)
    for name, value, least in (("recomputations", recomputations, 1), ("batchnorm_batches", batchnorm_batches, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected >= {least}, got {value}")
    params = names_of(params)
    chosen = prunable_parameters(model, params)
    names = list(chosen)
    Selection(chosen, sparsity, scope, pattern, params or ())  # checks
    device = next(iter(chosen.values())).device
    select_backend(backend, device)
    check_grads_device("grads_device", grads_device, device)
    refresh = max(1, num_grads // 4) if refresh is None and isinstance(num_grads, int) else refresh
    source = GradientSource(
        batches, loss_fn, num_grads=num_grads, refresh=refresh, dtype=dtype, device=grads_device, announce=True
    )

    options = {"params": params, "pattern": pattern, "scope": scope, "criterion": criterion, "backend": backend}
    options["precision"] = check_precision(precision)
    steps: list[PruneStep] = []
    result: PruneResult | None = None
    candidates: list[Candidate] = []
    seconds = {"gradients": 0.0}
    with tqdm(total=recomputations, desc="pruning", disable=not progress) as bar:
        start = time.perf_counter()
        buffer = source.collect(model, names, progress)
        collected = time.perf_counter()
        if "auto" in (damping, block_size):
            with timed(seconds, "settings"), torch.no_grad():
                problem = Problem(model, buffer, sparsity, masks=None, **options)
                fisher, candidates = choose_settings(
                    problem.fisher, problem.weights(), None, problem.selection, method, damping, block_size, progress
                )
            damping = f"{fisher.damping / fisher.mean_square!r}*mean" if damping == "auto" else damping
            block_size = fisher.block_size
        for r in range(1, recomputations + 1):
            fresh, loss, samples = num_grads if r == 1 else source.refresh, buffer.loss, buffer.samples
            share = r / recomputations
            now = (
                {key: between(0, value, share) for key, value in sparsity.items()}
                if isinstance(sparsity, Mapping)
                else between(0, sparsity, share)
            )
            problem = Problem(model, buffer, now, masks=result and result.masks, **options)
            result = prune_problem(problem, method, damping, block_size)
            pruned = time.perf_counter()
            seconds["gradients"] += collected - start
            for stage, value in result.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + value
            if r < recomputations:
                buffer = source.collect(model, names, progress)
                collected, after = time.perf_counter(), buffer.loss
            else:
                after = _finish(model, source, batchnorm_batches)
            steps.append(
                PruneStep(
                    sparsity=result.sparsity,
                    damping=result.damping,
                    block_size=result.block_size,
                    new_gradients=fresh,
                    loss_before=loss,
                    predicted_loss_increase=result.predicted_loss_increase * samples,
                    loss_after=after,
                    seconds=pruned - start,
                )
            )
            start = pruned
            bar.set_postfix(sparsity=f"{result.sparsity:.1%}", loss=f"{after:.3f}", refresh=False)
            bar.update()
    seconds["total"] = time.perf_counter() - began
    result.steps, result.candidates, result.seconds = steps, candidates, seconds
    return result


def _finish(model: nn.Module, source: GradientSource, batchnorm_batches: int) -> float:
    """Re-estimate BatchNorm if asked for and measure the loss; what has been pruned is not lost if the batches end."""
    try:
        if batchnorm_batches:
            reestimate_batchnorm(model, source.batches, batchnorm_batches)
        return source.loss(model, source.refresh)
    except ValueError as error:
        warnings.warn(f"pruned, but not measured or without new BatchNorm statistics: {error}", stacklevel=3)
        return math.nan
