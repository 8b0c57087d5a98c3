"""Modifiers that prune: by magnitude and by M-FAC."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mfac.checks import check_choice, warn
from mfac.pruning.gradual import Pruner
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.schedule import CURVES
from mfac.pruning.settings import PrunerSettings
from mfac.recipe.modifiers.base import Modifier, count, names, number, plain_number, positive
from mfac.settings import definitions


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

    Beyond the format's own arguments it takes settings of :class:`mfac.Pruner` by their names. Their defaults here are
    the published ones where the format has them (`damp`, `fisher_block_size`). A single jump from 35 % to 95 % leaves
    the range in which a quadratic model of the loss is accurate; new gradients on the way, by default 8 times, keep it
    valid.
    """

    criterion: ClassVar[str] = "fisher"
    score_types: ClassVar[tuple[str, ...]] = ("MFAC",)
    spellings: ClassVar[dict[str, str]] = {  # of the format -> of mfac
        "damp": "damping",
        "fisher_block_size": "block_size",
        "num_recomputations": "recomputations",
        "available_gpus": "available_devices",
    }
    settings: ClassVar[tuple[str, ...]] = (
        "num_grads", "damping", "block_size", "recomputations", "refresh", "substeps", "update", "max_layer_sparsity",
        "mode", "dtype", "precision", "grads_device",
    )  # fmt: skip

    num_grads: Any = 256
    damping: Any = 1e-5
    block_size: Any = 2000  # None: the full matrix
    recomputations: Any = 8
    refresh: Any = None  # None: all num_grads
    substeps: Any = 4
    update: Any = "joint"
    max_layer_sparsity: Any = None
    mode: Any = "eval"
    dtype: Any = "float32"
    precision: Any = "highest"
    grads_device: Any = None
    num_pages: Any = None  # above 1: the same as `grads_device: cpu`; the actual number follows from the memory
    available_devices: Any = None
    use_gradient_buffering: Any = None
    grad_sampler_kwargs: Any = None

    @classmethod
    def normalize(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` under mfac's names, with the legacy `mfac_options` unpacked.

        Args:
            arguments: As written in the recipe.

        Returns:
            The arguments by the names of this class's fields.

        Raises:
            ValueError: If `mfac_options` is not a mapping, or an argument is given under two names.
        """
        options = arguments.get("mfac_options") or {}
        if not isinstance(options, dict):
            raise ValueError(f"mfac_options: expected a mapping, got {options!r:.80}")
        renamed: dict[str, Any] = {}
        for key, value in {**arguments, **options}.items():
            if key == "mfac_options":
                continue
            name = cls.spellings.get(key, key)
            if name in renamed:
                raise ValueError(f"{key}: expected either {key} or {name}, got both")
            renamed[name] = value
        return renamed

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        if isinstance(self.num_grads, dict):
            raise ValueError(f"num_grads: expected an int (a schedule is not supported), got {self.num_grads!r:.80}")
        known = definitions(PrunerSettings)
        for name in self.settings:
            setattr(self, name, known[name].check(name, plain_number(getattr(self, name))))
        self.refresh = self.num_grads if self.refresh is None else self.refresh
        if self.refresh > self.num_grads:
            raise ValueError(f"refresh: expected 1 to num_grads = {self.num_grads}, got {self.refresh}")
        if self.num_pages is not None and count("num_pages", self.num_pages) > 1:
            self.grads_device = "cpu"
        devices = [*names("available_devices", self.available_devices or []), str(self.grads_device)]
        if any(device.startswith("cuda") for device in devices) and not torch.cuda.is_available():
            asked = ", ".join(device for device in devices if device.startswith("cuda"))
            warn(f"the recipe asks for {asked}, but CUDA is not available: the CPU is used")
        if self.grads_device is not None and not re.fullmatch(r"cpu|disk(:.+)?|cuda(:\d+)?", str(self.grads_device)):
            raise ValueError(
                f"grads_device: expected cpu, disk, disk:<folder>, cuda or cuda:<index>, got {self.grads_device!r:.80}"
            )
        if self.use_gradient_buffering or self.grad_sampler_kwargs:
            warn(
                "use_gradient_buffering and grad_sampler_kwargs have no effect: gradients come from the batches given "
                "to Manager.apply"
            )

    def options(self) -> dict[str, Any]:
        """Return the Pruner's arguments that only M-FAC has."""
        on_gpu = str(self.grads_device).startswith("cuda")  # where the model is
        return {name: getattr(self, name) for name in self.settings} | ({"grads_device": None} if on_gpu else {})


@dataclass(kw_only=True)
class MFACGlobalPruning(MFACPruning):
    """M-FAC pruning with one threshold for all weights (a legacy spelling)."""

    global_sparsity: bool = True
