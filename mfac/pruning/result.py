"""What pruning did: masks, settings, losses, times; as a table, JSON or CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mfac.pruning.quadratic import Candidate


@dataclass(frozen=True)
class PruneStep:
    """One of the steps of :func:`mfac.prune`.

    Attributes:
        sparsity: Share of zeros after it.
        damping: λ.
        block_size: B.
        new_gradients: How many gradients were collected for it.
        loss_before: Mean loss of the batches that gave those, in eval mode.
        predicted_loss_increase: ½ δᵀFδ, times the samples of a batch, by which gradients of batches fall short.
        loss_after: Mean loss of the batches that gave the next ones, or were drawn for this after the last step.
        seconds: Wall time, gradients included.
    """

    sparsity: float
    damping: float | None
    block_size: int | None
    new_gradients: int
    loss_before: float
    predicted_loss_increase: float | None
    loss_after: float
    seconds: float


@dataclass(repr=False)
class PruneResult:
    """What :func:`mfac.prune_step` or :func:`mfac.prune` did; ``print`` shows it as a table.

    Attributes:
        masks: Name to bool tensor of the parameter's shape, True = kept.
        sparsity: Share of zeros that the masks hold, over all chosen parameters.
        layers: (name, weights, weights kept) of every parameter.
        predicted_loss_increase: ½ δᵀFδ of the whole step (of the last one, after ``prune``); None without gradients.
        damping: λ that was used (last); None without gradients.
        block_size: B that was used (last); None without gradients.
        candidates: Settings that ``"auto"`` tried, with their scores.
        steps: Those of :func:`mfac.prune`; empty after a single ``prune_step``.
        seconds: Wall time by stage.
        backend: ``"compiled"`` or ``"reference"``.
    """

    masks: dict[str, Tensor]
    sparsity: float
    layers: list[tuple[str, int, int]]
    predicted_loss_increase: float | None = None
    damping: float | None = None
    block_size: int | None = None
    candidates: list[Candidate] = field(default_factory=list)
    steps: list[PruneStep] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    backend: str = "compiled"

    def __str__(self) -> str:
        """Return the table."""
        width = max(len("layer"), *(len(name) for name, _, _ in self.layers))
        total, kept = sum(n for _, n, _ in self.layers), sum(k for _, _, k in self.layers)
        lines = [f"{'layer':<{width}} {'weights':>12} {'kept':>12} {'sparsity':>9}"]
        for name, n, k in [*self.layers, ("all", total, kept)]:
            lines.append(f"{name:<{width}} {n:>12,} {k:>12,} {1 - k / n:>9.2%}")
        if self.steps:
            lines.append(
                f"{'step':>4} {'sparsity':>9} {'new gradients':>14} {'loss':>8} {'predicted':>10} {'after':>8}"
            )
        for i, step in enumerate(self.steps, 1):
            predicted = "" if step.predicted_loss_increase is None else f"+{step.predicted_loss_increase:.4f}"
            lines.append(
                f"{i:>4} {step.sparsity:>9.2%} {step.new_gradients:>14} {step.loss_before:>8.4f} {predicted:>10} "
                f"{step.loss_after:>8.4f}"
            )
        if self.predicted_loss_increase is not None and not self.steps:
            lines.append(f"predicted loss increase {self.predicted_loss_increase:.4g}")
        if self.damping is not None:
            tried = f", chosen among {len(self.candidates)}" if self.candidates else ""
            lines.append(f"damping {self.damping:.2e}, block size {self.block_size}{tried}")
        lines.append(", ".join(f"{stage} {s:.3f} s" for stage, s in self.seconds.items()) + f" ({self.backend})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return one line."""
        return f"PruneResult(sparsity={self.sparsity:.4f}, layers={len(self.layers)}, backend={self.backend!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the masks, as plain numbers, strings, lists and dicts."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "masks"}
        out["layers"] = [{"name": name, "weights": n, "kept": k} for name, n, k in self.layers]
        out["candidates"] = [asdict(c) for c in self.candidates]
        out["steps"] = [asdict(s) for s in self.steps]
        return out

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as a JSON file; null for what is not finite.

        Args:
            path: The file.
        """
        text = json.dumps(_plain(self.to_dict()), indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def to_csv(self, path: str | Path) -> None:
        """Write the steps as a CSV file, a row each.

        Args:
            path: The file.
        """
        write_csv(path, PruneStep, self.steps)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: str | Path, kind: type, rows: Sequence[Any], append: bool = False) -> None:
    """Write dataclass objects as a CSV file, a row each.

    Args:
        path: The file.
        kind: Their class, for the header.
        rows: The objects.
        append: Add to the rows that the file has.
    """
    append = append and Path(path).exists()
    with Path(path).open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)])
        if not append:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
