"""Modifiers that set the optimizer's learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from mfac.checks import check_choice, check_int
from mfac.recipe.modifiers.base import ROUNDING, Action, Modifier, Target, number, plain_number, positive


def _linear(x: float) -> float:
    return x


def _cosine(x: float) -> float:
    return (1 - math.cos(math.pi * x)) / 2


# Of the share x of the way (or of the cycle) from init_lr to final_lr.
_FUNCTIONS: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "cyclic_linear": _linear}
# Arguments of torch's schedulers by the format's names, with torch's defaults; None: the recipe must give it.
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": None, "gamma": 0.1},
    "MultiStepLR": {"milestones": None, "gamma": 0.1},
    "ExponentialLR": {"gamma": None},
    "CosineAnnealingWarmRestarts": {"cycle_epochs": None, "lr_min": 0.0, "T_mult": 1},
}
_SPELLINGS = {"T_0": "cycle_epochs", "eta_min": "lr_min"}  # of torch -> of the format
_MAX_DECAYS = 1e15  # bounds the exponent of gamma; the rate is 0 or infinite long before


def _epochs(name: str, value: Any) -> list[float]:
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected numbers in a list, got {value!r:.80}")
    return [number(name, item) for item in value]


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "step_size": positive,
    "milestones": _epochs,
    "gamma": lambda name, value: number(name, value, 0),
    "cycle_epochs": positive,
    "lr_min": lambda name, value: number(name, value, 0),
    "T_mult": lambda name, value: check_int(name, plain_number(value), 1),
}


@dataclass(kw_only=True)
class OptimizerSetting(Modifier):
    """Write one setting of the optimizer's parameter groups when its time has come, and leave it alone afterwards."""

    key: ClassVar[str]  # the entry of `optimizer.param_groups`

    param_groups: list[int] | None = None  # indices of the groups; None: all of them
    constant_logging: Any = None  # ignored

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if self.param_groups is not None:
            if not isinstance(self.param_groups, list):
                raise TypeError(f"param_groups: expected a list of indices, got {self.param_groups!r:.80}")
            self.param_groups = [check_int("param_groups", index, 0) for index in self.param_groups]

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Return the optimizer's parameter groups that the setting applies to.

        Args:
            optimizer: Any optimizer.

        Returns:
            The groups.

        Raises:
            ValueError: If the optimizer has no such group.
        """
        groups = optimizer.param_groups
        if self.param_groups is None:
            return groups
        for index in self.param_groups:
            if index >= len(groups):
                raise ValueError(f"param_groups: expected indices below the optimizer's {len(groups)}, got {index}")
        return [groups[index] for index in self.param_groups]

    @property
    def until(self) -> float:
        """The epoch from which on the setting is left alone."""
        return self.start_epoch

    def due(self, last: float, epoch: float) -> bool:
        """Return whether to write the value at an epoch, `last` being that of the call before."""
        return epoch >= self.start_epoch and last < self.until

    def value(self, epoch: float) -> float:
        """Return the value at an epoch."""
        raise NotImplementedError

    def bind(self, target: Target) -> Action | None:
        """Return what writes into the optimizer."""
        if target.optimizer is None:
            return None
        if any(self.key not in group for group in self.groups(target.optimizer)):
            raise ValueError(
                f"optimizer: expected one with {self.key}, got {type(target.optimizer).__name__}, which has none"
            )
        return Write(self, target.optimizer)


class Write(Action):
    """Writes the value of a setting into an optimizer while its time lasts.

    Args:
        setting: The modifier.
        optimizer: The optimizer.

    Attributes:
        setting: As given.
        written_at: Epoch of the last time; -inf before.
    """

    early = True

    def __init__(self, setting: OptimizerSetting, optimizer: torch.optim.Optimizer) -> None:
        self.setting, self._optimizer = setting, optimizer
        self._written: float | None = None
        self.written_at = -math.inf

    def rewrite(self) -> None:
        """Write the last value once more."""
        if self._written is not None:
            for group in self.setting.groups(self._optimizer):
                group[self.setting.key] = self._written

    def step(self, last: float, epoch: float) -> None:
        """Write if it is time to."""
        setting = self.setting
        if setting.due(last, epoch):
            self._written, self.written_at = setting.value(epoch), epoch
            self.rewrite()

    def state_dict(self) -> dict[str, Any]:
        """Return the values as they are, which a scheduler may have changed."""
        setting = self.setting
        values = [float(group[setting.key]) for group in setting.groups(self._optimizer)]
        return {"values": values, "written": self._written, "written_at": self.written_at}

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Check the number of values."""
        values, count = state.get("values"), len(self.setting.groups(self._optimizer))
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"state: expected {self.setting.key} of {count} parameter groups, got {values!r:.80}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Write the values."""
        self._written, self.written_at = state["written"], state["written_at"]
        for group, value in zip(self.setting.groups(self._optimizer), state["values"], strict=True):
            group[self.setting.key] = value


@dataclass(kw_only=True)
class SetOnce(OptimizerSetting):
    """Set a value once: a scheduler of the training program may change it afterwards."""

    argument: ClassVar[str]  # the recipe's name for the value

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        setattr(self, self.argument, number(self.argument, getattr(self, self.argument), 0))

    def value(self, epoch: float) -> float:
        """Return the value."""
        return getattr(self, self.argument)


@dataclass(kw_only=True)
class SetLearningRate(SetOnce):
    """Set the learning rate."""

    key = "lr"
    argument = "learning_rate"

    learning_rate: float


@dataclass(kw_only=True)
class SetWeightDecay(SetOnce):
    """Set the weight decay."""

    key = "weight_decay"
    argument = "weight_decay"

    weight_decay: float


