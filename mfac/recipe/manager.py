"""Run a recipe: a Manager holds its modifiers, a Session applies them during one training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfac.checks import check_number, warn
from mfac.model.names import named_parameters
from mfac.pruning.gradual import Pruner
from mfac.pruning.masks import mask_gradients, merge_masks, sparsity_of
from mfac.pruning.result import PruneResult
from mfac.recipe.load import Recipe, load_recipe
from mfac.recipe.modifiers import EpochRange, MagnitudePruning, Modifier, Pruning, Target, build
from mfac.recipe.modifiers.base import Action
from mfac.recipe.modifiers.optimizer import Write
from mfac.recipe.modifiers.params import Trainable


class Manager:
    r"""A recipe whose modifiers have been checked.

    :meth:`apply` binds it to a model and an optimizer for training; :meth:`one_shot` prunes at once. One manager can be
    applied to several models.

    Args:
        modifiers: The recipe's modifiers, in order.
        recipe: What they were made of.

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

    def __init__(self, modifiers: list[Modifier], recipe: Recipe | None = None) -> None:
        self.modifiers = modifiers
        self.recipe = recipe

    @classmethod
    def from_recipe(
        cls, source: str | Path, recipe_args: str | dict[str, Any] | None = None, *, strict: bool = False
    ) -> Manager:
        """Read and check a recipe.

        Args:
            source: A path ending in .yaml, .yml or .md (`FILE.md#2` for the second of its fenced recipes), or the text
                of a recipe.
            recipe_args: Values that override the recipe's variables: a dict, JSON, or `name=value,name=value`.
            strict: Refuse what otherwise gives a warning: modifiers that are skipped (quantization, distillation), an
                end that lies beyond that of the training, a sparsity of 1.

        Returns:
            The manager.

        Raises:
            TypeError: If `source` or `recipe_args` is of another type.
            ValueError: If the recipe cannot be read, or holds an unknown modifier, argument or value.
        """
        recipe = load_recipe(source, recipe_args)
        modifiers = [build(item, strict, recipe.name) for item in recipe.items]
        manager = cls([modifier for modifier in modifiers if modifier is not None], recipe)
        for modifier in manager.modifiers:
            for text in modifier.warnings(manager.epochs or math.inf):
                if strict:
                    raise ValueError(f"{modifier.where}: {text}")
                warn(f"{modifier.where}: {text}")
        return manager

    @property
    def epochs(self) -> float:
        """The length of training: the latest end of an EpochRangeModifier or, without one, of any modifier; else 0."""
        ranges = [modifier for modifier in self.modifiers if isinstance(modifier, EpochRange)]
        return max((modifier.end_epoch for modifier in ranges or self.modifiers if modifier.end_epoch > 0), default=0.0)

    def check_epochs(self) -> None:
        """Check that the recipe gives the length of training.

        Raises:
            ValueError: If it does not.
        """
        if not self.epochs:
            raise ValueError("recipe: expected a length of training, !EpochRangeModifier {end_epoch: ...}, got none")

    @property
    def pruned_from(self) -> float:
        """The epoch at which the final sparsity is reached; 0 if the recipe prunes nothing."""
        return max((modifier.settled(self.epochs) for modifier in self.modifiers), default=0.0)

    @property
    def prunes(self) -> bool:
        """Whether a modifier prunes."""
        return any(modifier.prunes for modifier in self.modifiers)

    def __repr__(self) -> str:
        """Return the length of training and the modifiers."""
        names = ", ".join(type(modifier).__name__ for modifier in self.modifiers)
        return f"Manager({self.epochs:g} epochs: {names})"

    def describe(self, one_shot: bool = False) -> list[str]:
        """Return a line for each modifier that prunes by gradients: the settings of the recipe, and the defaults.

        Args:
            one_shot: The defaults of :meth:`one_shot` in place of those of :meth:`apply`.
        """
        pruning = [modifier for modifier in self.modifiers if isinstance(modifier, MagnitudePruning)]
        return [modifier.describe(one_shot) for modifier in pruning if modifier.reported]

    def apply(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable | None = None,
        loss_fn: Callable | None = None,
        *,
        forward: Callable | None = None,
        progress: bool = False,
        process_group: Any = None,
    ) -> Session:
        """Bind the recipe to a model and its optimizer; set the learning rate and weight decay of epoch 0.

        Args:
            model: The model to prune.
            optimizer: The optimizer whose learning rate and weight decay the recipe sets.
            batches: Iterable of (inputs, targets), moved to the model's device; each gives a gradient. Only modifiers
                that prune by gradients need it.
            loss_fn: `loss_fn(outputs, targets)`, a scalar. Only M-FAC modifiers need it.
            forward: `forward(model, batch)`, for batches that are not (inputs, targets); see :class:`mfac.Pruner`.
            progress: Show progress bars while gradients are collected.
            process_group: Processes that hold copies of the model and prune them alike; None: those of a
                DistributedDataParallel model, else this process by itself.

        Returns:
            The session; call its `step` after every optimizer step.

        Raises:
            ValueError: If the recipe gives no length of training and a modifier needs it, or if it names parameters or
                parameter groups that do not exist. Model and optimizer are then unchanged.
        """
        if not self.modifiers or any(modifier.needs_end for modifier in self.modifiers):
            self.check_epochs()
        return self._bind(
            Target(
                model,
                optimizer,
                batches,
                loss_fn,
                self.epochs,
                progress,
                one_shot=False,
                forward=forward,
                process_group=process_group,
            )
        )

    def _bind(self, target: Target) -> Session:
        # Stable: of two settings that start together, the later one wins.
        modifiers = sorted(self.modifiers, key=lambda modifier: modifier.start_epoch)
        actions = [_located(modifier, modifier.bind, target) for modifier in modifiers]
        trainable = [action for action in actions if isinstance(action, Trainable)]
        thawed = {name for action in trainable for name in action.thawed}
        for action in trainable:
            action.peers = trainable
        for modifier in modifiers:
            if isinstance(modifier, MagnitudePruning) and thawed:
                _located(modifier, modifier.check_thawed, target.model, thawed)
        return Session(target.model, [action for action in actions if action is not None])

    def one_shot(
        self,
        model: nn.Module,
        batches: Iterable | None = None,
        loss_fn: Callable | None = None,
        *,
        progress: bool = False,
        process_group: Any = None,
    ) -> Session:
        """Prune the model to the recipe's final sparsity at once, without training.

        Epochs and initial sparsities are ignored.

        Args:
            model: The model to prune.
            batches: Iterable of (inputs, targets), as in :meth:`apply`.
            loss_fn: `loss_fn(outputs, targets)`, as in :meth:`apply`.
            progress: Show progress bars while gradients are collected.
            process_group: As in :meth:`apply`.

        Returns:
            The session, which gives access to masks and sparsity.

        Raises:
            ValueError: If the recipe prunes nothing, or names parameters that do not exist.
        """
        if not self.prunes:
            raise ValueError("recipe: expected a pruning modifier for one-shot pruning, got none")
        session = self._bind(
            Target(model, None, batches, loss_fn, 0.0, progress, one_shot=True, process_group=process_group)
        )
        session.step(0.0)
        return session


