"""Recomputations: steps and corrections of one model, with new gradients at each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from mfac.fisher import Fisher
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.source import GradientSource
from mfac.progress import progress_bar
from mfac.pruning.auto import NUM_JUDGES, Candidate
from mfac.pruning.correction import Descent
from mfac.pruning.engine import Engine, split_evenly
from mfac.pruning.quadratic import timed
from mfac.pruning.result import PruneResult, PruneStep
from mfac.pruning.schedule import interpolate_sparsities, num_recomputations
from mfac.pruning.selection import Sparsities

_log = logging.getLogger("mfac")


def run(
    engine: Engine,
    grads: GradientSource | GradientBuffer | None,
    sparsities: Sparsities,
    recomputations: int | str,
    *,
    began: Sparsities | None = None,
    finish: Callable[[], float] | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune in R steps at equal ratios of the remaining weights, with new gradients at each.

    Args:
        engine: The model, its masks and settings.
        grads: Where gradients come from; a buffer serves for all steps, and there are no corrections then.
        sparsities: Key -> sparsity at the end.
        recomputations: R, or ``"auto"``; with a buffer, whose gradients stay the same, that is 1.
        began: Key -> sparsity from which this began, if it was interrupted since; ``update="auto"`` goes by it.
        finish: Called after the last step; returns the loss then.
        progress: Show progress bars.

    Returns:
        The result of the last step, with all steps of this run; also ``engine.result``.

    Raises:
        BaseException: Whatever a step, the model or the batches raise, with the result so far as ``error.result``. The
            model is pruned as far as the masks say: call again to go on.
    """
    engine.apply_masks()
    start, origin = time.perf_counter(), dict(engine.reached)
    engine.result = None
    engine.settings = engine.with_update(origin if began is None else began, sparsities)
    if not engine.takes_gradients(engine.settings["update"]):
        grads = None
    if recomputations == "auto":
        recomputations = num_recomputations(origin, sparsities) if isinstance(grads, GradientSource) else 1
    if began is not None and origin == sparsities:  # all is pruned, and a correction is left to make
        recomputations = 1
    state = _Run(engine, grads, progress)
    final = engine.given["final_corrections"] if state.parts else 0
    try:
        state.announce(recomputations, sparsities)
        with progress_bar(progress, "pruning", recomputations + final, leave=True) as bar:
            for r in range(1, recomputations + 1):
                state.step(sparsities, interpolate_sparsities(origin, sparsities, r / recomputations))
                state.show(bar)
            for _ in range(final):
                state.correct_again()
                state.show(bar)
        if finish is not None:
            state.steps[-1].loss_after = finish()
    except BaseException as error:
        engine.leave_result(error, state.steps)
        raise
    finally:
        engine.settings = engine.given
        engine.release()
    state.seconds["total"] = time.perf_counter() - start
    return engine.result


