"""Modifiers that freeze parameters and that set them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfac.distributed.shards import local, part_of, reshard
from mfac.model.names import NameTable, named_parameters
from mfac.recipe.modifiers.base import Action, Modifier, Target, flag, names


def _matching(model: nn.Module, params: list[str], strict: bool) -> list[str]:
    """Return the names of parameters, of any layer, that the entries of a recipe match."""
    table, every = NameTable.of_model(model), list(named_parameters(model))
    found: set[str] = set()
    for entry in params:
        matched = every if entry == "__ALL__" else table.find(entry)
        if not matched and strict:
            raise ValueError(f"params: expected names of parameters, got {entry!r:.80}, which matches none")
        found.update(matched)
    return [name for name in every if name in found]


@dataclass(kw_only=True)
class TrainableParams(Modifier):
    """Make parameters trainable, or freeze them, from `start_epoch` to `end_epoch`; then they are as before."""

    params: Any
    trainable: Any = True
    params_strict: Any = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self.params = names("params", self.params)
        self.trainable = flag("trainable", self.trainable)
        self.params_strict = flag("params_strict", self.params_strict)

    def bind(self, target: Target) -> Action | None:
        """Return what sets `requires_grad`."""
        found = _matching(target.model, self.params, self.params_strict)
        return None if target.one_shot else Trainable(self, target.model, found)


class Trainable(Action):
    """Parameters whose `requires_grad` is set for a time.

    Args:
        modifier: Which value, and from when to when.
        model: The model.
        found: Names of the parameters.

    Attributes:
        peers: All actions of this kind in the recipe, by the epoch at which they begin: the last one that lasts counts.
    """

    early = True

    def __init__(self, modifier: TrainableParams, model: nn.Module, found: list[str]) -> None:
        self._model, self._trainable = model, modifier.trainable
        self._start, self._end = modifier.start_epoch, modifier.end_epoch if modifier.end_epoch > 0 else math.inf
        every = named_parameters(model)
        self._before = {name: every[name].requires_grad for name in found}
        self._active = False
        self.peers: list[Trainable] = [self]

    @property
    def thawed(self) -> list[str]:
        """Names of frozen parameters that it makes trainable."""
        return [name for name, before in self._before.items() if self._trainable and not before]

    def _set(self, active: bool) -> None:
        self._active = active
        every = named_parameters(self._model)
        for name, value in self._before.items():
            for peer in self.peers:
                value = peer._trainable if peer._active and name in peer._before else value
            every[name].requires_grad_(value)
            if not value:
                every[name].grad = None  # which an optimizer would go on to apply

    def step(self, last: float, epoch: float) -> None:
        """Begin or end."""
        active = self._start <= epoch < self._end
        if active != self._active:
            self._set(active)

    def state_dict(self) -> dict[str, Any]:
        """Return whether it lasts, and what there was before."""
        return {"active": self._active, "before": dict(self._before)}

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Check the names."""
        before = state.get("before")
        if not isinstance(before, Mapping) or list(before) != list(self._before):
            raise ValueError(f"state: expected requires_grad of {', '.join(self._before):.200}, got {before!r:.80}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, and set the parameters."""
        self._before = dict(state["before"])
        self._set(bool(state["active"]))


@dataclass(kw_only=True)
class SetParam(Modifier):
    """Set parameters to a value once: a number, or nested lists of their shape."""

    params: Any
    val: Any
    params_strict: Any = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self.params = names("params", self.params)
        self.params_strict = flag("params_strict", self.params_strict)
        try:
            self.val = torch.tensor(self.val, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"val: expected a number or nested lists of numbers, got {self.val!r:.80}") from error
        if not bool(self.val.isfinite().all()):
            raise ValueError(f"val: expected finite numbers, got {self.val!s:.80}")

    def bind(self, target: Target) -> Action:
        """Return what sets the parameters."""
        every = named_parameters(target.model)
        found = _matching(target.model, self.params, self.params_strict)
        for name in found:
            if self.val.dim() and self.val.shape != every[name].shape:
                raise ValueError(
                    f"val: expected a number or the shape {list(every[name].shape)} of {name!r}, got shape "
                    f"{list(self.val.shape)}"
                )
        return _Fill(target.model, found, self.val, 0.0 if target.one_shot else self.start_epoch)


class _Fill(Action):
    early = writes = True

    def __init__(self, model: nn.Module, found: list[str], value: Tensor, start: float) -> None:
        self._model, self._names, self._value, self._start = model, found, value, start
        # Of each filled parameter the values before training, those that were set, and its version then.
        self._undo: dict[str, tuple[Tensor, Tensor, int]] = {}

    def step(self, last: float, epoch: float) -> None:
        self._undo = {}
        if last < max(self._start, 0.0) <= epoch:
            reshard(self._model)
            every = named_parameters(self._model)
            for name in self._names:
                p, own = every[name], local(every[name])
                before = own.clone()
                own.copy_(part_of(self._value, p) if self._value.dim() else self._value)
                if last == -math.inf:
                    self._undo[name] = before, own.clone(), p._version

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what was set when the recipe was applied: the run that goes on has set it long ago."""
        reshard(self._model)
        every = named_parameters(self._model)
        for name, (before, filled, version) in self._undo.items():
            p, own = every[name], local(every[name])
            # Else the model was loaded after that; a checkpoint that is read into a DTensor's part keeps its version.
            if p._version == version and torch.equal(own, filled):
                own.copy_(before)
        self._undo = {}
