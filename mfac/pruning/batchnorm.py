"""BatchNorm statistics of a pruned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from mfac.checks import check_int, warn
from mfac.distributed.models import find_replicas
from mfac.distributed.replicas import ALONE, Replicas
from mfac.gradients.batches import Forward, check_functions, evaluation, model_device, move_batch, run_model
from mfac.gradients.seeds import current_seed
from mfac.gradients.stream import BatchStream
from mfac.interrupts import write_whole

_NORMS = torch.nn.modules.batchnorm._BatchNorm


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 64,
    *,
    forward: Forward | None = None,
    process_group: ProcessGroup | None = None,
) -> None:
    """Set the running mean and variance of every BatchNorm layer to those of some batches.

    Pruning changes the distribution of every layer's outputs, and in eval mode BatchNorm goes on with the statistics
    of the dense model: a loss of accuracy that costs no more than a few forward passes to undo. Nothing else is
    changed: modes, momentum, weights and random state are as before.

    Args:
        model: Any module; one without BatchNorm is left alone.
        batches: As for :func:`collect_gradients`; targets are not used.
        num_batches: How many; each counts the same. Some thousand samples in all are enough.
        forward: A function of (model, batch) that runs the model, for batches that are neither pairs nor mappings.
        process_group: Processes that hold copies of the model, each with ``num_batches`` batches of its own: all get
            the mean of their statistics. None: those of a DistributedDataParallel model, else this process by itself.

    Raises:
        TypeError: If ``batches`` cannot be iterated, ``num_batches`` is not an int, ``forward`` not a function, or a
            batch is neither a pair nor a mapping.
        ValueError: If ``num_batches`` < 1, or there are no batches.
        RuntimeError: If the statistics are not finite; they are as before then, as after any other error.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> reestimate_batchnorm(model, [(torch.randn(32, 4) + 3, None)], 1)
        >>> [round(float(x), 1) for x in model(torch.randn(10_000, 4) + 3).detach().var(0)]
        [1.0, 1.0]
    """
    model, replicas = find_replicas(model, process_group)
    replicas.check_arguments({"num_batches": num_batches})

    def start() -> BatchStream:
        check_functions(None, forward)
        check_int("num_batches", num_batches)
        return BatchStream(batches, current_seed(), rank=replicas.rank)

    stream = replicas.call(start)
    _reestimate(model, stream, num_batches, forward, replicas)


def _reestimate(
    model: nn.Module, stream: BatchStream, num_batches: int, forward: Forward | None, replicas: Replicas
) -> None:
    layers = _layers(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    before = [{name: x.clone() for name, x in layer.named_buffers(recurse=False)} for layer in layers]
    device = model_device(model)

    def run() -> None:
        for _ in range(num_batches):
            run_model(model, replicas.phase(lambda: move_batch(next(stream), device)), forward)

    with evaluation(model, keep=layers), torch.no_grad():
        try:
            for layer in layers:
                layer.train()
                layer.reset_running_stats()
                layer.momentum = None  # the mean of all batches
            replicas.together(run)
            _average(layers, replicas)
            if not all(torch.isfinite(layer.running_var).all() for layer in layers):
                raise RuntimeError("model: the statistics of BatchNorm are not finite; is the model or its input NaN?")
            for layer, state in zip(layers, before, strict=True):
                if layer.num_batches_tracked == 0:  # not run in eval mode: as it was
                    layer.running_mean.copy_(state["running_mean"])
                    layer.running_var.copy_(state["running_var"])
                layer.num_batches_tracked.copy_(state["num_batches_tracked"])
        except BaseException:
            for layer, state in zip(layers, before, strict=True):
                for name, x in state.items():
                    getattr(layer, name).copy_(x)
            raise
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
            stream.close()


def improve_batchnorm(
    model: nn.Module,
    batches: BatchStream,
    num_batches: int,
    measure: Callable[[], float],
    forward: Forward | None = None,
    replicas: Replicas = ALONE,
) -> float:
    """Re-estimate the statistics, and keep the new ones if they do not raise a loss.

    Args:
        model: See :func:`reestimate_batchnorm`.
        batches: See there.
        num_batches: See there.
        measure: Returns the loss of the model as it is.
        forward: See there.
        replicas: Processes that hold copies of the model.

    Returns:
        The loss with the statistics that stay. After an error they are as before.
    """
    buffers = [(x, x.clone()) for layer in _layers(model) for x in layer.buffers(recurse=False)]
    before, after = measure(), math.nan

    def restore() -> None:
        for x, value in buffers:
            x.copy_(value)

    kept = False
    try:
        _reestimate(model, batches, num_batches, forward, replicas)
        after = measure()
        kept = math.isfinite(after) and not after > before
    finally:
        if not kept:
            with torch.no_grad():
                write_whole(restore)
    if kept:
        return after
    warn(f"batchnorm_batches: new statistics raise the loss from {before:.4g} to {after:.4g}; the old ones stay")
    return before


def _average(layers: Sequence[nn.Module], replicas: Replicas) -> None:
    """Give all ranks the mean of their statistics."""
    for layer in layers if replicas.size > 1 else ():
        for x in (layer.running_mean, layer.running_var):
            x.copy_(replicas.add(x) / replicas.size)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that have running statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _NORMS) and layer.running_mean is not None]
