"""Gradients of batches: :func:`collect_gradients`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfac.checks import check_instance, check_int, warn
from mfac.gradients.arguments import check_grads_device, check_real
from mfac.gradients.backward import Differentiator
from mfac.gradients.batches import (
    Forward,
    batch_loss,
    check_functions,
    evaluation,
    model_device,
    move_batch,
    num_samples,
)
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.seeds import current_seed
from mfac.gradients.settings import CollectSettings
from mfac.gradients.stream import BatchStream
from mfac.model.distributed import refuse_distributed
from mfac.model.names import shorten
from mfac.model.targets import prunable_parameters
from mfac.progress import progress_bar
from mfac.settings import accepts, definitions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@accepts(CollectSettings)
def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    num_grads: int = 256,
    *,
    buffer: GradientBuffer | None = None,
    **settings: Unpack[CollectSettings],
) -> GradientBuffer:
    """Collect one gradient per batch, with the model in eval mode unless ``mode`` says otherwise.

    Batches of some 32 samples give far better joint updates than single samples. The model's modes, requires_grad,
    ``.grad``, buffers and the random states of torch, random and numpy are as before when this returns or raises. So a
    loader that shuffles gives the same batches again at the next call, unless torch's random state has moved on in
    between; pass an iterator (kept between the calls) to go on where you stopped. A DataLoader is cloned, not iterated:
    an epoch of training under way goes on as if nothing had happened, unless there is a warning that the loader or its
    sampler cannot be cloned (see :class:`mfac.gradients.stream.BatchStream`).

    Args:
        model: Any module.
        batches: Iterable of ``(inputs, targets)``, for ``loss_fn(model(inputs), targets)``, or of mappings, for
            ``loss_fn(model(**batch), batch)``. Inputs and targets may be trees of lists, tuples and dicts; all tensors
            are moved to the device of the model's first parameter. One that ends before ``num_grads`` batches is
            started again, with a warning.
        loss_fn: Returns a scalar. None for a model whose outputs have the loss, as ``outputs.loss`` or
            ``outputs["loss"]``.
        num_grads: m, the number of gradients, >= 1.
        buffer: A buffer to go on with: its oldest rows are overwritten. In place of ``params``, ``exclude``, ``dtype``
            and ``grads_device``.
        settings: How; each is described below.

    Returns:
        The buffer, with ``num_grads`` new rows. Gradients that are not finite are replaced by those of further
        batches and counted in ``skipped``; ``unreached`` lists the parameters that no batch had a gradient for, about
        which there is a warning after the first batch. Interrupted, a buffer that was given holds the rows so far.

    Raises:
        TypeError: If ``model`` is not a module, ``batches`` cannot be iterated, ``loss_fn`` or ``forward`` called, a
            batch is neither a pair nor a mapping and there is no ``forward``, there is no loss or it is not a
            tensor, or a parameter is complex or of integers.
        ValueError: If the model is one of several processes, ``num_grads`` < 1 or more than ``buffer`` has rows, a
            setting contradicts ``buffer``,
            ``batches`` is empty or an iterator that ends early, the loss is not a scalar, as many gradients are not
            finite as were asked for, or the loss of the first batch depends on none of the parameters.
        MemoryError: If the gradients do not fit; the message says what would.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(16)]
        >>> collect_gradients(model, batches, torch.nn.functional.cross_entropy, 16, progress=False).shape
        (16, 8)
    """
    refuse_distributed(model)
    mode, forward = settings["mode"], settings["forward"]
    check_functions(loss_fn, forward)
    num_grads = check_int("num_grads", num_grads)
    stream = BatchStream(batches, current_seed(), announce=num_grads)
    if buffer is None:
        chosen = prunable_parameters(model, settings["params"], settings["exclude"])
        check_grads_device("grads_device", settings["grads_device"], next(iter(chosen.values())).device)
        buffer = GradientBuffer(num_grads, chosen, settings["dtype"], settings["grads_device"])
    else:
        check_instance("buffer", buffer, GradientBuffer, "a GradientBuffer")
        if num_grads > buffer.num_grads:
            raise ValueError(f"num_grads: expected at most the {buffer.num_grads} rows of the buffer, got {num_grads}")
        chosen = prunable_parameters(model, buffer.names)
        for name, p in chosen.items():
            check_real(f"model[{name!r}]", p)
        _check_no_conflict(buffer, settings, next(iter(chosen.values())).device)
        buffer.use_names_of(model)
    try:
        append_batches(
            buffer, model, stream, loss_fn, num_grads, chosen, mode=mode, forward=forward,
            progress=settings["progress"],
        )  # fmt: skip
    finally:
        stream.close()
    return buffer


def _check_no_conflict(buffer: GradientBuffer, settings: Mapping[str, Any], home: torch.device) -> None:
    """Check that no setting contradicts the buffer; one that has its default value was not given."""
    for name in ("params", "exclude"):
        if settings[name] is not None:
            raise ValueError(f"{name}: expected None with a buffer, which has its own, got {settings[name]!r}")
    if settings["dtype"] not in (definitions(CollectSettings)["dtype"].default, buffer.dtype):
        raise ValueError(f"dtype: expected {buffer.dtype}, that of the buffer, got {settings['dtype']}")
    device = settings["grads_device"]
    if device is not None and check_grads_device("grads_device", device, home) != buffer.storage:
        raise ValueError(f"grads_device: expected None or {buffer.storage}, that of the buffer, got {device!r}")


def append_batches(
    buffer: GradientBuffer,
    model: nn.Module,
    batches: Iterator[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
    num_grads: int,
    chosen: Mapping[str, nn.Parameter],
    *,
    mode: str = "eval",
    forward: Forward | None = None,
    progress: bool = False,
    seed: int | None = None,
) -> None:
    """Append the gradients of batches to a buffer, with arguments that have been checked.

    Args:
        buffer: For the parameters chosen.
        model: Any module.
        batches: An iterator that does not end.
        loss_fn: Loss of (outputs, targets), or None if the outputs have it.
        num_grads: Rows to append.
        chosen: Name to parameter.
        mode: ``"eval"`` or ``"train"``.
        forward: Function of (model, batch), or None.
        progress: Show a progress bar.
        seed: Of what the model draws at random; None: it goes on from torch's random state.

    Raises:
        ValueError: If too many gradients are not finite, the loss is constant, or the first batch reaches none of the
            parameters of an empty buffer.
    """
    params, device = [chosen[name] for name in buffer.names], model_device(model)
    losses, samples, skipped, first = [], [], buffer.skipped, not buffer.reached
    differentiate = Differentiator(model, params)
    with (
        evaluation(model, params, mode, seed),
        progress_bar(progress, "gradients", num_grads) as bar,
    ):
        while len(losses) < num_grads:
            batch = move_batch(next(batches), device)
            loss, grads = differentiate(partial(_checked_loss, model, batch, loss_fn, forward))
            if first:
                _check_reached([name for name, grad in zip(buffer.names, grads, strict=True) if grad is None], buffer)
                first = False
            if buffer.append_gradients(grads):
                losses.append(float(loss.detach()))
                samples.append(num_samples(batch))
                bar.update()
            elif buffer.skipped - skipped >= max(num_grads, 16):
                raise ValueError(
                    f"batches: expected finite gradients, got {buffer.skipped - skipped} with NaN or infinity and "
                    f"{len(losses)} finite ones; is the model or its input NaN?"
                )
    buffer.loss, buffer.samples = sum(losses) / num_grads, sum(samples) / num_grads


def _checked_loss(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None, forward: Forward | None
) -> Tensor:
    loss = batch_loss(model, batch, loss_fn, forward)
    if not loss.requires_grad:
        raise ValueError("loss_fn: expected a loss that depends on the parameters, got a constant (detached?) one")
    return loss


def _check_reached(missing: list[str], buffer: GradientBuffer) -> None:
    if len(missing) == len(buffer.names):
        raise ValueError(f"params: expected parameters that the loss depends on, got {shorten(missing)}")
    if missing:
        warn(
            f"params: the loss of the first batch does not reach {shorten(missing)}; weights that no batch reaches "
            "stay dense"
        )


def batch_losses(
    model: nn.Module,
    batches: Iterator[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
    num_batches: int,
    *,
    mode: str = "eval",
    forward: Forward | None = None,
    seed: int | None = None,
) -> list[float]:
    """Measure losses; the model and the random state are as before afterwards.

    Args:
        model: Any module.
        batches: An iterator that does not end.
        loss_fn: Loss of (outputs, targets), or None if the outputs have it.
        num_batches: How many to draw.
        mode: ``"eval"`` or ``"train"``.
        forward: Function of (model, batch), or None.
        seed: Of what the model draws at random; None: it goes on from torch's random state.

    Returns:
        The loss of each batch.
    """
    device = model_device(model)
    with evaluation(model, (), mode, seed), torch.no_grad():
        return [
            float(batch_loss(model, move_batch(next(batches), device), loss_fn, forward)) for _ in range(num_batches)
        ]
