"""Sparsity over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from mfac.checks import check_choice, check_number, check_positive, check_sparsity

CURVES = {
    "linear": lambda x: x,
    "cubic": lambda x: 1 - (1 - x) ** 3,
    "inverse_cubic": lambda x: 1 - (1 - x) ** (1 / 3),
}

_ROUNDING = 1e-12  # of times
_MAX_RECOMPUTATIONS = 16  # of "auto"

Key = TypeVar("Key")


@dataclass(frozen=True)
class Schedule:
    """Sparsity as a function of time, and when it is to be raised.

    Time is any increasing number: steps, or epochs as a float. Updates are due at the nominal times ``start``, ``start
    + frequency``, ``start + 2 · frequency``, ... and ``end``. An update takes place at the first opportunity at or
    after its nominal time and gives the sparsity of that nominal time, whatever the time then is.

    Args:
        initial_sparsity: Sparsity at ``start``, in [0, ``final_sparsity``].
        final_sparsity: Sparsity at ``end``, in [0, 1].
        start: Time of the first update.
        end: Time of the last update. With ``end == start`` there is one update, to ``final_sparsity``.
        frequency: Time between updates, > 0; infinity for none but those at ``start`` and ``end``.
        curve: ``"cubic"`` (1 - (1 - x)³: fast at first, the usual choice), ``"linear"`` (x) or
            ``"inverse_cubic"`` (1 - (1 - x)^⅓).

    Raises:
        TypeError: If a value is not a number.
        ValueError: If a value is out of its range, or ``initial_sparsity`` above ``final_sparsity``.

    Example:
        >>> schedule = Schedule(0.0, 0.8, start=0, end=10, frequency=5)
        >>> [round(schedule.sparsity(t), 3) for t in (0, 5, 10)]
        [0.0, 0.7, 0.8]
        >>> [schedule.nominal_time(t) for t in (-1, 0, 4, 7, 12)]
        [None, 0, 0, 5, 10]
    """

    initial_sparsity: float
    final_sparsity: float
    start: float
    end: float
    frequency: float
    curve: str = "cubic"

    def __post_init__(self) -> None:
        """Check the arguments."""
        checked = {
            "initial_sparsity": check_sparsity("initial_sparsity", self.initial_sparsity),
            "final_sparsity": check_sparsity("final_sparsity", self.final_sparsity),
            "start": check_number("start", self.start),
            "end": check_number("end", self.end),
            "frequency": check_positive("frequency", self.frequency, finite=False),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.initial_sparsity > self.final_sparsity:
            raise ValueError(
                f"initial_sparsity: expected at most the final one, {self.final_sparsity}, got {self.initial_sparsity}"
            )
        if self.end < self.start:
            raise ValueError(f"end: expected >= start = {self.start}, got {self.end!r}")
        check_choice("curve", self.curve, CURVES)

    def sparsity(self, time: float) -> float:
        """Return the sparsity at ``time``."""
        if time >= self.end:
            return self.final_sparsity
        x = max(0.0, (time - self.start) / (self.end - self.start))
        return self.initial_sparsity + (self.final_sparsity - self.initial_sparsity) * CURVES[self.curve](x)

    def nominal_time(self, time: float) -> float | None:
        """Return the nominal time of the latest update due by ``time``; None before ``start``."""
        if time < self.start:
            return None
        if time >= self.end:
            return self.end
        # Epochs as floats: 0.2 + 0.1 > 0.3, and without the allowance for rounding the update at 0.3 would be missed.
        try:
            passed = math.floor((time - self.start) / self.frequency * (1 + 1e-12) + 1e-9)
        except OverflowError:  # updates closer together than floats are: one is due at any time
            return time
        return self.start + passed * self.frequency if passed else self.start

    def following_time(self, time: float) -> float:
        """Return the first nominal time after ``time``, which is not before ``start``; ``end`` if there is none."""
        now = self.nominal_time(time)
        try:
            passed = round((now - self.start) / self.frequency)
        except OverflowError:  # updates closer together than floats are
            return self.end
        following = self.start + (passed + 1) * self.frequency
        least = _ROUNDING * max(abs(now), abs(self.end))  # closer together than that, updates are not told apart
        return following if now + least < following < self.end - least else self.end

    def nominal_times(self) -> Iterator[float]:
        """Yield the nominal times of all updates; of updates closer together than floats are, only ``end``."""
        time = self.start
        while time < self.end:
            yield time
            time = self.following_time(time)
        yield self.end

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


def num_halvings(start: Mapping[Key, float], end: Mapping[Key, float]) -> float:
    """Return how often the weights are halved, on the longest of the ways between two sparsities per key.

    Example:
        >>> num_halvings({None: 0.5}, {None: 0.875})
        2.0
    """
    halvings = [
        math.log2((1 - start[key]) / (1 - end[key])) if end[key] < 1 else math.inf
        for key in end
        if end[key] > start[key]
    ]
    return max(halvings, default=0.0)


def num_recomputations(start: Mapping[Key, float], end: Mapping[Key, float]) -> int:
    """Return the recomputations of ``"auto"``: 2 for each halving of the weights, on the longest of the ways.

    Args:
        start: Key -> sparsity to start from.
        end: Key -> sparsity to reach.

    Returns:
        R, from 1 to 16.

    Example:
        >>> num_recomputations({None: 0.35}, {None: 0.95})
        7
    """
    return round(min(max(2 * num_halvings(start, end), 1), _MAX_RECOMPUTATIONS))


def interpolate_sparsities(start: Mapping[Key, float], end: Mapping[Key, float], share: float) -> dict[Key, float]:
    """Return :func:`interpolate_sparsity` for each key of two dicts."""
    return {key: interpolate_sparsity(start[key], end[key], share) for key in end}
