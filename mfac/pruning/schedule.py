"""Sparsity over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

CURVES = {
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "inverse_cubic": lambda x: 1 - (1 - x) ** (1 / 3),
}


@dataclass(frozen=True)
class Schedule:
    """Sparsity as a function of time, and when it is to be raised.

    Time is any increasing number: steps, or epochs as a float. The first update is due at ``start`` and gives
    ``initial``, later ones every ``frequency``, the last one at the first time at or after ``end``, which gives
    ``final`` exactly.

    Args:
        initial: Sparsity at ``start``, in [0, ``final``].
        final: Sparsity at ``end``, in [0, 1].
        start: Time of the first update.
        end: Time of the last update. With ``end == start`` there is one update, to ``final``.
        frequency: Time between updates, > 0.
        interpolation: ``"cubic"`` (1 - (1 - x)³: fast at first, the usual choice), ``"linear"`` (x) or
            ``"inverse_cubic"`` (1 - (1 - x)^⅓).

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range, or ``initial`` above ``final``.

    Example:
        >>> schedule = Schedule(initial=0.0, final=0.8, start=0, end=10, frequency=5)
        >>> [round(schedule.sparsity(t), 3) for t in (0, 5, 10)]
        [0.0, 0.7, 0.8]
    """

    initial: float
    final: float
    start: float
    end: float
    frequency: float
    interpolation: str = "cubic"

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("initial", "final", "start", "end", "frequency"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                what = f"{name} sparsity" if name in ("initial", "final") else name
                raise TypeError(f"{what}: expected a number, got {value!r}")
        for name in ("initial", "final"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} sparsity: expected in [0, 1], got {value!r}")
        if self.initial > self.final:
            raise ValueError(f"initial sparsity: expected <= the final one, {self.final}, got {self.initial!r}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"start, end: expected finite numbers, got {self.start!r} and {self.end!r}")
        if self.end < self.start:
            raise ValueError(f"end: expected >= start = {self.start}, got {self.end!r}")
        if not self.frequency > 0:
            raise ValueError(f"frequency: expected > 0, got {self.frequency!r}")
        if self.interpolation not in CURVES:
            raise ValueError(f"schedule interpolation: expected one of {', '.join(CURVES)}, got {self.interpolation!r}")

    def sparsity(self, time: float) -> float:
        """Return the sparsity that an update at ``time`` gives."""
        if time >= self.end:
            return self.final
        x = max(0.0, (time - self.start) / (self.end - self.start))
        return self.initial + (self.final - self.initial) * CURVES[self.interpolation](x)

    def due(self, time: float, last: float | None) -> bool:
        """Return whether an update is due at ``time``, with ``last`` the time of the last one, or None."""
        if time < self.start:
            return False
        if last is None:
            return True
        if last >= self.end:
            return False
        # Epochs as floats: 0.2 + 0.1 > 0.3, and without the allowance for rounding the update at 0.3 would be missed.
        return time >= self.end or time - last >= self.frequency * (1 - 1e-9)


def between(start: float, end: float, share: float) -> float:
    """Return the sparsity after a share of the way, in equal ratios of the density; linear if nothing is to remain.

    Args:
        start: Sparsity to start from.
        end: Sparsity to reach, >= ``start``.
        share: In [0, 1].

    Returns:
        A sparsity in [``start``, ``end``], exactly ``end`` for ``share=1``.
    """
    if share == 1:
        return end
    if end == 1:
        return start + (end - start) * share
    return min(max(start, 1 - (1 - start) * ((1 - end) / (1 - start)) ** share), end)  # whatever the rounding
