"""Modifiers that set the optimizer's learning rate and weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mfac.checks import check_int
from mfac.recipe.modifiers.base import Modifier, number


@dataclass(kw_only=True)
class OptimizerSetting(Modifier):
    """Hold one setting of the optimizer's parameter groups at a value from `start_epoch` on."""

    key: ClassVar[str]  # the entry of `optimizer.param_groups`
    argument: ClassVar[str]  # the recipe's name for the value

    param_groups: list[int] | None = None  # indices of the groups; None: all of them
    constant_logging: Any = None  # ignored

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        setattr(self, self.argument, number(self.argument, getattr(self, self.argument), 0))
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

    def update(self, optimizer: torch.optim.Optimizer, epoch: float) -> None:
        """Write the value into the optimizer if `epoch` has reached `start_epoch`."""
        if epoch >= self.start_epoch:
            for group in self.groups(optimizer):
                group[self.key] = getattr(self, self.argument)


@dataclass(kw_only=True)
class SetLearningRate(OptimizerSetting):
    """Set the learning rate."""

    key = "lr"
    argument = "learning_rate"

    learning_rate: float


@dataclass(kw_only=True)
class SetWeightDecay(OptimizerSetting):
    """Set the weight decay."""

    key = "weight_decay"
    argument = "weight_decay"

    weight_decay: float
