"""Predicted loss over sparsity and time, from one set of gradients and without touching the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfac.checks import check_sparsity
from mfac.distributed.shards import has_shards
from mfac.extras import install_hint
from mfac.gradients.buffer import GradientBuffer
from mfac.model.targets import prunable_parameters
from mfac.progress import progress_bar
from mfac.pruning.engine import Engine
from mfac.pruning.masks import flatten_masks
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.result import write_csv
from mfac.pruning.settings import MethodSettings
from mfac.settings import accepts
from mfac.sparse.convert import convert

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class FrontierPoint:
    """One point of a :class:`Frontier`.

    Attributes:
        pattern: As given.
        target: Sparsity as given.
        sparsity: Reached, over all chosen parameters.
        predicted_loss_increase: ½ δᵀFδ of the step that leads there, to compare points by: gradients of batches give
            about the loss divided by the samples of a batch, and far from the dense model the loss rises faster.
        milliseconds: Time of the model with these zeros, converted by :func:`mfac.sparse.convert`; None if there were
            no ``example_inputs``.
    """

    pattern: str
    target: float
    sparsity: float
    predicted_loss_increase: float
    milliseconds: float | None = None


@dataclass(frozen=True)
class Frontier:
    """What :func:`frontier` found; ``print`` shows it as a table.

    Attributes:
        points: In the order of patterns, then sparsities.
        damping: λ.
        block_size: B.
        dense_milliseconds: Time of the dense model; None if there were no ``example_inputs``.
    """

    points: list[FrontierPoint]
    damping: float
    block_size: int
    dense_milliseconds: float | None = None

    def __str__(self) -> str:
        """Return the table."""
        width = max(len("pattern"), *(len(point.pattern) for point in self.points))
        lines = [f"{'pattern':<{width}} {'target':>8} {'sparsity':>9} {'predicted loss increase':>24}"]
        for point in self.points:
            lines.append(
                f"{point.pattern:<{width}} {point.target:>8.2%} {point.sparsity:>9.2%} "
                f"{point.predicted_loss_increase:>24.4g}"
            )
        if self.dense_milliseconds is not None:
            lines[0] += f" {'ms':>9}"
            for index, point in enumerate(self.points, 1):
                lines[index] += f" {point.milliseconds:>9.2f}"
            lines.append(f"dense: {self.dense_milliseconds:.2f} ms")
        return "\n".join(lines)

    def to_csv(self, path: str | Path) -> None:
        """Write the points as a CSV file, a row each.

        Args:
            path: The file.
        """
        write_csv(path, FrontierPoint, self.points)

    def plot(self, path: str | Path) -> None:
        """Draw predicted loss increase over sparsity and, if it was measured, over time, a line per pattern.

        Args:
            path: The image to write.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(install_hint("matplotlib", "demo")) from error
        timed = self.dense_milliseconds is not None
        figure = Figure(figsize=(12 if timed else 7, 4.5), dpi=150, layout="constrained")
        every = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
        for axes, label in zip(every, ("sparsity, %", "time, ms"), strict=False):
            for pattern in dict.fromkeys(point.pattern for point in self.points):
                mine = [point for point in self.points if point.pattern == pattern]
                xs = [100 * p.sparsity if axes is every[0] else p.milliseconds for p in mine]
                axes.plot(xs, [p.predicted_loss_increase for p in mine], "o-", label=pattern)
            axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        if timed:
            every[1].axvline(self.dense_milliseconds, color="#444444", ls=":", label="dense")
        every[0].set_ylabel("predicted loss increase ½ δᵀFδ")
        every[-1].legend()
        figure.savefig(path)


