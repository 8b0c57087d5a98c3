"""The modifiers a recipe can hold: their arguments, checked, and what each does to an optimizer or a model.

All in one file, somewhat long: each is its arguments and a few lines, and they share the checks.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import nn

from mfac.pruning.gradual import Pruner
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.quadratic import check_settings
from mfac.pruning.schedule import CURVES
from mfac.pruning.step import UPDATES
from mfac.recipe.load import Item

_OTHER_WORK = ("Quantization", "Distillation")  # modifiers of these kinds are left out with a warning


def _number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    # YAML 1.1 reads `1e-7` as a string, so numeric strings count.
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        bounds = f" between {low:g} and {high:g}" if high < math.inf else f", at least {low:g}"
        raise ValueError(f"{name} must be a number{bounds}, got {value!r}")
    return number


def _count(name: str, value: Any) -> int:
    number = _number(name, value, 1)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(number)


def _positive(name: str, value: Any) -> float:
    number = _number(name, value, 0)
    if number == 0 or math.isinf(number):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return number


def _names(name: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise ValueError(f"{name} must be a name or a list of names, got {value!r}")
    return names


@dataclass(kw_only=True)
class Modifier:
    """What all modifiers share; a subclass takes its fields as arguments. An epoch of -1 is an end of training."""

    start_epoch: float = -1.0
    end_epoch: float = -1.0
    log_types: Any = None  # loggers of the original program; has no effect

    def __post_init__(self) -> None:
        self.start_epoch = _number("start_epoch", self.start_epoch, -1)
        self.end_epoch = _number("end_epoch", self.end_epoch, -1)
        if 0 <= self.end_epoch < self.start_epoch:
            raise ValueError(f"end_epoch {self.end_epoch:g} is before start_epoch {self.start_epoch:g}")

    @classmethod
    def normalize(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` in today's spelling."""
        return arguments


@dataclass(kw_only=True)
class EpochRange(Modifier):
    """The length of training."""

    end_epoch: float = field()  # required: without `field()` it would inherit the default


@dataclass(kw_only=True)
class OptimizerSetting(Modifier):
    """Hold one setting of the optimizer's parameter groups at a value from `start_epoch` on."""

    key: ClassVar[str]  # the entry of `optimizer.param_groups`
    argument: ClassVar[str]  # the recipe's name for the value

    param_groups: list[int] | None = None  # indices of the groups; None: all of them
    constant_logging: Any = None  # has no effect

    def __post_init__(self) -> None:
        super().__post_init__()
        setattr(self, self.argument, _number(self.argument, getattr(self, self.argument), 0))
        if self.param_groups is not None and (
            not isinstance(self.param_groups, list) or not all(isinstance(index, int) for index in self.param_groups)
        ):
            raise ValueError(f"param_groups must be a list of indices, got {self.param_groups!r}")

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Return the optimizer's parameter groups that the setting is for.

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
            if not 0 <= index < len(groups):
                raise ValueError(f"param_groups names group {index}, but the optimizer has {len(groups)}")
        return [groups[index] for index in self.param_groups]

    def update(self, optimizer: torch.optim.Optimizer, epoch: float) -> None:
        """Write the value into the optimizer if its time has come."""
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


