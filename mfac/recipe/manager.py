"""Run a recipe: Manager holds its modifiers, Session steps them along with one training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfac.pruning.gradual import Pruner
from mfac.pruning.result import PruneResult
from mfac.recipe.load import load_recipe
from mfac.recipe.modifiers import EpochRange, MagnitudePruning, Modifier, OptimizerSetting, build


class Manager:
    r"""A recipe, checked and ready to be applied.

    Args:
        modifiers: The recipe's modifiers, in order.
        metadata: What the recipe's `__metadata__` holds.

    Example:
        >>> manager = Manager.from_recipe('''
        ... modifiers:
        ...   - !EpochRangeModifier {start_epoch: 0, end_epoch: 1}
        ...   - !MagnitudePruningModifier {params: [weight], final_sparsity: 0.5, start_epoch: 0, end_epoch: 1}
        ... ''')
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> session = manager.apply(model, optimizer)
        >>> for step in range(10):
        ...     # ... loss.backward() and optimizer.step() ...
        ...     results = session.step((step + 1) / 10)
        >>> session.sparsity
        0.5
    """

    def __init__(self, modifiers: list[Modifier], metadata: Any = None) -> None:
        self.modifiers = modifiers
        self.metadata = metadata

    @classmethod
    def from_recipe(
        cls, source: str | Path, recipe_args: str | dict[str, Any] | None = None, *, strict: bool = False
    ) -> Manager:
        """Read and check a recipe.

        Args:
            source: A path ending in .yaml, .yml or .md, or the text of a recipe.
            recipe_args: Values that override the recipe's variables: a dict, JSON, or `name=value,name=value`.
            strict: Refuse modifiers that are otherwise left out with a warning (quantization, distillation).

        Returns:
            The manager.

        Raises:
            ValueError: If the recipe cannot be read, or holds an unknown modifier, argument or value.
        """
        recipe = load_recipe(source, recipe_args)
        modifiers = [build(item, strict) for item in recipe.items]
        return cls([modifier for modifier in modifiers if modifier is not None], recipe.metadata)

    @property
    def epochs(self) -> float:
        """The length of training: the end of the last EpochRangeModifier, or of the last modifier if there is none."""
        ranges = [modifier for modifier in self.modifiers if isinstance(modifier, EpochRange)]
        return max((modifier.end_epoch for modifier in ranges or self.modifiers), default=0.0)

    @property
    def pruned_from(self) -> float:
        """The epoch from which the final sparsity holds; 0 if the recipe prunes nothing."""
        ends = [self.epochs if item.end_epoch < 0 else item.end_epoch for item in self._pruning()]
        return max(ends, default=0.0)

    def _pruning(self) -> list[MagnitudePruning]:
        return [modifier for modifier in self.modifiers if isinstance(modifier, MagnitudePruning)]

    def apply(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable | None = None,
        loss_fn: Callable | None = None,
        *,
        progress: bool = False,
    ) -> Session:
        """Bind the recipe to a model and its optimizer; set the learning rate and weight decay of epoch 0.

        Args:
            model: The model to prune.
            optimizer: The optimizer whose learning rate and weight decay the recipe sets.
            batches: Iterable of (inputs, targets), on the model's device, from which M-FAC takes its gradients; one
                batch gives one gradient. Needed by M-FAC modifiers only.
            loss_fn: `loss_fn(outputs, targets)`, a scalar. Needed by M-FAC modifiers only.
            progress: Show progress bars while gradients are collected.

        Returns:
            The session; call its `step` after every optimizer step.

        Raises:
            ValueError: If the recipe gives no length of training, or names parameters or parameter groups that do not
                exist. Nothing has been changed then.
        """
        if not 0 < self.epochs < math.inf:
            raise ValueError("the recipe gives no length of training: add !EpochRangeModifier {end_epoch: ...}")
        settings = [modifier for modifier in self.modifiers if isinstance(modifier, OptimizerSetting)]
        for setting in settings:
            setting.groups(optimizer)
        settings.sort(key=lambda setting: setting.start_epoch)  # stable: of two that start together, the later one wins
        pruners = [item.pruner(model, batches, loss_fn, self.epochs, progress) for item in self._pruning()]
        return Session(pruners, settings, optimizer)

    def one_shot(
        self,
        model: nn.Module,
        batches: Iterable | None = None,
        loss_fn: Callable | None = None,
        *,
        progress: bool = False,
    ) -> Session:
        """Prune the model to the recipe's final sparsity at once, without training.

        Epochs and initial sparsities are ignored.

        Args:
            model: The model to prune.
            batches: As for `apply`.
            loss_fn: As for `apply`.
            progress: Show progress bars while gradients are collected.

        Returns:
            The session, for its masks, sparsity and results.

        Raises:
            ValueError: If the recipe prunes nothing, or names parameters that do not exist.
        """
        if not self._pruning():
            raise ValueError("one-shot needs a recipe with a pruning modifier; this one has none")
        pruners = [item.pruner(model, batches, loss_fn, 0.0, progress, one_shot=True) for item in self._pruning()]
        session = Session(pruners, [], None)
        session.step(0.0)
        return session


class Session:
    """A recipe bound to one training run; made by `Manager.apply`.

    An update due at epoch e takes place in the first `step` whose epoch is at least e. For a whole e that is the call
    after the last optimizer step of the epoch before, thus before the first of epoch e; an update due at epoch 0 takes
    place after the very first optimizer step.
    """

    def __init__(
        self, pruners: list[Pruner], settings: list[OptimizerSetting], optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.pruners = pruners
        self._settings = settings
        self._optimizer = optimizer
        self._set(0.0)

    def _set(self, epoch: float) -> None:
        for setting in self._settings:
            setting.update(self._optimizer, epoch)

    def step(self, epoch: float) -> list[PruneResult]:
        """Enforce the masks, prune what is due, set the learning rate and weight decay. Call after `optimizer.step()`.

        Args:
            epoch: The training done so far, in epochs: after the i-th of n steps of epoch e (from 0), e + i / n.

        Returns:
            The results of the pruning steps just taken; empty most of the time.
        """
        results = [pruner.step(epoch) for pruner in self.pruners]
        self._set(epoch)
        return [result for result in results if result is not None]

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks by parameter name, True where a weight is kept; empty before the first pruning step."""
        return {name: mask for pruner in self.pruners for name, mask in pruner.masks.items()}

    @property
    def sparsity(self) -> float:
        """The share of zeros in the masks; 0 before the first pruning step."""
        masks = self.masks.values()
        total = sum(mask.numel() for mask in masks)
        return 1 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on after a restart: masks and times of the pruning steps."""
        return {"pruners": [pruner.state_dict() for pruner in self.pruners]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the model's weights come back with the model's own state.

        Args:
            state: From `state_dict` of a session of the same recipe.

        Raises:
            ValueError: If it belongs to another recipe.
        """
        if len(state["pruners"]) != len(self.pruners):
            raise ValueError(
                f"state has {len(state['pruners'])} pruning modifiers, but this recipe has {len(self.pruners)}"
            )
        for pruner, saved in zip(self.pruners, state["pruners"], strict=True):
            pruner.load_state_dict(saved)
