"""What pruning did: masks, settings, losses, times; as a table, JSON or CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mfac.gradients.buffer import GradientBuffer
from mfac.pruning.auto import Candidate
from mfac.pruning.masks import apply_masks


@dataclass
class PruneStep:
    """One of the steps of :func:`mfac.prune`, or of an update of :class:`mfac.Pruner`; or a final correction.

    Attributes:
        sparsity: Reached by it, over all chosen parameters.
        damping: λ.
        block_size: B.
        substeps: S, of selection and update.
        new_gradients: How many gradients were collected for it.
        loss_before: Mean loss of the batches that gave those; NaN if not known.
        predicted_loss_increase: ½ δᵀFδ, times the samples of a batch, by which gradients of batches fall short; None
            without gradients, and for a final correction.
        loss_after: Mean loss of the batches that gave the next ones, or were drawn for this after the last step of
            ``prune``; NaN if not measured.
        step_length: η of the natural-gradient correction after it, 0 if none lowered the loss; None if there was none.
        seconds: Wall time, gradients and corrections included.
    """

    sparsity: float
    damping: float | None
    block_size: int | None
    new_gradients: int
    loss_before: float
    predicted_loss_increase: float | None
    loss_after: float = math.nan
    step_length: float | None = None
    seconds: float = math.nan
    substeps: int = 1

    @classmethod
    def of(
        cls, result: PruneResult, buffer: GradientBuffer | None, new_gradients: int, pruned: bool = True
    ) -> PruneStep:
        """Return the record of a step.

        Args:
            result: What the step did, or the last one before a final correction.
            buffer: Its gradients.
            new_gradients: How many of them were new.
            pruned: False for a final correction.

        Returns:
            The record; loss after it, step length and time are not known yet.
        """
        increase = result.predicted_loss_increase if pruned else None
        if increase is not None and buffer is not None and math.isfinite(buffer.samples):
            increase *= buffer.samples
        return cls(
            sparsity=result.sparsity,
            damping=result.damping,
            block_size=result.block_size,
            substeps=result.substeps,
            new_gradients=new_gradients,
            loss_before=math.nan if buffer is None else buffer.loss,
            predicted_loss_increase=increase,
        )


@dataclass(repr=False)
class PruneResult:
    """What pruning did, or had done when it was interrupted (``error.result``); ``print`` shows it as a table.

    Attributes:
        masks: Name to bool tensor of the parameter's shape, True = kept.
        sparsity: Sparsity of the masks, over all chosen parameters.
        layers: (name, weights, weights kept) of every parameter.
        predicted_loss_increase: ½ δᵀFδ of the step (of the last one, if there were several); None without gradients.
        damping: λ that was used (last); None without gradients.
        block_size: B that was used (last); None without gradients.
        substeps: S that was used (last).
        step_length: η of the (last) natural-gradient correction, 0 if none lowered the loss; None if there was none.
        candidates: Settings that ``"auto"`` tried, with their scores.
        steps: One for each recomputation; empty after ``prune_step``.
        seconds: Wall time by stage.
        backend: ``"compiled"`` or ``"reference"``.
    """

    masks: dict[str, Tensor]
    sparsity: float
    layers: list[tuple[str, int, int]]
    predicted_loss_increase: float | None = None
    damping: float | None = None
    block_size: int | None = None
    substeps: int = 1
    step_length: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    steps: list[PruneStep] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    backend: str = "compiled"

    def __str__(self) -> str:
        """Return the table."""
        width = max([len("layer"), *(len(name) for name, _, _ in self.layers)])
        total, kept = sum(n for _, n, _ in self.layers), sum(k for _, _, k in self.layers)
        lines = [f"{'layer':<{width}} {'weights':>12} {'kept':>12} {'sparsity':>9}"]
        for name, n, k in [*self.layers, ("all", total, kept)]:
            lines.append(f"{name:<{width}} {n:>12,} {k:>12,} {1 - k / n if n else 0:>9.2%}")
        if self.steps:
            lines.append(
                f"{'step':>4} {'sparsity':>9} {'new gradients':>14} {'loss':>8} {'predicted':>10} {'corrected':>10} "
                f"{'after':>8}"
            )
        for i, step in enumerate(self.steps, 1):
            predicted = "" if step.predicted_loss_increase is None else f"+{step.predicted_loss_increase:.3g}"
            length = "" if step.step_length is None else f"{step.step_length:.1e}" if step.step_length else "0"
            lines.append(
                f"{i:>4} {step.sparsity:>9.2%} {step.new_gradients:>14} {step.loss_before:>8.4f} {predicted:>10} "
                f"{length:>10} {step.loss_after:>8.4f}"
            )
        if self.predicted_loss_increase is not None and not self.steps:
            lines.append(f"predicted loss increase {self.predicted_loss_increase:.4g}")
        if self.damping is not None:
            tried = f", chosen among {len(self.candidates)}" if self.candidates else ""
            lines.append(f"damping {self.damping:.2e}, block size {self.block_size}, sub-steps {self.substeps}{tried}")
        lines.append(", ".join(f"{stage} {s:.3f} s" for stage, s in self.seconds.items()) + f" ({self.backend})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return one line."""
        return f"PruneResult(sparsity={self.sparsity:.4f}, layers={len(self.layers)}, backend={self.backend!r})"

    def apply(self, model: nn.Module) -> None:
        """Set the pruned weights of another model to zero: an average of weights (EMA, SWA), a copy.

        Its other weights stay. Where the step has moved those of the model far (a joint update), an average of old
        ones no longer fits them: start it anew from the model.

        Args:
            model: Has parameters of the same names and shapes; see :func:`mfac.apply_masks`.
        """
        apply_masks(model, self.masks)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the masks, as plain numbers, strings, lists and dicts."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "masks"}
        out["layers"] = [{"name": name, "weights": n, "kept": k} for name, n, k in self.layers]
        out["candidates"] = [asdict(c) for c in self.candidates]
        out["steps"] = [asdict(s) for s in self.steps]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], masks: Mapping[str, Tensor] | None = None) -> PruneResult:
        """Return the result that :meth:`to_dict` described.

        Args:
            values: What ``to_dict`` returned.
            masks: Its masks, which are not part of that.

        Returns:
            The result.

        Raises:
            ValueError: If something is missing.
        """
        values = dict(values)
        required = {f.name for f in fields(cls) if f.default is MISSING}  # the others may be newer
        missing = required - {"masks"} - set(values)
        if missing:
            raise ValueError(f"values: expected what to_dict returned, got none of {', '.join(sorted(missing))}")
        values["layers"] = [(row["name"], row["weights"], row["kept"]) for row in values["layers"]]
        infinite = {"score": math.inf}  # null in JSON
        values["candidates"] = [
            Candidate(**{**row, **(infinite if row["score"] is None else {})}) for row in values["candidates"]
        ]
        losses = ("loss_before", "loss_after")  # null in JSON where not known
        values["steps"] = [
            PruneStep(**{**row, **{name: math.nan for name in losses if row[name] is None}}) for row in values["steps"]
        ]
        return cls(masks=dict(masks or {}), **values)

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
