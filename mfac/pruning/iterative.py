"""Pruning a trained model in one call, without training: gradients, steps, measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mfac.checks import warn
from mfac.gradients.source import GradientSource
from mfac.pruning.batchnorm import improve_batchnorm
from mfac.pruning.engine import Engine
from mfac.pruning.result import PruneResult
from mfac.pruning.run import run
from mfac.pruning.settings import PruneSettings
from mfac.settings import accepts

if TYPE_CHECKING:
    from typing_extensions import Unpack


@accepts(PruneSettings, recomputations=16, corrections=None, final_corrections=16)
def prune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    sparsity: float | Mapping[str, float] = 0.5,
    **settings: Unpack[PruneSettings],
) -> PruneResult:
    """Prune a trained model in place, in one call and without a training loop.

    The sparsity is reached in R steps at equal ratios of the remaining weights, with new gradients at each: a big
    jump at once defeats every quadratic model. Collecting gradients is most of the cost, so a ring of ``num_grads``
    is kept of which ``refresh`` are renewed at each step ("rolling").

    The quadratic model assumes a gradient of zero, which is no longer true after the first step. Its linear term moves
    the kept weights S by -η F_SS⁻¹ ḡ_S, a natural-gradient step (Amari, 1998) on the gradients that are collected
    anyway: ``corrections`` at each recomputation, and ``final_corrections`` at the end with new gradients each. A step
    goes on in the direction of the last one (momentum), and η is the best of a few by the loss of fresh batches, or 0.
    So the labels of ``batches`` count: give it training data. With R = 16, 256 gradients and the defaults there are
    1,248 backward passes and some 1,300 forward passes, about as many as an epoch of CIFAR-10 has;
    ``corrections=0`` leaves only steps under the quadratic model, as does another ``update``.

    Re-estimating BatchNorm afterwards (``batchnorm_batches``) helps after steps without corrections, and hurts after
    those with them, for which the weights have been fitted to the statistics that there are. Images for it should be
    augmented as they were in training.

    Args:
        model: Its weights are written; BatchNorm statistics only if asked for.
        batches: Iterable of (inputs, targets) or dicts, as for :func:`collect_gradients`; iterated repeatedly.
            Some 32 samples a batch.
        loss_fn: Loss of (outputs, targets); None for models whose output has a ``.loss``.
        sparsity: Sparsity, or a dict by name; see :func:`prune_step`.
        settings: The fields of :class:`PruneSettings`.

    Returns:
        Masks, sparsity, settings, candidates, and predicted and measured loss of each of the steps.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value is wrong. If that shows at a step (a loader that ends early, gradients that are not
            finite), what has been pruned before is not lost: the model is as the masks of ``error.result`` say, and a
            call with ``masks=error.result.masks`` goes on from there. So it is with every other error, and with Ctrl-C.
        RuntimeError: If an update is not finite.
        MemoryError: If the gradients do not fit into memory; the text says what would.

    Example:
        >>> import torch
        >>> model = nn.Linear(20, 2)
        >>> data = [(torch.randn(8, 20), torch.randint(2, (8,))) for _ in range(8)]
        >>> loss_fn = nn.functional.cross_entropy
        >>> options = {"recomputations": 2, "final_corrections": 3, "num_grads": 8, "progress": False}
        >>> result = prune(model, data, loss_fn, 0.75, **options)
        >>> int((model.weight == 0).sum()), len(result.steps)
        (30, 5)
    """
    engine = Engine(model, sparsity, settings)
    engine.check_reached()
    engine.warn_of_zeros()
    source = engine.replicas.call(lambda: engine.source(batches, loss_fn))

    def finish() -> float:
        return _finish(engine, source, settings["batchnorm_batches"], settings["forward"])

    return run(
        engine,
        source,
        engine.sparsities,
        settings["recomputations"],
        finish=finish,
        progress=engine.settings["progress"],
    )


def _finish(engine: Engine, source: GradientSource, batchnorm_batches: int, forward: Any) -> float:
    """Re-estimate BatchNorm if asked for and measure the loss; what has been pruned is not lost if the batches end."""
    model = engine.model
    try:
        if not batchnorm_batches:
            return source.loss(model, source.refresh)
        measure = source.hold(model, source.refresh)
        return improve_batchnorm(model, source.batches, batchnorm_batches, measure, forward, engine.replicas)
    except ValueError as error:
        warn(f"pruned, but not measured or without new BatchNorm statistics: {error}")
        return math.nan
