"""Modifiers that prune: by magnitude and by M-FAC."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mfac.checks import check_choice
from mfac.pruning.gradual import Pruner
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.quadratic import check_settings
from mfac.pruning.schedule import CURVES
from mfac.pruning.step import UPDATES
from mfac.recipe.modifiers.base import Modifier, count, names, number, positive


def _pattern(mask_type: Any) -> Any:
    """Return the Pruner's pattern for a `mask_type`."""
    if isinstance(mask_type, int) and not isinstance(mask_type, bool):  # YAML 1.1 reads 2:4 as 2 * 60 + 4
        mask_type = f"{mask_type // 60}:{mask_type % 60}" if 0 < mask_type < 60**3 else mask_type
    pattern = "2:4" if mask_type == "tensorrt" else mask_type
    try:
        parse_pattern(pattern)
    except (TypeError, ValueError) as error:
        detail = str(error).removeprefix("pattern: ")
        raise ValueError(f"mask_type: {detail:.300}; tensorrt stands for 2:4") from None
    return pattern


def _sparsity_by_name(final_sparsity: dict[Any, Any]) -> dict[str, float]:
    """Return {name: sparsity} for a recipe's {sparsity: [names]}."""
    result: dict[str, float] = {}
    for sparsity, given in final_sparsity.items():
        for name in names("final_sparsity", given):
            if name in result:
                raise ValueError(f"final_sparsity: expected each name once, got {name!r:.80} again")
            result[name] = number("final_sparsity", sparsity, 0, 1)
    if not result:
        raise ValueError(f"final_sparsity: expected a number or {{sparsity: [params]}}, got {final_sparsity!r:.80}")
    return result


@dataclass(kw_only=True)
class MagnitudePruning(Modifier):
    """Prune the smallest weights, from `init_sparsity` at `start_epoch` to `final_sparsity` at `end_epoch`."""

    criterion: ClassVar[str] = "magnitude"
    score_types: ClassVar[tuple[str, ...]] = ("magnitude",)

    final_sparsity: Any  # a number, or {sparsity: [params]}
    params: Any = None  # names, `re:` patterns, __ALL__ or __ALL_PRUNABLE__
    init_sparsity: Any = 0.0
    update_frequency: Any = 1.0  # epochs
    inter_func: str = "cubic"
    mask_type: Any = "unstructured"
    leave_enabled: Any = True
    global_sparsity: bool = False
    score_type: Any = None
    phased: Any = None  # ignored

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self.init_sparsity = number("init_sparsity", self.init_sparsity, 0, 1)
        self.update_frequency = positive("update_frequency", self.update_frequency)
        check_choice("inter_func", self.inter_func, CURVES)
        self.mask_type = _pattern(self.mask_type)
        if self.leave_enabled is not True:
            raise ValueError(f"leave_enabled: expected True (masks are always kept), got {self.leave_enabled!r:.80}")
        if not isinstance(self.global_sparsity, bool):
            raise ValueError(f"global_sparsity: expected true or false, got {self.global_sparsity!r:.80}")
        if self.score_type is not None:
            check_choice("score_type", self.score_type, self.score_types)
        self.params = names("params", self.params or [])
        if isinstance(self.final_sparsity, dict):
            if self.params or self.global_sparsity:
                raise ValueError(
                    "final_sparsity: expected a number with params or global_sparsity, got {sparsity: [params]}, "
                    "which needs `params: []`"
                )
            self.final_sparsity = _sparsity_by_name(self.final_sparsity)
        else:
            self.final_sparsity = number("final_sparsity", self.final_sparsity, 0, 1)
            if not self.params and not self.global_sparsity:
                raise ValueError("params: expected names of the weights to prune, such as __ALL_PRUNABLE__, got none")
            self.params = self.params or ["__ALL_PRUNABLE__"]

    def options(self) -> dict[str, Any]:
        """Return the Pruner's arguments that only this kind of pruning has."""
        return {}

    def pruner(
        self,
        model: nn.Module,
        batches: Iterable | None,
        loss_fn: Callable | None,
        end: float,
        progress: bool,
        one_shot: bool = False,
    ) -> Pruner:
        """Return the Pruner that carries out the modifier; its time is measured in epochs.

        Args:
            model: The model to prune.
            batches: Batches (inputs, targets) for the gradients; not used by magnitude pruning.
            loss_fn: `loss_fn(outputs, targets)`; not used by magnitude pruning.
            end: The epoch at which training ends, used if `end_epoch` is -1.
            progress: Show progress bars while gradients are collected.
            one_shot: Ignore the epochs and `init_sparsity`: the only update, to `final_sparsity`, is due at time 0.

        Returns:
            The Pruner; nothing is pruned yet.
        """
        initial, start = (0.0, 0.0) if one_shot else (self.init_sparsity, max(self.start_epoch, 0.0))
        if one_shot:
            end = 0.0
        elif self.end_epoch >= 0:
            end = self.end_epoch
        per_layer = isinstance(self.final_sparsity, dict)
        return Pruner(
            model,
            batches if self.criterion == "fisher" else None,
            loss_fn,
            sparsity=self.final_sparsity,
            params=list(self.final_sparsity) if per_layer else self.params,
            scope="global" if self.global_sparsity else "layer",
            initial_sparsity=initial,
            start=start,
            end=end,
            frequency=self.update_frequency,
            schedule=self.inter_func,
            pattern=self.mask_type,
            criterion=self.criterion,
            progress=progress,
            **self.options(),
        )


