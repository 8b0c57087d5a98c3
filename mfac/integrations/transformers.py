"""Gradual pruning as a callback of Transformers' Trainer (``pip install transformers accelerate``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfac.checks import warn
from mfac.distributed.models import refuse_flat
from mfac.distributed.shards import whole
from mfac.extras import install_hint
from mfac.integrations.callback import (
    all_processes,
    apply_recipe,
    check_recipe,
    check_unit,
    full_state,
    masks_of,
    masks_so_far,
    needs_batches,
    warn_if_dense,
)
from mfac.model.names import named_parameters
from mfac.model.targets import prunable_parameters
from mfac.pruning.gradual import Pruner
from mfac.pruning.masks import zero_elements
from mfac.recipe.manager import Session

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"{install_hint('transformers', 'transformers')} ({error})") from error

_MAX_KEPT_ZEROS = 0.01  # share of a layer's kept weights that may be zero by chance
FILE = "pruner.pt"  # in each checkpoint's folder


class PrunerCallback(TrainerCallback):
    """Prunes a model while Trainer trains it; see :class:`mfac.Pruner`, whose arguments it takes.

    Works with gradient accumulation and mixed precision. Pruned weights do not count in the norm by which gradients are
    clipped. The state lies in the folder of each checkpoint, as ``pruner.pt``, so ``trainer.train(
    resume_from_checkpoint=...)`` goes on in the middle of a schedule. With several processes (torchrun; also with
    ``fsdp_config`` of version 2) each takes gradients from batches of its own, and all prune alike.

    Args:
        batches: Where gradients come from; None: the training dataloader, in an order of its own.
        loss_fn: Loss of (outputs, batch); None: the ``.loss`` of the model's output.
        recipe: A recipe (path or text) in place of the settings; its epochs are those of the trainer.
        recipe_args: Values for the recipe's variables.
        unit: Of ``start``, ``frequency`` and ``end``: ``"step"`` (optimizer steps, the default) or ``"epoch"``, as for
            recipes.
        resume_from: Folder of the checkpoint that training is resumed from, if that is not
            ``<output_dir>/checkpoint-<step>``.
        settings: The other arguments of :class:`mfac.Pruner`; ``sparsity`` and ``end`` are required.

    Attributes:
        pruner: The :class:`mfac.Pruner`, or the :class:`mfac.recipe.Session` of a recipe; None until training begins.

    Raises:
        TypeError: If both a recipe and settings are given.
        ValueError: If ``unit`` is another; all else is checked when training begins.

    Example::

        callback = PrunerCallback(sparsity=0.9, start=100, end=1000, frequency=100)
        Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        recipe: str | Path | None = None,
        recipe_args: str | dict[str, Any] | None = None,
        unit: str | None = None,
        resume_from: str | Path | None = None,
        **settings: Any,
    ) -> None:
        """Keep the arguments."""
        check_recipe(recipe, settings)
        self.pruner: Pruner | Session | None = None
        self._recipe, self._recipe_args = recipe, recipe_args
        self._batches, self._loss_fn, self._settings = batches, loss_fn, settings
        self._unit = check_unit(unit, recipe)
        self._resume_from = resume_from
        self._hooks: list[Any] = []
        self._masking: list[_MaskGradient] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Make the Pruner, and restore its state if training is resumed.

        Args:
            args: The training arguments.
            state: The trainer's state.
            control: Not used.
            objects: The model, dataloader and optimizer.

        Raises:
            ValueError: If an argument is wrong, the process has several GPUs, the model is one of DeepSpeed or a
                FullyShardedDataParallel (FSDP version 1), or training is resumed from a checkpoint without the
                Pruner's state.
        """
        if args.n_gpu > 1:
            raise ValueError(f"args: expected one GPU per process (torchrun), got {args.n_gpu}")
        if args.deepspeed:
            raise ValueError(f"args: expected a model without DeepSpeed, got deepspeed={args.deepspeed!r}")
        model, batches, saved = objects["model"], self._batches, None
        refuse_flat(model)
        so_far = {} if self._recipe is not None else masks_so_far(self.pruner, model)
        settings = {**all_processes(args.world_size, model), **so_far, **self._settings}
        if state.global_step > 0:
            saved = self._saved(args, state, model)
            if self._recipe is None and saved["masks"]:
                settings["masks"] = saved["masks"]
        if batches is None and needs_batches(settings):
            loader = objects["train_dataloader"]
            batches = getattr(loader, "base_dataloader", loader)  # without accelerate's bookkeeping
        if self._recipe is not None:
            epochs, optimizer = float(args.num_train_epochs), objects["optimizer"]
            if args.max_steps > 0:
                epochs = args.max_steps / math.ceil(len(objects["train_dataloader"]) / args.gradient_accumulation_steps)
            optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
            self.pruner = apply_recipe(
                self._recipe, self._recipe_args, epochs, model, optimizer, batches, self._loss_fn, settings
            )
        else:
            self.pruner = Pruner(model, batches, self._loss_fn, **settings)
        if saved is not None:
            self.pruner.load_state_dict(saved)
        # Trainer clips gradients before it calls any callback.
        every = self.pruner.params if isinstance(self.pruner, Pruner) else named_parameters(model)
        trained = {name: p for name, p in every.items() if p.requires_grad}
        self._masking = [_MaskGradient(name) for name in trained]
        pairs = zip(trained.values(), self._masking, strict=True)
        self._hooks = [p.register_post_accumulate_grad_hook(mask) for p, mask in pairs]

    def _saved(self, args: Any, state: Any, model: nn.Module) -> dict[str, Any]:
        """Return the Pruner's state of the checkpoint that training is resumed from."""
        folder = Path(self._resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not (folder / FILE).is_file():
            raise ValueError(
                f"resume_from: expected the state of the Pruner at {folder / FILE}, got none; name the folder of the "
                "checkpoint"
            )
        saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        masks = masks_of(saved)
        params = prunable_parameters(model, list(masks)) if masks else {}
        for name, p in params.items():
            zero, mask = whole(p).cpu() == 0, masks[name].cpu()
            if bool((~zero & ~mask).any()) or float((zero & mask).float().mean()) > _MAX_KEPT_ZEROS:
                raise ValueError(
                    f"resume_from: expected the state of this model, got {folder / FILE}, whose masks do not fit the "
                    f"zeros of {name!r}; name the folder of the checkpoint"
                )
        return saved

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Let the hooks mask the gradients of this step."""
        masks = self.pruner.masks  # which do not change within a step
        for mask in self._masking:
            mask.remaining, mask.masks = args.gradient_accumulation_steps, masks

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Hold the masks, and prune if an update is due."""
        self.pruner.step(state.global_step if self._unit == "step" else state.epoch)
        if isinstance(self.pruner, Session):
            self.pruner.rewrite_learning_rate()  # which the trainer's scheduler has changed

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Add the Pruner's state to the checkpoint."""
        if not args.should_save:  # another process does
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            warn(f"output_dir: expected the checkpoint at {folder}, got none; the Pruner's state is not saved")
            return
        torch.save(full_state(self.pruner), folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Remove the hooks, and warn if the model is not pruned as the masks say."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        warn_if_dense(self.pruner, objects["model"])


class _MaskGradient:
    """Sets the gradient of pruned weights to zero as it comes, in the steps that the callback announces.

    Training that is interrupted leaves the hook behind: it does nothing then.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.masks: Mapping[str, Tensor] = {}  # of the current step
        self.remaining = 0  # backward passes of the current step

    def __call__(self, p: nn.Parameter) -> None:
        if not self.remaining:
            return
        self.remaining -= 1
        mask = self.masks.get(self._name)
        if mask is not None and p.grad is not None:
            zero_elements(p.grad, mask)
