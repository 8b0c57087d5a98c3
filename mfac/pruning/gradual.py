"""Gradual pruning, used like an optimizer. One class, half of it docstrings: somewhat long."""

from __future__ import annotations

import atexit
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mfac.checks import check_instance, check_int, check_number, check_sparsity, warn
from mfac.distributed.shards import whole
from mfac.model.names import shorten
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.engine import Engine
from mfac.pruning.masks import check_masks, complete_masks, mask_gradients
from mfac.pruning.plan import PlannedUpdate, plan_updates
from mfac.pruning.result import PruneResult
from mfac.pruning.run import run
from mfac.pruning.schedule import Schedule
from mfac.pruning.selection import Sparsities
from mfac.pruning.settings import PrunerSettings
from mfac.settings import accepts, definitions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What a resumed run must have in common with the saved one: all but the schedule and where things are computed.
_SCHEDULED = ("initial_sparsity", "start", "frequency", "schedule")
_HERE = ("masks", "buffer", "backend", "precision", "dtype", "grads_device", "forward", "progress", "process_group")
_SAVED_SETTINGS = [name for name in definitions(PrunerSettings) if name not in (*_SCHEDULED, *_HERE)]

_STEPPED: weakref.WeakSet[Pruner] = weakref.WeakSet()  # looked at when the program ends


def _warn_if_unfinished(pruner: Pruner) -> None:
    if not pruner.finished:
        warn(f"{pruner!r} ends before its last update: training never reached end={pruner._schedule.end:g}")
    pruner._stepped = False


@atexit.register
def _warn_at_exit() -> None:
    for pruner in list(_STEPPED):
        if pruner._stepped:
            _warn_if_unfinished(pruner)


@contextmanager
def no_unfinished_warning() -> Iterator[None]:
    """Suppress the warning of unfinished Pruners, all of this process, when an error or Ctrl-C ends the block.

    Raises:
        BaseException: What ended it.
    """
    try:
        yield
    except BaseException:
        for pruner in _STEPPED:
            pruner._stepped = False
        raise


