"""Gradients of batches: :func:`collect_gradients`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfac.checks import check_instance, check_int, warn
from mfac.distributed.models import find_replicas
from mfac.distributed.replicas import ALONE, Replicas
from mfac.distributed.shards import check_all_sharded
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
from mfac.gradients.sharded import ShardedBuffer
from mfac.gradients.stream import BatchStream
from mfac.model.names import shorten
from mfac.model.targets import prunable_parameters
from mfac.progress import progress_bar
from mfac.settings import accepts, definitions

if TYPE_CHECKING:
    from typing_extensions import Unpack


SHARD_UNIT = 512  # columns that stay on one rank where nothing is known of the block size


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
    model, replicas = find_replicas(model, settings["process_group"])
    mode, forward = settings["mode"], settings["forward"]
    given = {name: settings[name] for name in ("params", "exclude", "dtype", "mode", "forward")}
    replicas.check_arguments({"num_grads": num_grads, "buffer": buffer is None, **given})

    def start() -> BatchStream:
        check_functions(loss_fn, forward)
        share = -(-check_int("num_grads", num_grads) // replicas.size)
        return BatchStream(batches, current_seed(), share, replicas.rank)

    stream = replicas.call(start)
    if buffer is None:
        chosen = prunable_parameters(model, settings["params"], settings["exclude"])
        if replicas.lockstep:
            check_all_sharded(chosen)
        check_grads_device("grads_device", settings["grads_device"], next(iter(chosen.values())).device)
        buffer = make_buffer(num_grads, chosen, settings["dtype"], settings["grads_device"], replicas)
    else:
        check_instance("buffer", buffer, GradientBuffer, "a GradientBuffer")
        _check_ranks(buffer, replicas)
        if num_grads > buffer.num_grads:
            raise ValueError(f"num_grads: expected at most the {buffer.num_grads} rows of the buffer, got {num_grads}")
        chosen = prunable_parameters(model, buffer.names)
        if replicas.lockstep:
            check_all_sharded(chosen)
        for name, p in chosen.items():
            check_real(f"model[{name!r}]", p)
        _check_no_conflict(buffer, settings, next(iter(chosen.values())).device)
        buffer.use_names_of(model)
    try:
        append_batches(
            buffer, model, stream, loss_fn, num_grads, chosen, mode=mode, forward=forward,
            progress=settings["progress"] and replicas.rank == 0,
        )  # fmt: skip
    finally:
        stream.close()
    return buffer


def make_buffer(
    num_grads: int, chosen: Mapping[str, Tensor], dtype: Any, device: Any, replicas: Replicas, unit: int = SHARD_UNIT
) -> GradientBuffer:
    """Return an empty buffer, spread over the ranks if there are several.

    Args:
        num_grads: See :class:`GradientBuffer`.
        chosen: See there.
        dtype: See there.
        device: See there.
        replicas: The ranks.
        unit: See :class:`~mfac.gradients.sharded.ShardedBuffer`.

    Returns:
        The buffer.
    """
    if replicas.size == 1:
        return GradientBuffer(num_grads, chosen, dtype, device)
    return ShardedBuffer(num_grads, chosen, replicas, unit, dtype, device)


def _check_ranks(buffer: GradientBuffer, replicas: Replicas) -> None:
    """Check that a buffer is spread over the processes that fill it."""
    found = buffer.replicas if isinstance(buffer, ShardedBuffer) else ALONE
    if found.size != replicas.size:
        raise ValueError(
            f"buffer: expected one that collect_gradients made for {replicas.size} processes, got one of {found.size}"
        )
    if not found.matches(replicas):
        raise ValueError(
            "buffer: expected one that collect_gradients made for the same processes and kind of model (sharded or "
            "replicated), got one of others; a new one is needed"
        )


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
    rows: list[tuple[float, float]] = []
    skipped, first = buffer.skipped, not buffer.reached
    compared = not first  # of a buffer that has rows the first ones were compared
    replicated = isinstance(buffer, ShardedBuffer) and not buffer.replicas.lockstep
    differentiate = Differentiator(model, params, replicated)
    replicas = buffer.replicas if isinstance(buffer, ShardedBuffer) else ALONE

    def gradient() -> tuple[Sequence[Tensor | None], float, float]:
        nonlocal first
        batch = replicas.phase(lambda: move_batch(next(batches), device))
        losses = partial(_checked_loss, model, batch, loss_fn, forward)
        loss, grads = differentiate(lambda: replicas.phase(losses))
        if first:
            _check_reached([name for name, grad in zip(buffer.names, grads, strict=True) if grad is None], buffer)
            first = False
        return grads, float(loss.detach()), num_samples(batch)

    def skip() -> None:
        next(batches)  # so that all ranks are at the same place, which one of them may save for all

    with (
        evaluation(model, params, mode, seed),
        progress_bar(progress, "gradients", num_grads) as bar,
    ):
        while len(rows) < num_grads:
            new = buffer.append_round(gradient, num_grads - len(rows), skip)
            rows += new
            bar.update(len(new))
            if not compared and len(new) > 1:
                compared = True
                _warn_of_equal_batches([loss for loss, _ in new])
            if not new and buffer.skipped - skipped >= max(num_grads, 16):
                raise ValueError(
                    f"batches: expected finite gradients, got {buffer.skipped - skipped} with NaN or infinity and "
                    f"{len(rows)} finite ones; is the model or its input NaN?"
                )
    buffer.agree()
    buffer.loss, buffer.samples = (sum(column) / num_grads for column in zip(*rows, strict=True))


def _warn_of_equal_batches(losses: Sequence[float]) -> None:
    """Warn if the first batch of every rank has the same loss, which is no chance."""
    if len(set(losses)) == 1:
        warn(
            f"batches: the first batches of {len(losses)} ranks have the same loss, so each rank seems to get the same "
            "batches, which makes no more of them; use a DistributedSampler"
        )


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
            "stay dense (criterion='magnitude' prunes them)"
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
    replicas: Replicas = ALONE,
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
        replicas: Ranks that may run the model together.

    Returns:
        The loss of each batch.
    """
    device = model_device(model)

    def loss() -> float:
        batch = replicas.phase(lambda: move_batch(next(batches), device))
        return replicas.phase(lambda: float(batch_loss(model, batch, loss_fn, forward)))

    with evaluation(model, (), mode, seed), torch.no_grad():
        return [loss() for _ in range(num_batches)]
