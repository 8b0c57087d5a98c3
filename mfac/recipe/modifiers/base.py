"""What all modifiers share, and the values as recipes write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfac.checks import check_number
from mfac.pruning.result import PruneResult

ROUNDING = 1e-9  # of epochs as floats, in cycles and phases


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Check a finite number; numeric strings count, because YAML 1.1 reads `1e-7` as a string.

    Args:
        name: Of the argument, for the error.
        value: As read from the recipe.
        low: The smallest value.
        high: The largest value.

    Returns:
        The number.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite or out of range.
    """
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:  # an int beyond the range of float
            value = math.inf
        except ValueError:
            pass  # a word: refused below, as it was written
    return float(check_number(name, value, low, high))


def plain_number(value: Any) -> Any:
    """Return numbers as the settings of mfac take them; other values as they are.

    Args:
        value: As read from the recipe: `1e-7` and `"256"` are strings there, and 256.0 may stand for 256.

    Returns:
        An int for whole numbers up to 2⁵³, from where on floats are no longer exact; else a float; anything else
        unchanged.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


def positive(name: str, value: Any) -> float:
    """Check a finite number above 0.

    Args:
        name: Of the argument, for the error.
        value: As read from the recipe.

    Returns:
        The number.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite, or not above 0.
    """
    given = number(name, value)
    if given <= 0:
        raise ValueError(f"{name}: expected > 0, got {value!r}")
    return given


def fraction(name: str, value: Any) -> float:
    """Check a number in [0, 1].

    Args:
        name: Of the argument, for the error.
        value: As read from the recipe.

    Returns:
        The number.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].
    """
    given = number(name, value)
    if 1 < given <= 100:
        raise ValueError(f"{name}: expected in [0, 1], got {value} ({given:g} % is {given / 100:g})")
    return number(name, value, 0, 1)


def flag(name: str, value: Any) -> bool:
    """Check a boolean; the words true and false count, as other YAML readers write them.

    Args:
        name: Of the argument, for the error.
        value: As read from the recipe.

    Returns:
        The boolean.

    Raises:
        TypeError: If it is anything else.
    """
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {value!r:.80}")
    return value


def names(name: str, value: Any) -> list[str]:
    """Check a name or a list of names.

    Args:
        name: Of the argument, for the error.
        value: As read from the recipe.

    Returns:
        The list.

    Raises:
        TypeError: If it is anything else.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise TypeError(f"{name}: expected a name or a list of names, got {value!r:.80}")
    return given


@dataclass(frozen=True, eq=False)
class Target:
    """What a recipe is applied to.

    Attributes:
        model: The model.
        optimizer: Its optimizer; None for one-shot pruning.
        batches: Batches (inputs, targets) for gradients, or None.
        loss_fn: ``loss_fn(outputs, targets)``, or None.
        end: The epoch at which training ends.
        progress: Show progress bars while gradients are collected.
        one_shot: Everything is due at once, at epoch 0; initial sparsities do not count.
        forward: ``forward(model, batch)``, for batches of another form; see :class:`mfac.Pruner`.
        process_group: Processes that hold copies of the model; see :class:`mfac.Pruner`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    batches: Iterable | None
    loss_fn: Callable | None
    end: float
    progress: bool
    one_shot: bool
    forward: Callable | None = None
    process_group: Any = None


class Action:
    """What a modifier does in one training run.

    Attributes:
        early: Whether :meth:`step` is also called before training, with epoch 0.
        writes: Whether :meth:`step` may write weights that another action holds at zero, without pruning.
        masks: Parameter name -> bool tensor, True = kept, of the masks that the action holds now.
    """

    early = False
    writes = False
    masks: Mapping[str, Tensor] = {}

    def step(self, last: float, epoch: float) -> PruneResult | None:
        """Act after an optimizer step.

        Args:
            last: Epoch of the call before; -inf at the call before training, else 0 at the first one.
            epoch: The training done so far, in epochs.

        Returns:
            What was pruned, or None.
        """
        raise NotImplementedError

    def permanent(self, epoch: float) -> bool:
        """Return whether the masks of that epoch are never dropped."""
        return False

    def enforce(self) -> None:
        """Set the weights to zero that the masks hold."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, for :meth:`load_state_dict`."""
        return {}

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Check a state without loading it; raise ValueError if it belongs to another action (strict: or settings)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""


@dataclass(kw_only=True)
class Modifier:
    """The base of all modifiers: a subclass takes its fields as arguments, checks and converts them.

    Epochs are floats; -1 stands for the start or the end of training.
    """

    prunes: ClassVar[bool] = False
    where: ClassVar[str] = ""  # of an object: file, line and name, for errors

    start_epoch: float = -1.0
    end_epoch: float = -1.0
    log_types: Any = None  # loggers of the original program; ignored

    def __post_init__(self) -> None:
        """Check the arguments."""
        self.start_epoch = number("start_epoch", self.start_epoch, -1)
        self.end_epoch = number("end_epoch", self.end_epoch, -1)
        if 0 <= self.end_epoch < self.start_epoch:
            raise ValueError(f"end_epoch: expected >= start_epoch = {self.start_epoch:g}, got {self.end_epoch:g}")

    @classmethod
    def normalize(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` with legacy spellings replaced by today's."""
        return arguments

    def settled(self, end: float) -> float:
        """Return the epoch from which on the modifier leaves the masks as they are, in training that ends at `end`."""
        return 0.0

    @property
    def needs_end(self) -> bool:
        """Whether it depends on the epoch at which training ends."""
        return False

    def warnings(self, end: float) -> list[str]:
        """Return what is likely to be a mistake, in training that ends at `end`: `argument: expected ..., got ...`."""
        return []

    def bind(self, target: Target) -> Action | None:
        """Return what the modifier does in one training run, or None; nothing is changed yet.

        Args:
            target: What the recipe is applied to.

        Returns:
            The action.

        Raises:
            ValueError: If names or indices of the recipe do not fit the model or the optimizer.
        """
        return None


@dataclass(kw_only=True)
class EpochRange(Modifier):
    """The length of training."""

    end_epoch: float = field()  # required: without `field()` it would inherit the default
