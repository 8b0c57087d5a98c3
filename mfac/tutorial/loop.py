"""Train and measure: one loop for dense training and for training under a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mfac.distributed.replicas import ALONE, Replicas
from mfac.gradients.batches import evaluation
from mfac.progress import progress_bar
from mfac.pruning.gradual import no_unfinished_warning
from mfac.pruning.result import PruneResult
from mfac.tutorial.data import Batches, Data
from mfac.tutorial.processes import share_buffers, undistributed


class Stepper(Protocol):
    """What goes along with training: a recipe's Session, or a learning rate schedule."""

    sparsity: float

    def step(self, epoch: float) -> list[PruneResult]:
        """Act after an optimizer step; `epoch` is the training done so far."""


@dataclass(frozen=True)
class Measurement:
    """Loss and accuracy at one point of training."""

    step: int  # optimizer steps done
    epoch: float  # the same in epochs
    pruned: bool  # a pruning step was taken right before
    train_loss: float  # mean since the last measurement; NaN if there was no step in between
    loss: float  # on the validation images, as the next two
    top1: float  # per cent
    top5: float  # per cent
    sparsity: float  # share of zeros in the weights that the recipe prunes
    learning_rate: float
    pruning_seconds: float = 0.0  # of a pruning step right before, its gradients included
    seconds: float = 0.0  # of training and pruning so far, without measuring


def evaluate(model: nn.Module, batches: Batches, replicas: Replicas = ALONE) -> tuple[float, float, float]:
    """Measure a model in eval mode; the mode of its modules is as before afterwards, also after an error.

    Args:
        model: Gives logits, shape [n, classes].
        batches: The validation images and targets; of several processes, the part of this one.
        replicas: Processes that have the same model: the buffers of the first become those of all.

    Returns:
        Mean cross entropy, top-1 and top-5 accuracy in per cent, the same in all processes.
    """

    def measured() -> tuple[float, int, int, int]:
        loss, top1, top5, count = 0.0, 0, 0, 0
        for images, targets in batches:
            logits = model(images)
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            top1 += hits[:, 0].sum().item()
            top5 += hits.sum().item()
            count += len(targets)
        return loss, top1, top5, count

    share_buffers(model, replicas)
    with evaluation(model), torch.inference_mode():
        loss, top1, top5, count = replicas.sums(measured, 4)
    return loss / count, 100 * top1 / count, 100 * top5 / count


def _fetched(batches: Iterable[Any], replicas: Replicas) -> Iterator[Any]:
    """Yield this process's batches; what one process raises, all of them raise."""
    iterator, batch = iter(batches), None

    def fetch() -> None:
        nonlocal batch
        batch = next(iterator, None)

    while True:
        replicas.together(fetch)
        if batch is None:
            return
        yield batch


@no_unfinished_warning()
def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stepper: Stepper,
    data: Data,
    epochs: float,
    *,
    first_epoch: int = 0,
    max_train_steps: int = -1,
    amp: bool = False,
    measure_every: int | None = None,
    on_epoch: Callable[[int, Measurement], None] | None = None,
    report: Callable[[str], None] = tqdm.write,
    progress: bool = True,
    measurements: list[Measurement] | None = None,
    seconds: float = 0.0,
) -> list[Measurement]:
    """Train, and measure at the end of every epoch and after every pruning step.

    Args:
        model: The model; one in DistributedDataParallel is trained by its processes together.
        optimizer: Its optimizer.
        stepper: A recipe's Session, or a learning rate schedule; called after every optimizer step.
        data: The dataset.
        epochs: The length of training; may end within an epoch.
        first_epoch: The epoch to start with (0 unless training goes on from a checkpoint).
        max_train_steps: Optimizer steps per epoch at most; -1: all.
        amp: Train under autocast to bfloat16; gradients for pruning and measurements stay in float32.
        measure_every: Measure also after every so many steps, and before the last step of all epochs but the last.
        on_epoch: Called with the number of the epoch and its last measurement.
        report: Takes a line of text for each pruning step and each epoch.
        progress: Show progress: a bar on a terminal, a line now and then elsewhere.
        measurements: A list to append the measurements to as they are made.
        seconds: Seconds of training and pruning before this call, of a resumed run.

    Returns:
        The measurements in order.

    Raises:
        RuntimeError: If the loss is not finite.
    """
    trained, (model, replicas) = model, undistributed(model)
    progress = progress and replicas.rank == 0
    steps = len(data.train) if max_train_steps < 0 else min(len(data.train), max_train_steps)
    measurements = [] if measurements is None else measurements
    sparsity = stepper.sparsity
    losses: list[float] = []
    began, measuring = time.perf_counter() - seconds, 0.0

    def measure(done: int, now: float, pruned: bool, pruning: float = 0.0) -> Measurement:
        nonlocal measuring, sparsity
        sparsity = stepper.sparsity
        start = time.perf_counter()
        spent = start - began - measuring
        train_loss = sum(losses) / len(losses) if losses else math.nan
        losses.clear()
        rate = optimizer.param_groups[0]["lr"]
        accuracy = evaluate(model, data.validation, replicas)
        measurements.append(Measurement(done, now, pruned, train_loss, *accuracy, sparsity, rate, pruning, spent))
        measuring += time.perf_counter() - start
        return measurements[-1]

    for epoch in range(first_epoch, math.ceil(epochs)):
        model.train()
        data.start_epoch(epoch)
        bar = progress_bar(progress, f"epoch {epoch}", steps)
        for index, (images, targets) in zip(range(steps), _fetched(data.train, replicas), strict=False):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(trained(images).float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            (mean,) = replicas.sums(lambda loss=loss: (loss.item() / replicas.size,), 1)
            losses.append(mean)
            if not math.isfinite(mean):
                got = f"{mean} in epoch {epoch}"
                raise RuntimeError(f"loss: expected a finite number, got {got}; try a smaller learning rate")
            done, now = epoch * steps + index + 1, epoch + (index + 1) / steps
            start = time.perf_counter()
            results = stepper.step(now)
            if results:
                sparsity = stepper.sparsity
                pruning = time.perf_counter() - start
                after = measure(done, now, True, pruning)
                report(
                    f"epoch {now:.2f}: pruned to {100 * sparsity:.2f} % in {pruning:.1f} s; loss {after.loss:.4f}, "
                    f"top-1 {after.top1:.1f} %"
                )
            elif measure_every and (done % measure_every == 0 or (index == steps - 2 and now + 1 < epochs)):
                measure(done, now, False)
            bar.set_postfix(loss=f"{mean:.3f}", sparsity=f"{100 * sparsity:.1f} %", refresh=False)
            bar.update()
            if now >= epochs:
                break
        bar.close()
        last = measurements[-1] if measurements and measurements[-1].step == done else measure(done, now, False)
        report(f"epoch {epoch} done: loss {last.loss:.4f}, top-1 {last.top1:.1f} %, sparsity {100 * sparsity:.2f} %")
        if on_epoch is not None:
            on_epoch(epoch, last)
    return measurements
