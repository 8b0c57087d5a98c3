"""One pruning step from gradients that the user has: saliency, mask, update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.source import GradientSource
from mfac.pruning.auto import NUM_JUDGES
from mfac.pruning.engine import Engine
from mfac.pruning.quadratic import timed
from mfac.pruning.result import PruneResult
from mfac.pruning.settings import PruneStepSettings
from mfac.settings import accepts

if TYPE_CHECKING:
    from typing_extensions import Unpack


@accepts(PruneStepSettings)
def prune_step(
    model: nn.Module,
    grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]] | None = None,
    sparsity: float | Mapping[str, float] = 0.5,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    **settings: Unpack[PruneStepSettings],
) -> PruneResult:
    """Prune the model's weights in place to the given sparsity, by Optimal Brain Surgeon with an empirical Fisher.

    Weight i is scored by its saliency w_i² / (2 [F⁻¹]_ii), the lowest are removed, and the others are moved to make
    up for it. F = λ I + (1/m) Gᵀ G, block-diagonal (M-FAC, Frantar, Kurtic, Alistarh, NeurIPS 2021; as published:
    ``update="independent", substeps=1, damping=1e-5, block_size=2000``). Exactly round(sparsity · n) weights are zero
    afterwards, ties going to the lower index. Unstructured zeros make a model smaller to store, not faster to run by
    themselves.

    Args:
        model: Its weights are written, nothing else.
        grads: A :class:`GradientBuffer`, a tensor [m, d] in the order of :func:`prunable_parameters`, or m dicts name
            -> gradient. None is for ``criterion="magnitude"``. For a model on a GPU they may be in host memory: they go
            to the GPU page by page.
        sparsity: Sparsity in [0, 1]; or a dict of sparsities by name or ``"re:<regex>"``, parameters that no key
            matches staying dense (the update may move them: leave them out of ``params`` if it must not). Weights that
            no gradient of a buffer reaches stay dense and do not count (by magnitude they are pruned).
        batches: Batches as for :func:`collect_gradients`, other ones than gave the gradients: a natural-gradient
            correction follows then (see ``corrections`` of :func:`prune`), with the mean of all rows of ``grads``, and
            these judge it, as well as the settings that ``"auto"`` tries. None: no correction.
        loss_fn: Loss of (outputs, targets) for ``batches``; None for models whose output has a ``.loss``.
        settings: The fields of :class:`PruneStepSettings`.

    Returns:
        Masks, sparsity reached, counts, settings, predicted loss increase and timings.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value, shape, device or name is wrong, the pattern fits no layer or not one named in
            ``params``, there are fewer than 4 gradients for ``"auto"``, or the sparsity is below what ``masks`` hold.
            The model is unchanged then.
        RuntimeError: If the update is not finite (the model is unchanged), or ``backend="compiled"`` cannot be had.
            An error or Ctrl-C has the masks so far as ``error.result.masks``.

    Example:
        >>> import torch
        >>> model = nn.Linear(64, 10)
        >>> result = prune_step(model, torch.randn(32, 640), sparsity=0.9)
        >>> int((model.weight == 0).sum())
        576
    """
    names = grads.names if isinstance(grads, GradientBuffer) else None
    engine = Engine(model, sparsity, settings, names)
    engine.replicas.check_arguments({"grads": type(grads).__name__, "batches": batches is None})
    engine.check_reached()
    engine.warn_of_zeros()
    judges = None
    if batches is not None:
        if grads is None:
            raise ValueError("batches: expected None without gradients, which a correction needs, got batches")
        options = {"num_grads": 1, "mode": settings["mode"], "forward": settings["forward"]}
        judges = engine.replicas.call(lambda: GradientSource(batches, loss_fn, **options, replicas=engine.replicas))
    try:
        progress, measure = engine.settings["progress"], None
        if judges is not None and engine.chooses:
            measure = judges.hold(engine.model, NUM_JUDGES)
        result = engine.step(grads, engine.sparsities, measure, progress)
        if judges is not None:
            with timed(result.seconds, "correction"):
                measure = judges.hold(engine.model, settings["correction_batches"])
                result.step_length = engine.correct(grads, measure, progress=progress).step_length
        return result
    except BaseException as error:
        engine.leave_result(error)
        raise