@dataclass(kw_only=True)
class GlobalMagnitudePruning(MagnitudePruning):
    """Magnitude pruning with one threshold for all weights."""

    global_sparsity: bool = True


@dataclass(kw_only=True)
class MFACPruning(MagnitudePruning):
    """Prune by the empirical Fisher (M-FAC), updating the remaining weights.

    `num_recomputations`, `refresh`, `num_substeps` and `update` extend the format, as do `auto` and `<number>*mean` for
    `damp`, and `auto` for `fisher_block_size`. A single jump from 35 % to 95 % leaves the range in which a quadratic
    model of the loss is accurate; new gradients on the way, by default 8 times, keep it valid.
    """

    criterion: ClassVar[str] = "fisher"
    score_types: ClassVar[tuple[str, ...]] = ("MFAC",)

    num_grads: Any = 256
    damp: Any = 1e-5
    fisher_block_size: Any = 2000  # None: the full matrix
    num_recomputations: Any = 8
    refresh: Any = None  # gradients that are new at each recomputation but the first; None: all num_grads
    num_substeps: Any = 4
    update: str = "joint"
    available_devices: Any = None
    use_gradient_buffering: Any = None
    grad_sampler_kwargs: Any = None
    num_pages: Any = None  # above 1: the same as `grads_device: cpu`; the actual number follows from the memory
    grads_device: Any = None  # cpu: gradients are kept in host memory and copied to the GPU in pages

    @classmethod
    def normalize(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` with the legacy `mfac_options` unpacked and `available_gpus` renamed.

        Args:
            arguments: As written in the recipe.

        Returns:
            The arguments in today's spelling.

        Raises:
            ValueError: If `mfac_options` is not a mapping.
        """
        options = arguments.get("mfac_options") or {}
        if not isinstance(options, dict):
            raise ValueError(f"mfac_options: expected a mapping, got {options!r:.80}")
        merged = {key: value for key, value in {**arguments, **options}.items() if key != "mfac_options"}
        if "available_gpus" in merged:
            merged["available_devices"] = merged.pop("available_gpus")
        return merged

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if isinstance(self.num_grads, dict):
            raise ValueError(f"num_grads: expected an int (a schedule is not supported), got {self.num_grads!r:.80}")
        self.num_grads = count("num_grads", self.num_grads)
        self.refresh = self.num_grads if self.refresh is None else count("refresh", self.refresh, self.num_grads)
        self.num_recomputations = count("num_recomputations", self.num_recomputations)
        self.num_substeps = count("num_substeps", self.num_substeps)
        if isinstance(self.damp, str) and ("mean" in self.damp or self.damp == "auto"):
            check_settings(self.damp, None)
        else:
            self.damp = positive("damp", self.damp)
        if self.fisher_block_size not in (None, "auto"):
            self.fisher_block_size = count("fisher_block_size", self.fisher_block_size)
        check_choice("update", self.update, UPDATES)
        if self.num_pages is not None:
            self.num_pages = count("num_pages", self.num_pages)
        if self.grads_device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.grads_device)):
            raise ValueError(f"grads_device: expected cpu, cuda or cuda:<index>, got {self.grads_device!r:.80}")
        devices = names("available_devices", self.available_devices or [])
        devices = [*devices, *([str(self.grads_device)] if self.grads_device is not None else [])]
        if any(device.startswith("cuda") for device in devices) and not torch.cuda.is_available():
            warnings.warn(
                f"the recipe asks for {', '.join(devices)}, but CUDA is not available: the CPU is used", stacklevel=2
            )
        if self.use_gradient_buffering or self.grad_sampler_kwargs:
            warnings.warn(
                "use_gradient_buffering and grad_sampler_kwargs have no effect: "
                "gradients come from the batches given to Manager.apply",
                stacklevel=2,
            )

    def options(self) -> dict[str, Any]:
        """Return the Pruner's arguments that only M-FAC has."""
        return {
            "grads_device": "cpu" if self.grads_device == "cpu" or (self.num_pages or 1) > 1 else None,
            "num_grads": self.num_grads,
            "damping": self.damp,
            "block_size": self.fisher_block_size,
            "recomputations": self.num_recomputations,
            "refresh": self.refresh,
            "substeps": self.num_substeps,
            "update": self.update,
        }


@dataclass(kw_only=True)
class MFACGlobalPruning(MFACPruning):
    """M-FAC pruning with one threshold for all weights (a legacy spelling)."""

    global_sparsity: bool = True
