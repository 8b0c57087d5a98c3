"""Sparsity over time."""

import itertools
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac.pruning.schedule import Schedule

CURVES = ["linear", "cubic", "inverse_cubic"]


def updates(schedule, times):
    """(time, sparsity) of every update of a run through the times, as the Pruner makes them."""
    last, out = None, []
    for time in times:
        if schedule.due(time, last):
            last = schedule.nominal_time(time)
            out.append((time, schedule.sparsity(last)))
    return out


@pytest.mark.parametrize(("curve", "expected"), [("linear", 0.25), ("cubic", 0.4375), ("inverse_cubic", 0.1031)])
def test_pinned_by_sparseml(curve, expected):
    """Halfway from 0 to 0.5; the table has four digits."""
    schedule = Schedule(0.0, 0.5, start=2, end=4, frequency=1, curve=curve)
    assert schedule.sparsity(3) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("curve", CURVES)
def test_clamped(curve):
    schedule = Schedule(0.1, 0.7, start=2, end=4, frequency=1, curve=curve)
    assert schedule.sparsity(-5) == schedule.sparsity(2) == 0.1
    assert schedule.sparsity(4) == schedule.sparsity(50) == 0.7


@given(
    initial=st.floats(0, 0.5),
    rise=st.floats(0.05, 0.5),
    start=st.floats(-3, 10),
    length=st.floats(0.5, 10),
    frequency=st.floats(0.05, 20),
    steps=st.lists(st.floats(0.01, 2), min_size=1, max_size=60),
    curve=st.sampled_from(CURVES),
)
def test_any_run(initial, rise, start, length, frequency, steps, curve):
    """Nothing before start, the initial sparsity at it, strictly rising, the final one exactly at end, then never."""
    end = start + length
    times = [start - 1, math.nextafter(start, -math.inf), start]
    for step in steps:
        times.append(times[-1] + step)
    schedule = Schedule(initial, initial + rise, start, end, frequency, curve)
    done = updates(schedule, times)
    assert done[0] == (start, initial)
    for (_, s0), (_, s1) in pairwise(done):
        assert s0 < s1
    late = [time for time in times if time >= end]
    assert [update for update in done if update[0] >= end] == [(time, initial + rise) for time in late[:1]]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 100), st.integers(1, 100))
def test_float_epochs(per_epoch, every, start, length):
    """With the time as epochs, counted in steps, no update is missed by rounding."""
    end = start + length
    schedule = Schedule(0.0, 0.9, start / per_epoch, end / per_epoch, every / per_epoch)
    done = updates(schedule, [i / per_epoch for i in range(end + 20)])
    assert [round(time * per_epoch) for time, _ in done] == sorted({*range(start, end, every), end})


def test_late_first_call():
    """A run that begins after `end` makes one update, to the final sparsity."""
    schedule = Schedule(0.2, 0.8, start=0, end=5, frequency=1)
    assert updates(schedule, [7.0, 8.0]) == [(7.0, 0.8)]


def test_one_shot():
    assert updates(Schedule(0.0, 0.8, start=3, end=3, frequency=1), range(10)) == [(3, 0.8)]


def test_only_start_and_end():
    assert updates(Schedule(0.1, 0.8, start=1, end=4, frequency=math.inf), range(10)) == [(1, 0.1), (4, 0.8)]


@pytest.mark.parametrize("frequency", [1e-320, 5e-324])
def test_updates_closer_together_than_floats(frequency):
    schedule = Schedule(0.0, 0.8, start=0, end=4, frequency=frequency, curve="linear")
    assert [(t, round(s, 3)) for t, s in updates(schedule, range(6))] == [
        (0, 0), (1, 0.2), (2, 0.4), (3, 0.6), (4, 0.8)
    ]  # fmt: skip
    assert Schedule(0.0, 0.8, start=0, end=10**400, frequency=0.5).nominal_time(10**399) == 10**399


GOOD = {"initial_sparsity": 0.0, "final_sparsity": 0.8, "start": 0, "end": 10, "frequency": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial_sparsity": -0.1}, ValueError, r"initial_sparsity: expected in \[0, 1\], got -0.1"),
        ({"final_sparsity": 1.1}, ValueError, r"final_sparsity: expected in \[0, 1\], got 1.1"),
        ({"final_sparsity": math.nan}, ValueError, "final_sparsity: expected in .* got nan"),
        ({"initial_sparsity": 0.9}, ValueError, "initial_sparsity: expected at most the final one, 0.8, got 0.9"),
        ({"final_sparsity": "0.8"}, TypeError, "final_sparsity: expected a number, got '0.8'"),
        ({"initial_sparsity": True}, TypeError, "initial_sparsity: expected a number, got True"),
        ({"end": None}, TypeError, "end: expected a number, got None"),
        ({"end": -1}, ValueError, "end: expected >= start = 0, got -1"),
        ({"end": math.inf}, ValueError, "end: expected a finite number, got inf"),
        ({"start": math.nan}, ValueError, "start: expected a finite number, got nan"),
        ({"frequency": 0}, ValueError, "frequency: expected > 0, got 0"),
        ({"frequency": math.nan}, ValueError, "frequency: expected > 0, got nan"),
        (
            {"curve": "quadratic"},
            ValueError,
            "curve: expected one of linear, cubic, inverse_cubic",
        ),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        Schedule(**GOOD | change)


@pytest.mark.parametrize(
    ("start", "end", "frequency", "times"),
    [
        (0, 2, 1, [0, 1, 2]), (1, 4, math.inf, [1, 4]), (0, 0, 1, [0]), (0, 1, 0.4, [0, 0.4, 0.8, 1]),
        (0, 1, 1e-300, [0, 1]), (0.1, 0.4, 0.1, [0.1, 0.2, 0.3, 0.4]),
    ],
)  # fmt: skip
def test_nominal_times(start, end, frequency, times):
    schedule = Schedule(0.0, 0.5, start, end, frequency)
    assert list(schedule.nominal_times()) == pytest.approx(times)
    for time, following in itertools.pairwise(times):
        assert schedule.following_time(time) == pytest.approx(following)