class _Run:
    """What has been done so far.

    Attributes:
        parts: New gradients of a step after the first, in the order in which they come; empty without corrections.
    """

    def __init__(self, engine: Engine, grads: GradientSource | GradientBuffer | None, progress: bool) -> None:
        self.engine, self.grads, self.progress = engine, grads, progress
        self.steps: list[PruneStep] = []
        self.candidates: list[Candidate] = []
        self.seconds: dict[str, float] = {"gradients": 0.0}
        self.parts: list[int] = []
        self._ahead = 0  # gradients to be collected
        self._descent = Descent()
        if isinstance(grads, GradientSource) and engine.corrections:
            self.parts = split_evenly(grads.refresh, engine.corrections)

    def announce(self, recomputations: int, sparsities: Sparsities) -> None:
        """Log what is going to be done and, if an earlier run has shown it, how long it takes."""
        engine, source = self.engine, self.grads
        end = engine.selection.overall(sparsities)
        text = f"pruning from {100 * engine.sparsity:.1f} % to {100 * end:.1f} %"
        if isinstance(source, GradientSource):
            self._ahead = engine.num_backward_passes(
                source.num_grads, source.refresh, recomputations, engine.corrections
            )
            text += f" in {recomputations} recomputations, from {self._ahead} gradients"
            if source.seconds is not None:
                text += f", in about {self._ahead * source.seconds:.0f} s for the gradients"
            if engine.settings["update"] == "none":
                text += "; the other weights stay as they are"
        _log.info(text)

    def _collect(self, count: int | None = None) -> tuple[GradientBuffer | None, int]:
        """Return the gradients, and how many are new."""
        if not isinstance(self.grads, GradientSource):
            return self.grads, 0 if self.grads is None else len(self.grads)
        first = self.grads.seconds is None
        with timed(self.seconds, "gradients"):
            buffer = self.grads.collect(self.engine.model, self.engine.names, self.progress, count)
        if self.steps:
            self.steps[-1].loss_after = buffer.loss
            return buffer, self.grads.refresh if count is None else count
        ahead = self._ahead - self.grads.num_grads
        if ahead and first:
            _log.info(
                "%d gradients took %.0f s; about %.0f s for the other %d",
                self.grads.num_grads, self.seconds["gradients"], ahead * self.grads.seconds, ahead,
            )  # fmt: skip
        return buffer, self.grads.num_grads

    def _correct(self, buffer: GradientBuffer, newest: int) -> float:
        """Return the step length."""
        with timed(self.seconds, "corrections"):
            measure = self.grads.hold(self.engine.model, self.engine.settings["correction_batches"])
            done = self.engine.correct(buffer, measure, newest, self._descent, self.progress)
        self.steps[-1].loss_after = done.loss_after
        self.engine.result.step_length = done.step_length
        return done.step_length

    def step(self, end: Sparsities, sparsities: Sparsities) -> None:
        """Make one step: new gradients, in parts with corrections between them, the pruning step, and a correction."""
        start, engine, fresh, steps = time.perf_counter(), self.engine, 0, self.steps
        for count in self.parts[:-1] if steps else ():
            buffer, new = self._collect(count)
            fresh += new
            self._correct(buffer, new)
        buffer, newest = self._collect(self.parts[-1] if self.parts and steps else None)
        if not steps and buffer is not None and engine.chooses:
            with timed(self.seconds, "settings"):
                # A loss tells about the step that is made, and little about one of many.
                judge = sparsities == end and isinstance(self.grads, GradientSource)
                measure = self.grads.hold(engine.model, NUM_JUDGES) if judge else None
                fisher, self.candidates = engine.choose(buffer, end, measure, self.progress)
                engine.settings = _with_chosen(engine.settings, fisher)
        result = engine.step(buffer, sparsities)
        for stage, value in result.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        steps.append(PruneStep.of(result, buffer, fresh + newest))
        result.steps, result.candidates, result.seconds = steps, self.candidates or result.candidates, self.seconds
        if self.parts and buffer is not None:
            steps[-1].step_length = self._correct(buffer, newest)
        steps[-1].seconds = time.perf_counter() - start

    def correct_again(self) -> None:
        """Make one more correction, with new gradients."""
        start = time.perf_counter()
        buffer, newest = self._collect(self.parts[-1])
        self.steps.append(PruneStep.of(self.engine.result, buffer, newest, pruned=False))
        self.steps[-1].step_length = self._correct(buffer, newest)
        self.steps[-1].seconds = time.perf_counter() - start

    def show(self, bar: Any) -> None:
        """Move the progress bar on by one step."""
        last = self.steps[-1]
        loss = last.loss_before if math.isnan(last.loss_after) else last.loss_after
        bar.set_postfix(sparsity=f"{last.sparsity:.1%}", loss=f"{loss:.3f}", refresh=False)
        bar.update()


def _with_chosen(settings: dict[str, Any], fisher: Fisher) -> dict[str, Any]:
    """Return the settings with what "auto" has chosen in its place, damping relative to the gradients."""
    settings = {**settings, "block_size": fisher.block_size}
    if settings["damping"] == "auto":
        settings["damping"] = f"{fisher.damping / fisher.mean_square!r}*mean"
    return settings