@dataclass(kw_only=True)
class MagnitudePruning(Modifier):
    """Prune the smallest weights: `init_sparsity` of them at `start_epoch`, `final_sparsity` at `end_epoch`."""

    criterion: ClassVar[str] = "magnitude"
    score_types: ClassVar[tuple] = (None, "magnitude")

    final_sparsity: Any  # a number, or {sparsity: [params]}
    params: Any = None  # names, `re:` patterns, __ALL__ or __ALL_PRUNABLE__
    init_sparsity: Any = 0.0
    update_frequency: Any = 1.0  # epochs
    inter_func: str = "cubic"
    mask_type: Any = "unstructured"
    leave_enabled: Any = True
    global_sparsity: bool = False
    score_type: Any = None
    phased: Any = None  # has no effect

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init_sparsity = _number("init_sparsity", self.init_sparsity, 0, 1)
        self.update_frequency = _positive("update_frequency", self.update_frequency)
        if self.inter_func not in CURVES:
            raise ValueError(f"inter_func must be one of {', '.join(CURVES)}, got {self.inter_func!r}")
        if isinstance(self.mask_type, int):  # YAML reads 2:4 as 2 * 60 + 4
            self.mask_type = f"{self.mask_type // 60}:{self.mask_type % 60}"
        self.mask_type = "2:4" if self.mask_type == "tensorrt" else self.mask_type
        try:
            parse_pattern(self.mask_type)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "mask_type must be unstructured, block4, tensorrt, N:M or [rows, cols]; "
                + str(error).removeprefix("pattern: ")
            ) from None
        if self.leave_enabled is not True:
            raise ValueError(f"leave_enabled must be True (masks are always kept), got {self.leave_enabled!r}")
        if self.score_type not in self.score_types:
            raise ValueError(f"score_type must be one of {self.score_types[1:]}, got {self.score_type!r}")
        self.params = _names("params", self.params or [])
        if isinstance(self.final_sparsity, dict):
            if self.params or self.global_sparsity:
                raise ValueError("final_sparsity as {sparsity: [params]} needs `params: []` and no global_sparsity")
            self.final_sparsity = {
                name: _number("final_sparsity", sparsity, 0, 1)
                for sparsity, names in self.final_sparsity.items()
                for name in _names("final_sparsity", names)
            }
        else:
            self.final_sparsity = _number("final_sparsity", self.final_sparsity, 0, 1)
            if not self.params and not self.global_sparsity:
                raise ValueError("params must name the weights to prune, for example __ALL_PRUNABLE__")
            self.params = self.params or ["__ALL_PRUNABLE__"]

    def options(self) -> dict[str, Any]:
        """Return the Pruner's arguments that are particular to this kind of pruning."""
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
        """Return the Pruner that does the work, in time measured in epochs.

        Args:
            model: The model to prune.
            batches: Batches (inputs, targets) for the gradients; not used by magnitude pruning.
            loss_fn: `loss_fn(outputs, targets)`; not used by magnitude pruning.
            end: The epoch at which training ends, for an `end_epoch` of -1.
            progress: Show progress bars while gradients are collected.
            one_shot: Ignore the epochs and `init_sparsity`: the one update, to `final_sparsity`, is due at time 0.

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
    """Magnitude pruning with one threshold for all the weights."""

    global_sparsity: bool = True


@dataclass(kw_only=True)
class MFACPruning(MagnitudePruning):
    """Prune by the empirical Fisher, updating the weights that stay.

    `num_recomputations`, `num_substeps` and `update` are extensions of the format, as are `auto` and `<number>*mean`
    for `damp`, and `auto` for `fisher_block_size`. A single jump from 35 % to 95 % takes any quadratic model of the
    loss far beyond where it holds; new gradients on the way, by default 8 times, keep it valid.
    """

    criterion: ClassVar[str] = "fisher"
    score_types: ClassVar[tuple] = (None, "MFAC")

    num_grads: Any = 256
    damp: Any = 1e-5
    fisher_block_size: Any = 2000  # None: the full matrix
    num_recomputations: Any = 8
    num_substeps: Any = 4
    update: str = "joint"
    available_devices: Any = None
    use_gradient_buffering: Any = None
    grad_sampler_kwargs: Any = None
    num_pages: Any = None  # more than 1: as grads_device: cpu; the number follows from the memory
    grads_device: Any = None  # cpu: gradients go to the GPU page by page

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
            raise ValueError(f"mfac_options must be a mapping, got {options!r}")
        merged = {key: value for key, value in {**arguments, **options}.items() if key != "mfac_options"}
        if "available_gpus" in merged:
            merged["available_devices"] = merged.pop("available_gpus")
        return merged

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_grads, dict):
            raise ValueError(
                f"num_grads must be a whole number (a schedule is not supported yet), got {self.num_grads}"
            )
        self.num_grads = _count("num_grads", self.num_grads)
        self.num_recomputations = _count("num_recomputations", self.num_recomputations)
        self.num_substeps = _count("num_substeps", self.num_substeps)
        if isinstance(self.damp, str) and ("mean" in self.damp or self.damp == "auto"):
            check_settings(self.damp, None)
        else:
            self.damp = _positive("damp", self.damp)
        if self.fisher_block_size not in (None, "auto"):
            self.fisher_block_size = _count("fisher_block_size", self.fisher_block_size)
        if self.update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {self.update!r}")
        if self.num_pages is not None:
            self.num_pages = _count("num_pages", self.num_pages)
        if self.grads_device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.grads_device)):
            raise ValueError(f"grads_device must be cpu, cuda or cuda:<index>, got {self.grads_device!r}")
        devices = _names("available_devices", self.available_devices or [])
        devices += [str(self.grads_device)] * (self.grads_device is not None)
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
        """Return the Pruner's arguments that are particular to M-FAC."""
        return {
            "grads_device": "cpu" if self.grads_device == "cpu" or (self.num_pages or 1) > 1 else None,
            "num_grads": self.num_grads,
            "damping": self.damp,
            "block_size": self.fisher_block_size,
            "recomputations": self.num_recomputations,
            "substeps": self.num_substeps,
            "update": self.update,
        }