def _located(modifier: Modifier, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and name the modifier's place in its errors."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise ValueError(f"{modifier.where}: {error}" if modifier.where else str(error)) from error


class Session:
    """A recipe bound to one training run; :meth:`Manager.apply` returns it.

    An update due at epoch e takes place in the first :meth:`step` whose epoch is at least e. For an integer e that is
    the call after the last optimizer step of the previous epoch; an update due at epoch 0 takes place after the first
    optimizer step. Of several modifiers that prune the same weights, each goes on from the masks that the others hold
    for good, so that the highest sparsity asked for is reached exactly.

    A session refers to its model, optimizer and batches. Copy or pickle them together, as in
    ``copy.deepcopy((model, optimizer, session))``, so that the copy prunes the copied model; this works if the
    :class:`~mfac.Pruner` of each pruning modifier can be copied. To resume training in another process, save
    :meth:`state_dict`: it holds tensors and plain values only, and ``torch.load`` reads it with ``weights_only=True``.

    Args:
        model: The model.
        actions: What the modifiers do, in order.

    Attributes:
        model: As given.
    """

    def __init__(self, model: nn.Module, actions: list[Action]) -> None:
        self.model = model
        self._actions = actions
        self._epoch = -math.inf  # of the last call
        for action in actions:
            if action.early:
                action.step(self._epoch, 0.0)
        self._epoch = 0.0

    @property
    def pruners(self) -> list[Pruner]:
        """The :class:`mfac.Pruner` of each modifier that prunes along a schedule."""
        return [action.pruner for action in self._actions if isinstance(action, Pruning)]

    def step(self, epoch: float) -> list[PruneResult]:
        """Enforce the masks, prune if an update is due, set learning rate and weight decay.

        Call it after every `optimizer.step()`.

        Args:
            epoch: The training done so far, in epochs: e + i / n after the i-th of n steps of epoch e (from 0).

        Returns:
            The results of the updates just made; mostly empty.

        Raises:
            TypeError: If the epoch is not a number.
            ValueError: If it is not finite.
        """
        epoch = check_number("epoch", epoch)
        results = []
        if sum(bool(action.masks) for action in self._actions) > 1:  # an update sees the model as all masks have it
            for action in self._actions:
                action.enforce()
        for action in self._actions:
            if isinstance(action, Pruning) and action.due(epoch):  # it goes on from what others hold for good
                others = [other for other in self._actions if other is not action and other.permanent(epoch)]
                action.hold(merge_masks(other.masks for other in others))
            result = action.step(self._epoch, epoch)
            if result is not None:
                results.append(result)
        if results or any(action.writes for action in self._actions):  # what one has written another may hold at zero
            for action in self._actions:
                action.enforce()
        self._epoch = max(self._epoch, epoch)
        return results

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Parameter name -> bool tensor, True where a weight is kept; empty before the first update."""
        return merge_masks(action.masks for action in self._actions)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters that masks are held of, by name."""
        every = named_parameters(self.model)
        return {name: every[name] for name in self.masks}

    def _rates(self) -> list[Write]:
        return [action for action in self._actions if isinstance(action, Write) and action.setting.key == "lr"]

    @property
    def sets_learning_rate(self) -> bool:
        """Whether the recipe sets the learning rate."""
        return bool(self._rates())

    def rewrite_learning_rate(self) -> None:
        """Set the learning rate once more to what the recipe has set last, against a scheduler that overwrites it."""
        for action in sorted(self._rates(), key=lambda action: action.written_at):
            action.rewrite()

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero; call it before gradients are clipped, whose norm counts them."""
        mask_gradients(named_parameters(self.model), self.masks)

    def __repr__(self) -> str:
        """Return epoch, sparsity and the Pruners with their next updates."""
        pruners = "".join(f", {pruner!r}" for pruner in self.pruners)
        return f"Session(epoch {self._epoch:g}, sparsity {100 * self.sparsity:.1f} %{pruners})"

    @property
    def sparsity(self) -> float:
        """The sparsity of the masks, in [0, 1]; 0 before the first update."""
        return sparsity_of(self.masks)

    def layer_sparsities(self) -> dict[str, tuple[float | None, float]]:
        """Return the sparsity of each parameter that is pruned along a schedule; see :class:`mfac.Pruner`."""
        holding = [action for action in self._actions if isinstance(action, Pruning) and not action.released]
        return {name: pair for action in holding for name, pair in action.pruner.layer_sparsities().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return masks, progress and what the recipe set, for :meth:`load_state_dict`."""
        return {"epoch": self._epoch, "actions": [action.state_dict() for action in self._actions]}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restore masks, progress, learning rate and weight decay, and enforce the masks.

        Model and optimizer have states of their own; load them before or after.

        Args:
            state: From :meth:`state_dict` of a session of the same recipe.
            strict: Refuse a state whose pruning settings (damping, pattern, ...) are others than the recipe's now.

        Raises:
            ValueError: If it belongs to another recipe; nothing is changed then.
        """
        states = state.get("actions") if isinstance(state, Mapping) else None
        if not isinstance(states, list) or "epoch" not in state:
            raise ValueError(f"state: expected what Session.state_dict() returned, got {type(state).__name__}")
        if len(states) != len(self._actions):
            raise ValueError(f"state: expected {len(self._actions)} modifiers, those of this recipe, got {len(states)}")
        epoch = check_number("state['epoch']", state["epoch"])
        for action, saved in zip(self._actions, states, strict=True):
            action.check_state_dict(saved, strict)  # all before one is changed
        for action, saved in zip(self._actions, states, strict=True):
            action.load_state_dict(saved)
        self._epoch = epoch
