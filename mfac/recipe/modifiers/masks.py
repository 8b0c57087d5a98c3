"""Modifiers that hold masks which follow from the weights as they are: ConstantPruning and AC/DC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfac.distributed.shards import reshard, whole
from mfac.model.names import named_parameters
from mfac.model.targets import prunable_parameters
from mfac.pruning.masks import check_masks, zero_pruned
from mfac.pruning.result import PruneResult
from mfac.pruning.step import prune_step
from mfac.recipe.modifiers.base import ROUNDING, Action, Modifier, Target, flag, fraction, names, positive
from mfac.recipe.modifiers.pruning import pattern_of


class _Masked(Action):
    """Holds masks of a few parameters, by name."""

    def __init__(self, model: nn.Module, params: list[str]) -> None:
        self._model, self._names = model, list(prunable_parameters(model, params))
        self.masks: dict[str, Tensor] = {}

    def _params(self) -> dict[str, nn.Parameter]:
        reshard(self._model)
        every = named_parameters(self._model)
        return {name: every[name] for name in self._names}

    def enforce(self) -> None:
        zero_pruned(self._params(), self.masks)

    def state_dict(self) -> dict[str, Any]:
        return {"masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        if not isinstance(state.get("masks"), Mapping):
            raise ValueError(f"state: expected masks, got {sorted(map(str, state))!r:.80}")
        check_masks("state", state["masks"], self._params())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.masks = {name: mask.clone() for name, mask in state["masks"].items()}
        self.enforce()


@dataclass(kw_only=True)
class ConstantPruning(Modifier):
    """Hold the weights at zero that are zero at `start_epoch`."""

    prunes: ClassVar[bool] = True

    params: Any
    update_frequency: Any = None  # ignored, as in the original

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self.params = names("params", self.params)

    def settled(self, end: float) -> float:
        """Return the epoch from which on the masks are held."""
        return max(self.start_epoch, 0.0)

    def bind(self, target: Target) -> Action:
        """Return what holds the masks: from before training on if `start_epoch` is 0."""
        return _Constant(target, self.params, self.start_epoch, self.end_epoch)


class _Constant(_Masked):
    early = True

    def __init__(self, target: Target, params: list[str], start: float, end: float) -> None:
        super().__init__(target.model, params)
        self._start, self._end = start, math.inf if end < 0 or end >= target.end > 0 else end
        if target.one_shot:
            self._start, self._end = 0.0, math.inf

    def permanent(self, epoch: float) -> bool:
        return self._end == math.inf

    def step(self, last: float, epoch: float) -> None:
        if last < max(self._start, 0.0) <= epoch:
            self.masks = {name: whole(p) != 0 for name, p in self._params().items()}
        self.enforce()
        if epoch >= self._end:
            self.masks = {}


@dataclass(kw_only=True)
class ACDCPruning(Modifier):
    """Alternate dense and sparse phases of `update_frequency` epochs (AC/DC; Peste et al., 2021, arXiv 2106.12379).

    The first phase is dense and the last one sparse: a dense one at the end is left out. If there is one phase only, it
    is sparse. A sparse phase begins by pruning the smallest weights, a dense one by releasing them and, with
    `momentum_buffer_reset`, setting the momentum of SGD to zero.
    """

    prunes: ClassVar[bool] = True

    compression_sparsity: Any
    end_epoch: float = field()  # required
    update_frequency: Any = field()
    params: Any
    global_sparsity: Any = True
    leave_enabled: Any = True
    momentum_buffer_reset: Any = True
    mask_type: Any = "unstructured"

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self.params = names("params", self.params)
        self.compression_sparsity = fraction("compression_sparsity", self.compression_sparsity)
        self.update_frequency = positive("update_frequency", self.update_frequency)
        for name in ("global_sparsity", "leave_enabled", "momentum_buffer_reset"):
            setattr(self, name, flag(name, getattr(self, name)))
        self.mask_type = pattern_of(self.mask_type)
        start = max(self.start_epoch, 0.0)
        if self.end_epoch <= start:
            raise ValueError(f"end_epoch: expected above start_epoch = {start:g}, got {self.end_epoch:g}")
        phases = math.ceil((self.end_epoch - start) / self.update_frequency - ROUNDING)
        self.last_phase = max(phases - phases % 2 - 1, 0)  # with room for one only, that one is sparse

    def sparse(self, epoch: float) -> bool:
        """Return whether the phase of an epoch is sparse, as every second one is, and all from the last one on."""
        phase = math.floor((epoch - max(self.start_epoch, 0.0)) / self.update_frequency + ROUNDING)
        return phase % 2 == 1 or phase >= self.last_phase

    def settled(self, end: float) -> float:
        """Return the epoch at which the last sparse phase begins."""
        return max(self.start_epoch, 0.0) + self.last_phase * self.update_frequency

    def warnings(self, end: float) -> list[str]:
        """Return a warning if training ends before the last sparse phase begins."""
        last = self.settled(end)
        if last <= end:
            return []
        return [
            f"end_epoch: expected the last sparse phase to begin within the {end:g} epochs of training, "
            f"got epoch {last:g}"
        ]

    def bind(self, target: Target) -> Action:
        """Return what holds the masks in sparse phases."""
        return _Alternating(self, target)


class _Alternating(_Masked):
    def __init__(self, modifier: ACDCPruning, target: Target) -> None:
        super().__init__(target.model, modifier.params)
        self._modifier, self._optimizer, self._one_shot = modifier, target.optimizer, target.one_shot

    def permanent(self, epoch: float) -> bool:
        return self._one_shot or (self._modifier.leave_enabled and epoch >= self._modifier.settled(math.inf))

    def step(self, last: float, epoch: float) -> PruneResult | None:
        modifier, result = self._modifier, None
        if not self._one_shot and epoch < max(modifier.start_epoch, 0.0):
            return None
        sparse = self._one_shot or modifier.sparse(epoch)
        if not self._one_shot and epoch >= modifier.end_epoch and not modifier.leave_enabled:
            self.enforce()
            self.masks = {}
            return None
        if sparse and not self.masks:
            result = prune_step(
                self._model,
                None,
                modifier.compression_sparsity,
                criterion="magnitude",
                params=self._names,
                scope="global" if modifier.global_sparsity else "layer",
                pattern=modifier.mask_type,
                masks={name: torch.ones_like(p, dtype=torch.bool) for name, p in self._params().items()},
            )
            self.masks = dict(result.masks)
        elif not sparse and self.masks:
            self.masks = {}
            if modifier.momentum_buffer_reset and self._optimizer is not None:
                for state in self._optimizer.state.values():
                    if isinstance(state.get("momentum_buffer"), Tensor):
                        state["momentum_buffer"].zero_()
        self.enforce()
        return result