@accepts(MethodSettings)
def frontier(
    model: nn.Module,
    grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]],
    sparsities: Iterable[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    patterns: Iterable[str | Sequence[int]] = ("unstructured",),
    example_inputs: Any = None,
    **settings: Unpack[MethodSettings],
) -> Frontier:
    """Predict what pruning costs, over sparsities and patterns, from one set of gradients; the model is not touched.

    Each point is the step that :func:`prune_step` would make. The quadratic model is good for small steps: it tells
    patterns and sparsities apart, and falls short of the loss itself far out. Gradients of batches of n samples make
    the prediction n times too small, everywhere alike. ``"auto"`` chooses once, for the first pattern at its highest
    sparsity.

    Args:
        model: Any module.
        grads: See :func:`prune_step`.
        sparsities: Sparsities in [0, 1]. For a pattern that allows less (2:4 allows 0.5), those above are left out.
        patterns: See ``pattern`` of :func:`prune_step`.
        example_inputs: What the model will get, with the batch size that it will have, as for
            :func:`mfac.sparse.convert`: the time of each point is measured on this machine's CPU, some seconds each.
        settings: The fields of :class:`MethodSettings`.

    Returns:
        The points.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value is wrong, there are no gradients, or no sparsity is within what a pattern allows.

    Example:
        >>> import torch
        >>> points = frontier(nn.Linear(8, 8), torch.randn(16, 64), [0.25, 0.5], ["unstructured", "2:4"]).points
        >>> [(point.pattern, point.sparsity) for point in points]
        [('unstructured', 0.25), ('unstructured', 0.5), ('2:4', 0.25), ('2:4', 0.5)]
    """
    if grads is None:
        raise ValueError("grads: expected gradients, got None")
    if example_inputs is not None and has_shards(model):
        raise ValueError(
            "example_inputs: expected None for a sharded model, of which no process has a whole one to time"
        )
    patterns, sparsities = [patterns] if isinstance(patterns, str) else list(patterns), list(sparsities)
    wanted = sorted({check_sparsity("sparsities", sparsity) for sparsity in sparsities})
    plan: list[tuple[str | Sequence[int], list[float]]] = []
    for pattern in patterns:
        parsed = parse_pattern(pattern)
        within = [sparsity for sparsity in wanted if parsed.allows(sparsity)]
        if not within:
            raise ValueError(f"sparsities: expected some up to {parsed.max_sparsity:g} for {parsed.name}, got {wanted}")
        plan.append((pattern, within))
    if not plan:
        raise ValueError("patterns: expected at least one, got none")
    (pattern, within), points = plan[0], []
    names = grads.names if isinstance(grads, GradientBuffer) else None
    engine = Engine(model, within[-1], {**settings, "pattern": pattern}, names)
    engine.replicas.check_arguments({"sparsities": sparsities, "patterns": patterns})
    engine.warn_of_zeros()
    selections = [engine.selection_for(pattern) for pattern, _ in plan]
    for selection, (_, within) in zip(selections, plan, strict=True):
        selection.check_sparsities(dict.fromkeys(engine.sparsities, within[-1]))
        selection.check_reached(flatten_masks(engine.masks, engine.params), dict.fromkeys(engine.sparsities, within[0]))
    fisher, _ = engine.choose(grads, engine.sparsities, progress=engine.settings["progress"])
    dense, milliseconds = None, None
    total = sum(len(within) for _, within in plan)
    with progress_bar(engine.settings["progress"], "frontier", total) as bar:
        for selection, (_, within) in zip(selections, plan, strict=True):
            for target in within:
                weights, kept, loss = engine.predict(grads, fisher, dict.fromkeys(engine.sparsities, target), selection)
                if example_inputs is not None:
                    report = convert(_with_weights(engine, weights), example_inputs).sparse_report
                    milliseconds, dense = report.fast_ms, min(report.dense_ms, dense or report.dense_ms)
                sparsity = 1 - int(kept.sum()) / len(kept)
                points.append(FrontierPoint(selection.pattern.name, target, sparsity, loss, milliseconds))
                bar.update()
    return Frontier(points, fisher.damping, fisher.block_size, dense)


def _with_weights(engine: Engine, weights: Tensor) -> nn.Module:
    """Return a copy of the model on the CPU that has these weights."""
    model = copy.deepcopy(engine.model).cpu()
    params = prunable_parameters(model, engine.names)
    with torch.no_grad():
        for p, new in zip(params.values(), weights.split([p.numel() for p in params.values()]), strict=True):
            p.copy_(new.view_as(p))
    return model
