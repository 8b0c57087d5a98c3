"""Gradual pruning as a callback of Lightning's Trainer (``pip install lightning``)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from mfac.checks import warn
from mfac.distributed.models import refuse_flat
from mfac.distributed.shards import has_shards
from mfac.extras import install_hint
from mfac.integrations.callback import (
    all_processes,
    apply_recipe,
    check_recipe,
    check_unit,
    full_state,
    masks_so_far,
    needs_batches,
    warn_if_dense,
)
from mfac.pruning.gradual import Pruner
from mfac.recipe.manager import Session

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
    except ImportError as error:
        raise ImportError(f"{install_hint('lightning', 'lightning')} ({error})") from error


class PrunerCallback(Callback):
    """Prunes a LightningModule while it trains; see :class:`mfac.Pruner`, whose arguments it takes.

    Works with gradient accumulation and mixed precision. Pruned weights do not count in the norm by which gradients are
    clipped. The state is part of Lightning's checkpoints, so ``trainer.fit(..., ckpt_path=...)`` goes on in the middle
    of a schedule. Parameters have the names of the LightningModule, such as ``net.0.weight``. With several processes
    (``strategy="ddp"``, or ``ModelParallelStrategy`` with ``fully_shard``) each takes gradients from batches of its
    own, and all prune alike.

    Args:
        batches: Where gradients come from; None: the training dataloader, in an order of its own.
        loss_fn: Loss of (outputs, targets); None, without ``forward``: what ``training_step`` returns, its logging
            being off.
        recipe: A recipe (path or text) in place of the settings; its epochs are those of the trainer.
        recipe_args: Values for the recipe's variables.
        unit: Of ``start``, ``frequency`` and ``end``: ``"step"`` (the default), the trainer's ``global_step``, or
            ``"epoch"``, as for recipes.
        settings: The other arguments of :class:`mfac.Pruner`; ``sparsity`` and ``end`` are required.

    Attributes:
        pruner: The :class:`mfac.Pruner`, or the :class:`mfac.recipe.Session` of a recipe; None until training begins.

    Raises:
        TypeError: If both a recipe and settings are given.
        ValueError: If ``unit`` is another; all else is checked when training begins.

    Example::

        callback = PrunerCallback(sparsity=0.9, start=1, end=8, unit="epoch", recomputations=4)
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        recipe: str | Path | None = None,
        recipe_args: str | dict[str, Any] | None = None,
        unit: str | None = None,
        **settings: Any,
    ) -> None:
        """Keep the arguments."""
        check_recipe(recipe, settings)
        self.pruner: Pruner | Session | None = None
        self._recipe, self._recipe_args = recipe, recipe_args
        self._batches, self._loss_fn, self._settings = batches, loss_fn, settings
        self._unit = check_unit(unit, recipe)
        self._state: dict[str, Any] | None = None  # of a checkpoint, until there is a Pruner
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the Pruner, and restore its state.

        Args:
            trainer: The trainer.
            pl_module: The model.

        Raises:
            ValueError: If an argument is wrong, the model is a FullyShardedDataParallel, or several processes use
                another strategy than DDP or ModelParallelStrategy.
        """
        refuse_flat(trainer.model)
        strategy = trainer.strategy
        supported = isinstance(strategy, (DDPStrategy, ModelParallelStrategy))
        if trainer.world_size > 1 and (not supported or "DeepSpeed" in type(strategy).__name__):
            raise ValueError(
                "trainer: expected strategy='ddp' or ModelParallelStrategy for several processes, got "
                f"{type(strategy).__name__}"
            )
        if trainer.world_size > 1 and isinstance(strategy, ModelParallelStrategy) and not has_shards(pl_module):
            raise ValueError(
                "module: expected a configure_model that calls fully_shard under ModelParallelStrategy, which does not "
                "average gradients itself, got no sharded parameters"
            )
        if self._unit == "epoch" and math.isinf(trainer.num_training_batches):
            raise ValueError("unit: expected 'step' with a dataloader of unknown length, got 'epoch'")
        so_far = {} if self._recipe is not None else masks_so_far(self.pruner, pl_module)
        settings = {**all_processes(trainer.world_size, pl_module), **so_far, **self._settings}
        if self._recipe is None and self._state is not None and self._state["masks"]:
            settings["masks"] = self._state["masks"]
        batches = self._batches
        if batches is None and needs_batches(settings):
            batches = trainer.train_dataloader
            if not isinstance(batches, DataLoader):
                raise ValueError(
                    f"batches: expected one DataLoader for training, got {type(batches).__name__}; pass batches= and "
                    "loss_fn= or forward="
                )
        if batches is not None and self._loss_fn is None and settings.get("forward") is None:
            if not pl_module.automatic_optimization:
                raise ValueError(
                    "loss_fn: expected a function with manual optimization, whose training_step trains, got None; pass "
                    "loss_fn= or forward="
                )
            settings["forward"] = _TrainingStep(trainer)
        if any(getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks):
            warn(
                "trainer: ModelCheckpoint(monitor=...) may choose a checkpoint from before the final sparsity; look "
                "among those after the last update"
            )
        if self._recipe is not None:
            self.pruner = self._apply_recipe(trainer, pl_module, batches, settings)
        else:
            self.pruner = Pruner(pl_module, batches, self._loss_fn, **settings)
            if len(trainer.optimizers) == 1:
                self.pruner.check_optimizer(trainer.optimizers[0])
        if self._state is not None:
            self.pruner.load_state_dict(self._state)
            self._state = None
        self._step = trainer.global_step

    def _apply_recipe(self, trainer: Trainer, module: LightningModule, batches: Any, settings: Any) -> Session:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"recipe: expected a model with one optimizer, got {len(trainer.optimizers)}")
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        arguments = (module, trainer.optimizers[0], batches, self._loss_fn, settings)
        session = apply_recipe(self._recipe, self._recipe_args, epochs, *arguments)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        last = max((pruner.end for pruner in session.pruners), default=0.0)
        if trainer.max_steps not in (None, -1) and trainer.max_steps / steps < last:
            warn(
                f"trainer: expected max_steps of at least {math.ceil(last * steps)}, where the recipe's last update is "
                f"due, got {trainer.max_steps}"
            )
        return session

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of a recipe once more, which a scheduler may have changed."""
        if isinstance(self.pruner, Session):
            self.pruner.rewrite_learning_rate()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take pruned weights out of the gradients, before these are clipped."""
        self.pruner.mask_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold the masks, and prune if an update is due; once per optimizer step."""
        if trainer.global_step == self._step:
            return  # gradients were accumulated only
        self._step = trainer.global_step
        epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        self.pruner.step(trainer.global_step if self._unit == "step" else epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the model is not pruned as the masks say."""
        warn_if_dense(self.pruner, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        if self.pruner is None:  # training has not begun
            return self._state or {}
        return full_state(self.pruner)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what a checkpoint held, when training begins."""
        self._state = dict(state_dict) or None


class _TrainingStep:
    """The loss of a LightningModule's training_step, with batches and precision as in training, without logging.

    What else training_step does, such as updating a metric, it does here too.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __deepcopy__(self, memo: dict) -> _TrainingStep:
        return self

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        plugin, strategy = self._trainer.precision_plugin, self._trainer.strategy
        batch = module._on_before_batch_transfer(plugin.convert_input(batch), dataloader_idx=0)
        batch = strategy.batch_to_device(batch, dataloader_idx=0)
        rest = (0,) if len(inspect.signature(module.training_step).parameters) > 1 else ()  # batch_idx
        with _silent(module), plugin.forward_context():
            loss = module.training_step(batch, *rest)
        return loss["loss"] if isinstance(loss, Mapping) else loss


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Turn off ``self.log`` and ``self.log_dict``, which are for the trainer's own steps."""
    names = ("log", "log_dict")
    for name in names:
        module.__dict__[name] = lambda *args, **options: None
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]
