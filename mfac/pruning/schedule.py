"""Sparsity over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from mfac.checks import as_number, check_choice, check_number, check_sparsity

CURVES = {
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "inverse_cubic": lambda x: 1 - (1 - x) ** (1 / 3),
}

Key = TypeVar("Key")


@dataclass(frozen=True)
class Schedule:
    """Sparsity as a function of time, and when it is to be raised.

    Time is any increasing number: steps, or epochs as a float. Updates are due at the nominal times ``start``, ``start
    + frequency``, ``start + 2 · frequency``, ... and ``end``. An update takes place at the first opportunity at or
    after its nominal time and gives the sparsity of that nominal time, whatever the time then is.

    Args:
        initial: Sparsity at ``start``, in [0, ``final``].
        final: Sparsity at ``end``, in [0, 1].
        start: Time of the first update.
        end: Time of the last update. With ``end == start`` there is one update, to ``final``.
        frequency: Time between updates, > 0; infinity for none but those at ``start`` and ``end``.
        interpolation: ``"cubic"`` (1 - (1 - x)³: fast at first, the usual choice), ``"linear"`` (x) or
            ``"inverse_cubic"`` (1 - (1 - x)^⅓).

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range, or ``initial`` above ``final``.

    Example:
        >>> schedule = Schedule(initial=0.0, final=0.8, start=0, end=10, frequency=5)
        >>> [round(schedule.sparsity(t), 3) for t in (0, 5, 10)]
        [0.0, 0.7, 0.8]
        >>> [schedule.nominal_time(t) for t in (-1, 0, 4, 7, 12)]
        [None, 0, 0, 5, 10]
    """

    initial: float
    final: float
    start: float
    end: float
    frequency: float
    interpolation: str = "cubic"

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name, words in (("initial", "initial sparsity"), ("final", "final sparsity")):
            object.__setattr__(self, name, check_sparsity(words, getattr(self, name)))
        for name in ("start", "end"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        frequency = as_number(self.frequency)
        if frequency is None:
            raise TypeError(f"frequency: expected a number, got {self.frequency!r}")
        object.__setattr__(self, "frequency", frequency)
        if self.initial > self.final:
            raise ValueError(f"initial sparsity: expected <= the final one, {self.final}, got {self.initial!r}")
        if self.end < self.start:
            raise ValueError(f"end: expected >= start = {self.start}, got {self.end!r}")
        if not self.frequency > 0:
            raise ValueError(f"frequency: expected > 0, got {self.frequency!r}")
        check_choice("schedule", self.interpolation, CURVES)

    def sparsity(self, time: float) -> float:
        """Return the sparsity at ``time``."""
        if time >= self.end:
            return self.final
        x = max(0.0, (time - self.start) / (self.end - self.start))
        return self.initial + (self.final - self.initial) * CURVES[self.interpolation](x)

    def nominal_time(self, time: float) -> float | None:
        """Return the nominal time of the latest update due by ``time``; None before ``start``."""
        if time < self.start:
            return None
        if time >= self.end:
            return self.end
        # Epochs as floats: 0.2 + 0.1 > 0.3, and without the allowance for rounding the update at 0.3 would be missed.
        passed = math.floor((time - self.start) / self.frequency * (1 + 1e-12) + 1e-9)
        return self.start + passed * self.frequency if passed else self.start

    def due(self, time: float, last: float | None) -> bool:
        """Return whether an update is due at ``time``, ``last`` being the nominal time of the last one, or None."""
        now = self.nominal_time(time)
        return now is not None and (last is None or now > last)


def interpolate_sparsity(start: float, end: float, share: float) -> float:
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


def interpolate_targets(start: Mapping[Key, float], end: Mapping[Key, float], share: float) -> dict[Key, float]:
    """Return :func:`interpolate_sparsity` for each key of two dicts."""
    return {key: interpolate_sparsity(start[key], end[key], share) for key in end}