@accepts(PrunerSettings)
class Pruner:
    """Raises the sparsity of a model along a schedule while it trains, and holds the masks.

    Call :meth:`step` after every ``optimizer.step()``, or :meth:`attach` it to the optimizer once: it sets pruned
    weights back to zero and prunes when an update is due, at the nominal times ``start``, ``start + frequency``, ...
    and ``end``. Nothing is hooked into the model, so copies, compiled and saved models are ordinary ones. Parameters
    are looked up by name at each use: the model may be moved, wrapped or compiled, or have them replaced.

    A long update is split into ``recomputations``, because a big jump at once defeats every quadratic model. Weights
    that are kept are moved only where more than half go at once (``update="auto"``): elsewhere training does it.

    An error or Ctrl-C in an update loses nothing: the model is pruned as far as :attr:`masks` say, the update stays
    due, and the next :meth:`step` goes on with it.

    Args:
        model: Its weights are written.
        batches: Iterable of (inputs, targets) or dicts, iterated repeatedly; ``num_grads`` of them make the
            gradients of an update (see :func:`collect_gradients`). A DataLoader is not disturbed: the Pruner reads its
            dataset in an order of its own, which follows from torch's seed.
        loss_fn: Loss of (outputs, targets); None for models whose output has a ``.loss``.
        sparsity: Final sparsity: a float, or a dict of them by name or ``"re:<regex>"`` (others are left alone, unless
            ``params`` or the buffer has them: then they stay dense, but take part in the updates).
        end: Time of the last update, which gives ``sparsity`` exactly.
        settings: The fields of :class:`PrunerSettings`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value or name is wrong, or both of ``batches`` and ``buffer`` are given, or neither for
            ``criterion="fisher"``.

    Attributes:
        results: (time, :class:`PruneResult`) of every update, without its masks: those of the last are in ``masks``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(20, 2)
        >>> data = [(torch.randn(8, 20), torch.randint(2, (8,))) for _ in range(4)]
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = Pruner(model, data, loss_fn, sparsity=0.9, end=6, frequency=3, num_grads=4, progress=False)
        >>> for inputs, targets in data * 2:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(inputs), targets).backward()
        ...     optimizer.step()
        ...     result = pruner.step()
        >>> pruner.sparsity
        0.9
        >>> pruner
        Pruner(sparsity 90.0 % of 90.0 %, time 8 of 6, 2 updates)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        sparsity: float | Mapping[str, float],
        end: float,
        **settings: Unpack[PrunerSettings],
    ) -> None:
        """Check the arguments; the model is not touched."""
        buffer, criterion = settings["buffer"], settings["criterion"]
        needs_gradients = CRITERIA[criterion].needs_gradients
        sources = (batches is not None) + (buffer is not None)
        if sources > 1 or (sources == 0 and needs_gradients):
            wanted = f"exactly one of them for criterion={criterion!r}" if needs_gradients else "at most one of them"
            raise ValueError(f"batches, buffer: expected {wanted}, got {'both' if sources else 'neither'}")
        if buffer is not None and settings["recomputations"] not in (1, "auto"):
            raise ValueError(
                "recomputations: expected 1 with a buffer (new gradients need batches), got "
                f"{settings['recomputations']}"
            )
        if batches is None and settings["corrections"]:
            raise ValueError(
                f"corrections: expected 0 without batches, which judge them, got {settings['corrections']}"
            )
        self._engine = Engine(model, sparsity, settings, None if buffer is None else buffer.names, only_keys=True)
        if settings["final_corrections"] and (batches is None or not self._engine.corrections):
            raise ValueError(
                f"final_corrections: expected 0 without batches or corrections, got {settings['final_corrections']}"
            )
        if buffer is not None and self._engine.names != buffer.names:
            raise ValueError(
                f"params: expected those of the buffer, {shorten(buffer.names)}, got {shorten(self._engine.names)}"
            )
        replicas = self._engine.replicas
        replicas.check_arguments({"end": end, "batches": batches is None})
        self._source = None if batches is None else replicas.call(lambda: self._engine.source(batches, loss_fn))
        self._buffer = buffer
        initial = settings["initial_sparsity"]
        self._schedules = {  # they differ in sparsity only
            key: Schedule(
                self._engine.start_sparsity(key, value) if initial == "current" else initial,
                value,
                settings["start"],
                end,
                settings["frequency"],
                settings["schedule"],
            )
            for key, value in self._engine.sparsities.items()
        }
        self._calls = 0
        self._handle: RemovableHandle | None = None
        self._stepped = False  # by this very object, not by one that it was copied or loaded from
        self._time: float | None = None  # of the latest call
        self._updates = 0
        self._began: Sparsities | None = None  # where an interrupted update did: it may have pruned all, not corrected
        self._last: float | None = None  # nominal time of the last update
        self.results: list[tuple[float, PruneResult]] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor, True = kept; empty before the first update."""
        return self._engine.masks

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of all that are pruned, as they are now."""
        return self._engine.params

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks now, over all chosen parameters."""
        return self._engine.sparsity

    @property
    def end(self) -> float:
        """The nominal time of the last update."""
        return self._schedule.end

    @property
    def finished(self) -> bool:
        """Whether the last update has been made, and the final sparsity reached."""
        return self._last is not None and self._last >= self._schedule.end and not self._behind

    @property
    def next_update(self) -> float | None:
        """The nominal time of the next update; None after the last one."""
        if self.finished:
            return None
        return self._schedule.start if self._last is None else self._schedule.following_time(self._last)

    @property
    def _schedule(self) -> Schedule:
        return next(iter(self._schedules.values()))

    @property
    def _behind(self) -> bool:
        """Whether less is pruned than the schedule ends with."""
        return any(self._engine.reached[key] < s.final_sparsity for key, s in self._schedules.items())

    def __repr__(self) -> str:
        """Return sparsity, time and updates, each beside what it leads to."""
        goals = sorted({schedule.final_sparsity for schedule in self._schedules.values()})
        goal = " to ".join(f"{100 * value:.1f}" for value in dict.fromkeys((goals[0], goals[-1])))
        time = "not started" if self._time is None else f"time {self._time:g}"
        coming = "" if self.next_update is None else f", next at {self.next_update:g}"
        return (
            f"Pruner(sparsity {100 * self.sparsity:.1f} % of {goal} %, {time} of {self._schedule.end:g}, "
            f"{self._updates} updates{coming})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and files hold."""
        return {**self.__dict__, "_stepped": False, "_handle": None}

    def __del__(self) -> None:
        """Warn if training ended before the schedule did."""
        if getattr(self, "_stepped", False):
            _warn_if_unfinished(self)

    def step(self, time: float | None = None) -> PruneResult | None:
        """Enforce the masks and prune if an update is due; call it after ``optimizer.step()``.

        Args:
            time: An increasing number in the unit of ``start``, ``end`` and ``frequency``, such as the epoch as a
                float. Without it, the number of calls so far, this one included.

        Returns:
            What the update did, or None if none was due or the sparsity does not rise.

        Raises:
            TypeError: If the time is not a number.
            ValueError: If it is not finite, or gradients cannot be collected.
        """
        time = self._calls + 1 if time is None else check_number("time", time)
        if self._time is not None and time < self._time:
            warn(f"time: expected it to increase, got {time:g} after {self._time:g}")
        if not self._stepped:
            self._engine.warn_of_zeros()
        self._calls += 1
        self._time, self._stepped = time, True
        _STEPPED.add(self)
        with torch.inference_mode(False):
            self.apply_masks()
            if not self.due(time):
                return None
            now = self._schedule.nominal_time(time)
            # A run that goes on with another schedule keeps its sparsity until that has caught up.
            reached = self._engine.reached
            sparsities = {key: max(reached[key], schedule.sparsity(now)) for key, schedule in self._schedules.items()}
            # Nothing to prune, as at a start from zero: no gradients are collected, but to correct what is pruned.
            if sparsities == reached and not self._corrections_due(sparsities):
                self._began, self._last = None, now
                return None
            self._began = self._began or dict(reached)
            result = self._update(sparsities)
            self._began = None
        self._last = now
        self._updates += 1
        self.results.append((time, dataclasses.replace(result, masks={})))
        return result

    def due(self, time: float) -> bool:
        """Return whether an update is due.

        Args:
            time: As for :meth:`step`.

        Returns:
            Whether :meth:`step` would make an update at that time, or find that there is nothing left to prune.
        """
        # The end is also due to a run that goes on with another end or sparsity than it began with.
        late = time >= self._schedule.end and self._behind
        return late or self._schedule.due(time, self._last)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Hold further weights at zero, such as those that another Pruner of the same model has pruned.

        They count as pruned: the next update goes on from them, and never undoes them.

        Args:
            masks: Name -> bool tensor, True = kept, of some of :attr:`params`.

        Raises:
            TypeError: If it is not a mapping.
            ValueError: If a name, type or shape does not fit; nothing is changed then.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(4, 1)
            >>> pruner = Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
            >>> pruner.hold({"weight": torch.tensor([[True, True, True, False]])})
            >>> result = pruner.step()
            >>> pruner.sparsity, pruner.masks["weight"][0, 3].item()
            (0.5, False)
        """
        if not self._engine.hold(masks):
            return
        self.apply_masks()
        reached = self._engine.reached
        above = [key for key, schedule in self._schedules.items() if reached[key] > schedule.final_sparsity]
        if above:
            members = dict(self._engine.selection.segments)
            warn(
                f"sparsity: expected at least the {reached[above[0]]:g} that is held already of "
                f"{shorten([name for key in above for name in members[key]], 3)}, got "
                f"{self._schedules[above[0]].final_sparsity:g}; pruned weights stay pruned"
            )

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self._engine.model

    def _corrections_due(self, sparsities: Sparsities) -> bool:
        """Whether an update to there was interrupted, and makes corrections."""
        engine = self._engine
        if self._began is None or self._source is None:
            return False
        return engine.num_corrections(engine.with_update(self._began, sparsities)["update"]) > 0

    def _update(self, sparsities: Sparsities) -> PruneResult:
        settings, buffer = self._engine.given, self._buffer
        if buffer is not None and len(buffer) < buffer.num_grads:
            warn(f"buffer: only {len(buffer)} of {buffer.num_grads} gradients so far")
        if self._source is not None:
            self._engine.resize(self._source)
        try:
            return run(
                self._engine,
                buffer if self._source is None else self._source,
                sparsities,
                settings["recomputations"],
                began=self._began,
                progress=settings["progress"],
            )
        finally:
            if self._source is not None:
                self._source.release()  # memory; and until the next update the model is trained

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call :meth:`step` after every step of an optimizer from now on, in place of calls in the training loop.

        Steps that a GradScaler skips do not count. Time is the number of steps. Copies of the Pruner are not attached.

        Args:
            optimizer: The one that trains the model.

        Returns:
            A handle; its ``remove()`` ends it.

        Raises:
            TypeError: If it is not a torch optimizer.
            ValueError: If it does not hold the parameters that are pruned, as one that keeps float32 master copies of
                them: these would bring pruned weights back; or the Pruner is attached already.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(20, 2)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> pruner = Pruner(model, sparsity=0.5, end=1, criterion="magnitude")
            >>> handle = pruner.attach(optimizer)
            >>> model(torch.randn(4, 20)).sum().backward()
            >>> optimizer.step()
            >>> pruner.sparsity
            0.5
        """
        check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        self.check_optimizer(optimizer)
        if self._handle is not None and self._handle.id in (self._handle.hooks_dict_ref() or {}):
            raise ValueError(
                "optimizer: expected a Pruner that is not attached, got one that is; remove() its handle first"
            )

        def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
            # A fused optimizer is called also where a GradScaler has found infinite gradients: it skips the step itself
            found = getattr(stepped, "found_inf", None)
            if found is None or not found.item():
                self.step()

        self._handle = optimizer.register_step_post_hook(after_step)
        return self._handle

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that an optimizer trains the very parameters that are pruned.

        Args:
            optimizer: Any optimizer.

        Raises:
            ValueError: If it does not hold one of them.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in self.params.items():
            if p.requires_grad and id(p) not in held:
                raise ValueError(
                    f"optimizer: expected the model's own parameter {name!r} among its parameters, got others: one "
                    "that keeps float32 master copies would bring pruned weights back; prune the float32 model and "
                    "train it under torch.autocast"
                )

    def apply_masks(self) -> None:
        """Set the pruned weights to zero."""
        self._engine.apply_masks()

    def plan(self) -> list[PlannedUpdate]:
        """Return the updates to come: when, to which sparsity, and how many gradients they take.

        Returns:
            The updates that prune, or correct what an interrupted one has pruned.

        Raises:
            MemoryError: If their gradients do not fit into memory; the text says what would.

        Example:
            >>> import torch
            >>> pruner = Pruner(torch.nn.Linear(20, 2), sparsity=0.8, end=2, criterion="magnitude", schedule="linear")
            >>> [(update.time, update.sparsity) for update in pruner.plan()]
            [(1, 0.4), (2, 0.8)]
        """
        collects = self._source is not None
        return plan_updates(self._engine, self._schedules, self._times_to_come(), collects, self._began)

    def _times_to_come(self) -> Iterator[float]:
        """Yield the nominal times of the updates that are left: of those that are due already only the last."""
        waiting = self._schedule.end if self._last is not None and self._behind else None  # should nothing follow
        for time in self._schedule.nominal_times():
            if self._last is not None and time <= self._last:
                continue
            if self._time is None or time > self._time:
                if waiting is not None and waiting < time:
                    yield waiting
                waiting = None
                yield time
            else:
                waiting = time
        if waiting is not None:
            yield waiting

    def layer_sparsities(self) -> dict[str, tuple[float | None, float]]:
        """Return the sparsity of each parameter: what is asked of it now, and the share of its weights that is zero.

        Returns:
            Name -> (asked, reached); asked is None before the first update, and where parameters are ranked together.

        Raises:
            RuntimeError: If a pruned weight is not zero, or the masks hold another number than was asked for: the
                model was changed without :meth:`step`.
        """
        engine, asked = self._engine, {}
        params, masks = self.params, engine.masks
        for name, mask in masks.items():
            if bool(whole(params[name])[~mask.to(params[name].device)].any()):
                raise RuntimeError(f"model: expected the pruned weights of {name!r} to be zero, got others")
        if masks and self._last is not None:
            held = engine.mask_sparsities
            for key, _ in engine.selection.segments:
                due, names = engine.reached[key], engine.reached_names(key)
                size = sum(engine.selection.sizes[name] for name in names)
                if abs(held[key] - due) * size > 0.5 * engine.selection.pattern.pruned + 0.5:
                    raise RuntimeError(
                        f"model: expected a sparsity of {due:g} of {shorten(names, 3)}, got {held[key]:g}"
                    )
                if len(names) == 1:
                    asked[names[0]] = due
        return {name: (asked.get(name), float((whole(p) == 0).float().mean())) for name, p in params.items()}

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero; call it before gradients are clipped, whose norm counts them."""
        mask_gradients(self.params, self._engine.masks)

    def state_dict(self, *, gradients: bool = False, results: bool = False) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` of a Pruner with the same arguments needs to go on as if uninterrupted.

        Masks, progress, settings, and the place in ``batches``. ``torch.load(..., weights_only=True)`` reads it, and so
        does torch.distributed.checkpoint, which loads into the state of a new Pruner: it has the same keys and shapes.

        Args:
            gradients: With the gradients of a buffer that the training loop feeds, which are many.
            results: With :attr:`results`.

        Returns:
            Plain numbers, strings, lists, dicts and tensors.
        """
        engine = self._engine
        state = {
            "masks": {name: mask.clone() for name, mask in complete_masks(self.masks, self.params).items()},
            "calls": self._calls,
            "updates": self._updates,
            "time": self._time,
            "last": self._last,
            "reached": _with_names(engine.reached),
            "began": _with_names(self._began or dict.fromkeys(self._schedules)),
            "unreached": sorted(engine.unreached),
            "initial": _with_names({key: schedule.initial_sparsity for key, schedule in self._schedules.items()}),
            "settings": {name: engine.given[name] for name in _SAVED_SETTINGS},
            "names": list(engine.names),
            "source": None if self._source is None else self._source.state_dict(),
        }
        if gradients and self._buffer is not None:
            state["buffer"] = self._buffer.state_dict()
        if results:
            state["results"] = [(time, result.to_dict()) for time, result in self.results]
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restore a state, and enforce the masks. The schedule may be another than that of the saved run.

        Args:
            state: From :meth:`state_dict`.
            strict: Refuse a state whose settings (damping, pattern, ...) are others than this Pruner's.

        Raises:
            ValueError: If it belongs to other parameters, sparsities or settings; nothing is changed then.
        """
        self.restore(state, strict)
        self.apply_masks()

    def restore(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Do as :meth:`load_state_dict`, but leave the weights as they are.

        Args:
            state: From :meth:`state_dict`.
            strict: See :meth:`load_state_dict`.
        """
        self.check_state_dict(state, strict)
        engine, params = self._engine, self.params
        results = [(time, PruneResult.from_dict(values)) for time, values in state.get("results", ())]
        masks, reached, initial = state["masks"], _with_keys(state["reached"]), _with_keys(state["initial"])
        masks = check_masks("state", masks, params)
        if all(bool(mask.all()) for mask in masks.values()):
            masks = {}  # nothing is pruned yet
        if "buffer" in state and self._buffer is not None:
            self._buffer.load_state_dict(state["buffer"])
        if self._source is not None and state["source"] is not None:
            self._source.load_state_dict(state["source"])
        engine.masks = {name: masks[name].to(p.device, copy=True) for name, p in params.items() if masks}
        engine.reached, engine.unreached = reached, frozenset(state.get("unreached", ()))
        if engine.given["initial_sparsity"] == "current":  # of the model as it was at first
            for key, schedule in self._schedules.items():
                self._schedules[key] = dataclasses.replace(schedule, initial_sparsity=initial[key])
        self._calls, self._updates = state["calls"], state["updates"]
        self._time, self._last = state["time"], state["last"]
        began = _with_keys(state.get("began", {}))
        self._began = began if began and None not in began.values() else None
        self.results = results

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Check a state without loading it.

        Args:
            state: From :meth:`state_dict`.
            strict: See :meth:`load_state_dict`.

        Raises:
            ValueError: If it belongs to other parameters, sparsities or settings.
        """
        engine = self._engine
        missing = {"masks", "calls", "updates", "time", "last", "reached", "initial", "settings", "names", "source"}
        missing -= set(state)
        if missing:
            raise ValueError(
                f"state: expected the keys of Pruner.state_dict(), got none of {', '.join(sorted(missing))}"
            )
        if list(state["names"]) != engine.names:
            raise ValueError(f"state: expected the parameters {shorten(engine.names)}, got {shorten(state['names'])}")
        for part in ("reached", "initial", "began"):
            values = check_instance(f"state[{part!r}]", state.get(part, {}), Mapping, "sparsities by key")
            if set(_with_keys(values)) != set(self._schedules) and (part != "began" or values):
                raise ValueError(f"state: expected sparsities for {list(self._schedules)}, got {list(values)}")
        for value in state.get("began", {}).values():
            if value is not None:
                check_sparsity("state['began']", value)
        unknown = set(state.get("unreached", ())) - set(engine.names)
        if unknown:
            raise ValueError(f"state: expected parameters {shorten(engine.names)}, got {shorten(sorted(unknown))}")
        for name in ("calls", "updates"):
            check_int(f"state[{name!r}]", state[name], 0)
        for name in ("time", "last"):
            if state[name] is not None:
                check_number(f"state[{name!r}]", state[name])
        for _, values in state.get("results", ()):
            PruneResult.from_dict(values)
        for name, value in state["settings"].items():
            if strict and name not in engine.given:
                raise ValueError(f"state: expected settings of this version, got {name!r}; strict=False ignores it")
            if strict and value != engine.given[name]:
                raise ValueError(
                    f"state: expected {name}={engine.given[name]!r} like this Pruner, got {value!r}; strict=False "
                    "goes on with the new one"
                )
        masks = check_masks("state", state["masks"], self.params)
        missing = set(self.params) - set(masks)
        if masks and missing:
            raise ValueError(f"state: expected a mask for each parameter, got none for {shorten(sorted(missing))}")


def _with_names(values: Mapping[str | None, float]) -> dict[str, float]:
    """Return values by key as a file holds them: the key of a global ranking is the empty string there."""
    return {key or "": value for key, value in values.items()}


def _with_keys(values: Mapping[str | None, float]) -> dict[str | None, float]:
    """Return values by key of a file; older ones have None as key."""
    return {key or None: value for key, value in values.items()}
