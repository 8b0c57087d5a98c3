"""What a Pruner is going to do: its updates, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mfac.gradients.memory import check_memory
from mfac.pruning.engine import Engine
from mfac.pruning.schedule import Schedule, num_recomputations
from mfac.pruning.selection import Sparsities
from mfac.pruning.settings import num_grads_at

_MAX_UPDATES = 100_000  # of a plan


@dataclass(frozen=True)
class PlannedUpdate:
    """An update to come.

    Attributes:
        time: When it is due.
        sparsity: Over all parameters together, afterwards.
        layers: Name -> sparsity afterwards, of parameters that are ranked by themselves.
        recomputations: R.
        num_grads: m, rows of the Fisher; 0 for a criterion that needs none.
        gradients: Backward passes that it takes. Corrections and ``"auto"`` draw further batches, to judge by.
        nbytes: Of the gradients.
    """

    time: float
    sparsity: float
    layers: dict[str, float]
    recomputations: int
    num_grads: int
    gradients: int
    nbytes: int


def plan_updates(
    engine: Engine,
    schedules: dict[str | None, Schedule],
    times: Iterable[float],
    collects: bool,
    began: Sparsities | None = None,
) -> list[PlannedUpdate]:
    """List the updates to come, and check that their gradients fit into memory.

    Args:
        engine: The model and its settings; nothing is changed.
        schedules: Key -> schedule, which differ in sparsity only.
        times: Nominal times of the updates.
        collects: Whether there are batches to collect gradients from.
        began: Key -> sparsity from which an interrupted update began, which is the first.

    Returns:
        The updates that prune, or correct what an interrupted one has pruned.

    Raises:
        ValueError: If there are more than 100,000 updates.
        MemoryError: If the gradients do not fit; the text says what would.
    """
    settings, d = engine.given, sum(engine.selection.sizes.values())
    reached: Sparsities = dict(engine.reached)
    updates: list[PlannedUpdate] = []
    for time in times:
        after = {key: max(reached[key], schedule.sparsity(time)) for key, schedule in schedules.items()}
        if after == reached and not began:
            continue
        update = engine.with_update(began or reached, after)["update"]
        corrections = engine.num_corrections(update) if collects else 0
        if after == reached and not corrections:
            began = None
            continue
        collected = collects and engine.takes_gradients(update)
        m = num_grads_at(settings["num_grads"], engine.selection.overall(reached)) if collected else 0
        rounds, refresh = settings["recomputations"], engine.num_refresh(m)
        if rounds == "auto":
            rounds = num_recomputations(reached, after) if collected else 1
        if after == reached:
            rounds = 1
        updates.append(
            PlannedUpdate(
                time=time,
                sparsity=engine.selection.overall(after),
                layers={names[0]: after[key] for key, names in engine.selection.segments if len(names) == 1},
                recomputations=rounds,
                num_grads=m,
                gradients=engine.num_backward_passes(m, refresh, rounds, corrections) if collected else 0,
                nbytes=m * d * settings["dtype"].itemsize,
            )
        )
        reached, began = after, None
        if len(updates) > _MAX_UPDATES:
            raise ValueError(f"frequency: expected at most {_MAX_UPDATES} updates, got more")
    if collects and updates:
        storage = engine.storage
        check_memory(max(update.num_grads for update in updates), d, settings["dtype"], storage)
    return updates