@dataclass(kw_only=True)
class LearningRateFunction(OptimizerSetting):
    """Move the learning rate from `init_lr` to `final_lr` along a function of the epoch, at every step."""

    key = "lr"

    lr_func: str
    init_lr: float
    final_lr: float
    end_epoch: float = field()  # required
    cycle_epochs: float = 1.0  # length of a cycle of cyclic_linear
    update_frequency: Any = None  # ignored, as in the original

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_choice("lr_func", self.lr_func, _FUNCTIONS)
        self.init_lr = number("init_lr", self.init_lr, 0)
        self.final_lr = number("final_lr", self.final_lr, 0)
        self.cycle_epochs = positive("cycle_epochs", self.cycle_epochs)
        if self.end_epoch <= max(self.start_epoch, 0.0):
            raise ValueError(f"end_epoch: expected above start_epoch = {self.start_epoch:g}, got {self.end_epoch:g}")

    @property
    def until(self) -> float:
        """The epoch from which on the setting is left alone."""
        return self.end_epoch

    def value(self, epoch: float) -> float:
        """Return the value at an epoch; a cycle ends at `final_lr`, and so does the last, cut short or not."""
        start = max(self.start_epoch, 0.0)
        done, length = min(epoch, self.end_epoch) - start, self.end_epoch - start
        if self.lr_func == "cyclic_linear" and epoch < self.end_epoch:
            cycle = math.floor(done / self.cycle_epochs + ROUNDING)
            done = max(done, cycle * self.cycle_epochs)
            done, length = done - cycle * self.cycle_epochs, min(length - cycle * self.cycle_epochs, self.cycle_epochs)
        return self.init_lr + (self.final_lr - self.init_lr) * _FUNCTIONS[self.lr_func](done / length)


@dataclass(kw_only=True)
class LearningRate(OptimizerSetting):
    """Set the learning rate at every step, from `init_lr` on, as one of torch's schedulers would.

    Its epochs are floats and count from `start_epoch`, but for milestones, which are epochs of the training.
    """

    key = "lr"

    lr_class: str
    lr_kwargs: dict[str, Any] = field(default_factory=dict)
    init_lr: float
    update_frequency: Any = None  # ignored, as in the original

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_choice("lr_class", self.lr_class, _SCHEDULERS)
        self.init_lr = number("init_lr", self.init_lr, 0)
        self.lr_kwargs = self._check_kwargs(_SCHEDULERS[self.lr_class])
        outside = [x for x in self.lr_kwargs.get("milestones", ()) if not max(self.start_epoch, 0.0) < x < self.until]
        if outside:
            raise ValueError(
                f"lr_kwargs: expected milestones between start_epoch = {self.start_epoch:g} and end_epoch = "
                f"{self.end_epoch:g}, in epochs of the training, got {outside[0]:g}"
            )

    def _check_kwargs(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the scheduler under the format's names, with torch's defaults."""
        if not isinstance(self.lr_kwargs, Mapping):
            raise TypeError(f"lr_kwargs: expected arguments of {self.lr_class}, got {self.lr_kwargs!r:.80}")
        given: dict[str, Any] = {}
        for key, value in self.lr_kwargs.items():
            name = _SPELLINGS.get(key, key)
            if name not in known:
                raise ValueError(f"lr_kwargs: expected {', '.join(known)} of {self.lr_class}, got {key!r:.80}")
            if name in given:
                raise ValueError(f"lr_kwargs: expected one value for {name}, got two")
            given[name] = value
        for name, default in known.items():
            if name not in given and default is None:
                raise ValueError(f"lr_kwargs: expected a value of {name}, which {self.lr_class} needs, got none")
        try:
            return {name: _CHECKS[name](name, given.get(name, default)) for name, default in known.items()}
        except (TypeError, ValueError) as error:
            name, _, text = str(error).partition(": ")
            raise ValueError(f"lr_kwargs: {text} for {name}") from error

    @property
    def until(self) -> float:
        """The epoch from which on the setting is left alone."""
        return self.end_epoch if self.end_epoch >= 0 else math.inf

    def due(self, last: float, epoch: float) -> bool:
        """Return whether to write; at the end the last value stays."""
        return self.start_epoch <= epoch < self.until

    def value(self, epoch: float) -> float:
        """Return the value at an epoch."""
        kwargs, passed = self.lr_kwargs, epoch - max(self.start_epoch, 0.0)
        if self.lr_class == "CosineAnnealingWarmRestarts":
            share = _share_of_cycle(passed, kwargs["cycle_epochs"], kwargs["T_mult"])
            return self.init_lr + (kwargs["lr_min"] - self.init_lr) * _cosine(share)
        if self.lr_class == "MultiStepLR":
            drops = sum(epoch >= milestone - ROUNDING for milestone in kwargs["milestones"])
        else:
            drops = math.floor(min(passed / kwargs.get("step_size", 1.0) + ROUNDING, _MAX_DECAYS))
        try:
            rate = self.init_lr * kwargs["gamma"] ** drops
        except OverflowError:
            rate = math.inf
        if rate == math.inf:
            raise ValueError(f"lr_kwargs: expected rates that stay finite, got gamma = {kwargs['gamma']:g}")
        return rate


def _share_of_cycle(passed: float, length: float, growth: int) -> float:
    """Return how much of its cycle has passed, in [0, 1), where each cycle is `growth` times as long as the last."""
    passed += ROUNDING
    while growth > 1 and passed >= length:
        passed, length = passed - length, length * growth
    return max(passed % length - ROUNDING, 0.0) / length
