"""Gradual pruning, used like an optimizer."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfac.fisher import check_precision
from mfac.gradients.buffer import GradientBuffer, check_grads_device
from mfac.gradients.collect import GradientSource
from mfac.model.names import named_parameters
from mfac.model.targets import names_of, prunable_parameters
from mfac.ops.backend import BACKENDS
from mfac.pruning.quadratic import check_settings
from mfac.pruning.result import PruneResult
from mfac.pruning.schedule import Schedule, between
from mfac.pruning.selection import Selection, sparsity_groups
from mfac.pruning.step import Problem, check_method, prune_problem


class Pruner:
    """Raises the sparsity of a model along a schedule while it trains, and holds the masks.

    Call :meth:`step` after every ``optimizer.step()``: it sets pruned weights back to zero and prunes when an update is
    due. Nothing is hooked into the model, so copies, compiled and saved models are ordinary ones. Parameters are looked
    up by name at each use: the model may be moved to another device or have them replaced.

    Each update may be split into R ``recomputations``: R steps at equal ratios of the remaining weights, with new
    gradients at each. A big jump at once defeats every quadratic model; with R = 8 most of the accuracy survives.

    Args:
        model: Its weights are written.
        batches: Iterable of (inputs, targets) or dicts, gone through again and again; ``num_grads`` of them make the
            gradients of each recomputation (see :func:`collect_gradients`). A loader that shuffles draws,
            whenever it starts again, from a seed of the Pruner's own that follows from torch's; torch's random state
            stays.
        loss_fn: Loss of (outputs, targets); needed with ``batches``.
        sparsity: Final sparsity: a float, or a dict of them by name or ``"re:<regex>"`` (others are left alone, unless
            ``params`` or the buffer has them: then they stay dense, but take part in the updates).
        initial_sparsity: Sparsity at the first update.
        start: Time of the first update.
        end: Time of the last update, which gives ``sparsity`` exactly.
        frequency: Time between updates.
        schedule: ``"cubic"``, ``"linear"`` or ``"inverse_cubic"``.
        recomputations: R >= 1.
        num_grads: m gradients of the Fisher.
        refresh: How many of them are new at each recomputation but the first of an update, the others being kept from
            the ones before (rolling gradients); None: all.
        params: What to prune; see :func:`prunable_parameters`.
        damping: See :func:`prune_step`, as for the next four.
        block_size: Columns per block of the Fisher.
        pattern: How weights group.
        scope: ``"global"`` or ``"layer"``.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        criterion: ``"fisher"``, or ``"magnitude"``, which needs neither batches nor buffer, and then updates nothing;
            given one of them, it makes the ``update``.
        substeps: Sub-steps of selection and update under the same gradients.
        dtype: Type of collected gradients.
        grads_device: Where they are kept: the model's device, or ``"cpu"`` if they do not fit there.
        buffer: A :class:`GradientBuffer` that the training loop feeds, in place of ``batches``.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.
        precision: See :func:`prune_step`.
        progress: Show progress bars while gradients are collected.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value or name is wrong, or both of ``batches`` and ``buffer`` are given, or neither for
            ``criterion="fisher"``.

    Attributes:
        masks: Name -> bool tensor, True = kept; empty before the first update.
        results: (time, :class:`PruneResult`) of every update, without its masks: those of the last are in ``masks``.

    Example:
        >>> model = torch.nn.Linear(20, 2)
        >>> data = [(torch.randn(8, 20), torch.randint(2, (8,))) for _ in range(4)]
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = Pruner(model, data, loss_fn, sparsity=0.9, end=6, frequency=3, num_grads=4)
        >>> for inputs, targets in data * 2:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(inputs), targets).backward()
        ...     optimizer.step()
        ...     result = pruner.step()
        >>> pruner.sparsity
        0.9
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        sparsity: float | Mapping[str, float],
        initial_sparsity: float = 0.0,
        start: float = 0,
        end: float,
        frequency: float = 1,
        schedule: str = "cubic",
        recomputations: int = 1,
        num_grads: int = 256,
        refresh: int | None = None,
        params: str | Iterable[str] | None = None,
        damping: float | str = "3e-2*mean",
        block_size: int | str | None = 512,
        pattern: str | Sequence[int] = "unstructured",
        scope: str = "global",
        update: str = "joint",
        criterion: str = "fisher",
        substeps: int = 8,
        dtype: torch.dtype = torch.float32,
        grads_device: torch.device | str | None = None,
        buffer: GradientBuffer | None = None,
        backend: str = "auto",
        precision: str = "highest",
        progress: bool = False,
    ) -> None:
        """Check the arguments; the model is not touched."""
        method = check_method(scope, update, criterion, substeps)
        check_settings(damping, block_size)
        sources = (batches is not None) + (buffer is not None)
        if sources > 1 or (sources == 0 and criterion == "fisher"):
            wanted = "exactly one of them for criterion='fisher'" if criterion == "fisher" else "at most one of them"
            raise ValueError(f"batches, buffer: expected {wanted}, got {'both' if sources else 'neither'}")
        if isinstance(recomputations, bool) or not isinstance(recomputations, int) or recomputations < 1:
            raise ValueError(f"recomputations: expected an int >= 1, got {recomputations!r}")
        self._source = (
            None if batches is None else GradientSource(batches, loss_fn, num_grads, refresh, dtype, grads_device)
        )
        if buffer is not None and not isinstance(buffer, GradientBuffer):
            raise TypeError(f"buffer: expected a GradientBuffer, got {type(buffer).__name__}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        if buffer is not None and recomputations > 1:
            raise ValueError(
                f"recomputations: expected 1 with a buffer (fresh gradients need batches), got {recomputations}"
            )
        given = names_of(params)
        self._names = list(prunable_parameters(model, buffer.names if given is None and buffer is not None else given))
        groups = sparsity_groups(self._names, sparsity, scope)
        if given is None and buffer is None and isinstance(sparsity, Mapping):
            named = {name for names, _ in groups for name in names}
            self._names = [name for name in self._names if name in named]
        self._named, self._model = given or [], model
        Selection(prunable_parameters(model, self._names), sparsity, scope, pattern, self._named)  # checks
        if buffer is not None and self._names != buffer.names:
            raise ValueError(
                f"params: expected those of the buffer, {', '.join(buffer.names[:8])}; got {', '.join(self._names[:8])}"
            )
        # One schedule per key of a dict, else one under None.
        final = dict(sparsity) if isinstance(sparsity, Mapping) else {None: sparsity}
        self._schedules = {
            key: Schedule(initial_sparsity, value, start, end, frequency, schedule) for key, value in final.items()
        }
        self._buffer, self._recomputations, self._progress = buffer, recomputations, progress
        self._method, self._settings = method, (damping, block_size)
        self._options = {"pattern": pattern, "scope": scope, "criterion": criterion, "backend": backend}
        self._options["precision"] = check_precision(precision)
        check_grads_device("grads_device", grads_device, next(iter(self._params.values())).device)
        self._calls = 0
        self._last: float | None = None
        self._reached = dict.fromkeys(self._schedules, 0.0)
        self.masks: dict[str, Tensor] = {}
        self.results: list[tuple[float, PruneResult]] = []

    @property
    def _params(self) -> dict[str, nn.Parameter]:
        """The parameters as they are now: the model may have been moved or given others since."""
        params = named_parameters(self._model)
        return {name: params[name] for name in self._names}

    @property
    def sparsity(self) -> float:
        """Share of zeros that the masks hold now, over all chosen parameters."""
        total = sum(p.numel() for p in self._params.values())
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / total if self.masks else 0.0

    def step(self, time: float | None = None) -> PruneResult | None:
        """Enforce the masks and prune if an update is due; call it after ``optimizer.step()``.

        Args:
            time: An increasing number in the unit of ``start``, ``end`` and ``frequency``, such as the epoch as a
                float. Without it, the number of calls so far, this one included.

        Returns:
            What the update did, or None if none was due or the sparsity does not rise.

        Raises:
            TypeError: If the time is not a number.
            ValueError: If it is not finite.
        """
        if time is not None and (isinstance(time, bool) or not isinstance(time, (int, float))):
            raise TypeError(f"time: expected a number or None, got {time!r}")
        if time is not None and not math.isfinite(time):
            raise ValueError(f"time: expected a finite number, got {time!r}")
        self._calls += 1
        time = self._calls if time is None else time
        self.apply_masks()
        schedule = next(iter(self._schedules.values()))  # they differ in sparsity only
        if not schedule.due(time, self._last):
            return None
        first = self._last is None and time < schedule.end
        target = {key: s.initial if first else s.sparsity(time) for key, s in self._schedules.items()}
        if target == self._reached:  # nothing to prune, as at a start from zero: no gradients are collected for it
            self._last = time
            return None
        result = self._prune(target)
        self._last = time
        self.results.append((time, dataclasses.replace(result, masks={})))
        return result

    def apply_masks(self) -> None:
        """Set the pruned weights to zero."""
        params = self._params if self.masks else {}
        with torch.no_grad():
            for name, mask in self.masks.items():
                p = params[name]
                self.masks[name] = mask.to(p.device)
                p.masked_fill_(~self.masks[name], 0)

    def _prune(self, target: dict[str | None, float]) -> PruneResult:
        """Prune to the target by steps at equal ratios of the remaining weights."""
        origin = dict(self._reached)
        try:
            for r in range(1, self._recomputations + 1):
                share = r / self._recomputations
                now = {key: between(origin[key], target[key], share) for key in target}
                problem = Problem(
                    self._model, self._gradients(), now[None] if None in now else now,
                    params=self._names, named=self._named, masks=self.masks or None, **self._options,
                )  # fmt: skip
                result = prune_problem(problem, self._method, *self._settings)
                self.masks, self._reached = result.masks, now
        finally:
            if self._source is not None:
                self._source.release()  # memory; and until the next update the model is trained
        return result

    def _gradients(self) -> GradientBuffer | None:
        if self._source is not None:
            return self._source.collect(self._model, self._names, self._progress)
        if self._buffer is not None and len(self._buffer) < self._buffer.num_grads:
            warnings.warn(
                f"buffer: only {len(self._buffer)} of {self._buffer.num_grads} gradients so far", stacklevel=4
            )
        return self._buffer

    def state_dict(self) -> dict[str, Any]:
        """Return masks, progress and random state, for :meth:`load_state_dict` of a Pruner with the same arguments.

        The place in ``batches`` is not among them: after a restart these are gone through from their beginning.
        """
        return {
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
            "calls": self._calls,
            "last": self._last,
            "reached": dict(self._reached),
            "random": None if self._source is None else self._source.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore masks, progress and random state, and enforce the masks.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ValueError: If it belongs to other parameters or schedules.
        """
        params = self._params
        missing = {"masks", "calls", "last", "reached", "random"} - set(state)
        if missing:
            raise ValueError(f"state: expected the keys of Pruner.state_dict(), missing {', '.join(sorted(missing))}")
        for name, mask in state["masks"].items():
            if name not in params or mask.shape != params[name].shape or mask.dtype != torch.bool:
                got = f"{mask.dtype} and shape {list(mask.shape)}"
                raise ValueError(f"state: mask {name!r} of {got} fits no parameter of this Pruner")
        if state["masks"] and set(state["masks"]) != set(params):
            raise ValueError(f"state: no masks for {', '.join(set(params) - set(state['masks']))}")
        if set(state["reached"]) != set(self._schedules):
            raise ValueError(
                f"state: expected sparsities for {sorted(self._schedules)}, got {sorted(state['reached'])}"
            )
        if self._source is not None and state["random"] is not None:
            self._source.set_state(state["random"])
        self.masks = {name: mask.to(params[name].device, copy=True) for name, mask in state["masks"].items()}
        self._calls, self._last, self._reached = state["calls"], state["last"], dict(state["reached"])
        self.apply_masks()