@dataclass(kw_only=True)
class MFACGlobalPruning(MFACPruning):
    """M-FAC pruning with one threshold for all the weights (a legacy spelling)."""

    global_sparsity: bool = True


MODIFIERS: dict[str, type[Modifier]] = {
    "EpochRangeModifier": EpochRange,
    "SetLearningRateModifier": SetLearningRate,
    "SetWeightDecayModifier": SetWeightDecay,
    "MagnitudePruningModifier": MagnitudePruning,
    "GMPruningModifier": MagnitudePruning,
    "GlobalMagnitudePruningModifier": GlobalMagnitudePruning,
    "MFACPruningModifier": MFACPruning,
    "MFACGlobalPruningModifier": MFACGlobalPruning,
}


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(item: Item, strict: bool = False) -> Modifier | None:
    """Return the modifier that a recipe's item describes.

    Args:
        item: The name and arguments as read.
        strict: Refuse what is otherwise left out with a warning (quantization, distillation).

    Returns:
        The modifier, or None if it is left out.

    Raises:
        ValueError: If the modifier or one of its arguments is not known, is missing or has a wrong value. The message
            gives the recipe's line.

    Example:
        >>> build(Item("EpochRangeModifier", {"start_epoch": 0, "end_epoch": 3}, line=1)).end_epoch
        3.0
    """
    where = f"recipe line {item.line}: !{item.name}"
    if any(kind in item.name for kind in _OTHER_WORK):
        message = f"{where} is neither pruning nor training"
        if strict:
            raise ValueError(f"{message}; mfac does not run it")
        warnings.warn(f"{message}; it is left out", stacklevel=2)
        return None
    if item.name not in MODIFIERS:
        known = ", ".join(MODIFIERS)
        raise ValueError(
            f"{where} is not a modifier that mfac runs{_suggestion(item.name, MODIFIERS)}; it runs {known}"
        )
    cls = MODIFIERS[item.name]
    try:
        arguments = cls.normalize(item.arguments)
        known = [field.name for field in fields(cls)]
        for key in arguments:
            if key not in known:
                raise ValueError(f"unknown argument {key!r}{_suggestion(str(key), known)}; it takes {', '.join(known)}")
        for needed in [field.name for field in fields(cls) if field.default is MISSING]:
            if needed not in arguments:
                raise ValueError(f"the argument {needed!r} is missing")
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
