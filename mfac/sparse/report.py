"""What a conversion did, layer by layer, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LayerReport:
    """One layer of a converted model.

    Attributes:
        name: Name of the layer.
        kind: What it is: ``"Conv2d 1x1, 512 -> 512"``.
        sparsity: Share of zeros in its weights.
        format: What it is replaced by, ``"rows"``, ``"blocks"`` or ``"depthwise"``; ``"dense"`` if it is not.
        reason: Why.
        dense_ms: Time of torch's own layer (and activation) in its faster layout, milliseconds; None: not timed.
        fast_ms: Time of the fastest of our kernels; None: not timed.
        dense_bytes: Memory of its weights as they were.
        bytes: Memory of its weights now.
    """

    name: str
    kind: str
    sparsity: float
    format: str
    reason: str
    dense_ms: float | None = None
    fast_ms: float | None = None
    dense_bytes: int = 0
    bytes: int = 0

    @property
    def replaced(self) -> bool:
        """Whether the layer is replaced."""
        return self.format != "dense"

    def __str__(self) -> str:
        """Return one line: name, layer, sparsity, times, decision."""
        times = ["-" if t is None else f"{t:.3f}" for t in (self.dense_ms, self.fast_ms)]
        head = f"{self.name:32} {self.kind:28} {self.sparsity:7.1%} {times[0]:>9} {times[1]:>9}"
        return f"{head}  {self.format:9} {self.reason}"


@dataclass
class ConversionReport:
    """What :func:`mfac.sparse.convert` did.

    Attributes:
        layers: Every Linear and convolution, in the order of the model.
        folded: Names of the BatchNorm layers folded into the layers before them.
        notes: What else there is to say: why the model could not be traced, why it stayed dense.
        backend: ``"compiled"`` or ``"reference"``.
        machine: The processor.
        threads: Torch's threads during the timing.
        dense_ms: Time of the dense model with BatchNorm folded, in the faster of its layouts, milliseconds; None: not
            timed.
        fast_ms: Time of the converted model.
        error: Largest difference of the outputs from the model's on the example inputs, each element relative to its
            magnitude or the typical one of its tensor, whichever is larger.
    """

    layers: list[LayerReport] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    backend: str = "compiled"
    machine: str = ""
    threads: int = 1
    dense_ms: float | None = None
    fast_ms: float | None = None
    error: float = 0.0

    @property
    def replaced(self) -> list[str]:
        """Names of the layers that are replaced."""
        return [layer.name for layer in self.layers if layer.replaced]

    def __str__(self) -> str:
        """Return a table: a line per layer, and the whole model."""
        head = f"{'layer':32} {'kind':28} {'zeros':>7} {'dense ms':>9} {'fast ms':>9}  {'kernel':9} reason"
        lines = [head, *map(str, self.layers)]
        before, after = (sum(getattr(x, name) for x in self.layers) / 2**20 for name in ("dense_bytes", "bytes"))
        lines.append(
            f"{len(self.replaced)} of {len(self.layers)} layers replaced, {len(self.folded)} BatchNorm folded; weights "
            f"{before:.2f} -> {after:.2f} MiB; outputs differ by {self.error:.0e}"
        )
        if self.dense_ms is not None and self.fast_ms is not None:
            lines.append(
                f"whole model: dense {self.dense_ms:.2f} ms, converted {self.fast_ms:.2f} ms, "
                f"{self.dense_ms / self.fast_ms:.2f}x ({self.machine}, threads: {self.threads}, {self.backend})"
            )
        return "\n".join(lines + self.notes)
