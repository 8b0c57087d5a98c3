"""Modifiers that prune: the format's own arguments, what they do in a training run, and magnitude."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from mfac.checks import check_choice
from mfac.gradients.settings import SourceSettings
from mfac.model.names import shorten
from mfac.model.targets import prunable_parameters
from mfac.pruning.criteria import CRITERIA
from mfac.pruning.gradual import Pruner
from mfac.pruning.patterns import parse_pattern
from mfac.pruning.result import PruneResult
from mfac.pruning.schedule import CURVES, Schedule
from mfac.pruning.settings import CorrectionSettings, GradientSettings, PrunerSettings
from mfac.recipe.modifiers.base import Action, Modifier, Target, flag, fraction, names, plain_number, positive
from mfac.settings import definitions

_EVERY_STEP = 1e-6  # epochs: an update is due at every step
FROM_PARAM = "__FROM_PARAM__"  # an initial sparsity: what the parameters have when the recipe is applied

# Settings that the format gives in its own way, or that whoever applies the recipe gives.
BY_THE_FORMAT = (
    "params", "pattern", "scope", "criterion", "initial_sparsity", "start", "frequency", "schedule", "masks", "buffer",
    "forward", "progress", "process_group",
)  # fmt: skip
_NAMES = {  # of the Pruner -> of the format
    "sparsity": "final_sparsity", "initial_sparsity": "init_sparsity", "start": "start_epoch", "end": "end_epoch",
    "frequency": "update_frequency", "pattern": "mask_type",
}  # fmt: skip


def pattern_of(mask_type: Any) -> Any:
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
            result[name] = fraction("final_sparsity", sparsity)
    if not result:
        raise ValueError(f"final_sparsity: expected a number or {{sparsity: [params]}}, got {final_sparsity!r:.80}")
    return result


def _percent(sparsities: list[float]) -> str:
    """Return the range of sparsities in rising order."""
    return " to ".join(dict.fromkeys(f"{100 * value:.1f}" for value in (sparsities[0], sparsities[-1]))) + " %"


@dataclass(kw_only=True)
class MagnitudePruning(Modifier):
    """Prune the smallest weights, from `init_sparsity` at `start_epoch` to `final_sparsity` at `end_epoch`."""

    prunes: ClassVar[bool] = True
    criterion: ClassVar[str] = "magnitude"
    score_types: ClassVar[tuple[str, ...]] = ("magnitude",)
    spellings: ClassVar[dict[str, str]] = {}  # of the format -> of mfac
    reported: ClassVar[tuple[str, ...]] = ()  # settings that the result depends on most
    not_taken: ClassVar[tuple[str, ...]] = (  # settings that make no sense without gradients
        *BY_THE_FORMAT, *definitions(GradientSettings), *definitions(SourceSettings),
        *definitions(CorrectionSettings), "update", "substeps", "damping",
        "block_size", "precision",
    )  # fmt: skip

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
    settings: dict[str, Any] = field(default_factory=dict)  # of mfac.Pruner

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        known = definitions(PrunerSettings)
        self.given = frozenset(self.settings)  # those that the recipe says
        given = {**{name: known[name].default for name in self.setting_names()}, **self.settings}
        self.settings = {name: known[name].check(name, plain_number(value)) for name, value in given.items()}
        if self.init_sparsity != FROM_PARAM:
            self.init_sparsity = fraction("init_sparsity", self.init_sparsity)
        if plain_number(self.update_frequency) == -1:
            self.update_frequency = _EVERY_STEP
        self.update_frequency = positive("update_frequency", self.update_frequency)
        check_choice("inter_func", self.inter_func, CURVES)
        self.mask_type = pattern_of(self.mask_type)
        self.leave_enabled = flag("leave_enabled", self.leave_enabled)
        self.global_sparsity = flag("global_sparsity", self.global_sparsity)
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
            self.final_sparsity = fraction("final_sparsity", self.final_sparsity)
            if not self.params and not self.global_sparsity:
                raise ValueError("params: expected names of the weights to prune, such as __ALL_PRUNABLE__, got none")
            self.params = self.params or ["__ALL_PRUNABLE__"]
        lowest = self.final_sparsities[0]
        if self.init_sparsity != FROM_PARAM and self.init_sparsity > lowest:
            raise ValueError(
                f"init_sparsity: expected at most final_sparsity = {lowest:g}, because pruned weights stay pruned, got "
                f"{self.init_sparsity:g}"
            )

    @property
    def final_sparsities(self) -> list[float]:
        """The sparsities at the end, in rising order."""
        final = self.final_sparsity
        return sorted(set(final.values())) if isinstance(final, dict) else [final]

    @property
    def needs_end(self) -> bool:
        """Whether it depends on the epoch at which training ends."""
        return self.end_epoch < 0

    def warnings(self, end: float) -> list[str]:
        """Return warnings of an end that training never reaches, and of a sparsity that leaves nothing."""
        found = []
        if self.end_epoch > end:
            final = self.final_sparsities
            asked = _percent(final)
            if self.init_sparsity == FROM_PARAM:
                ends = f"below the sparsity of {asked} that it asks for"
            else:
                ends = f"at a sparsity of {_percent([self._sparsity_at(end, value) for value in final])}, not {asked}"
            found.append(
                f"end_epoch: expected at most the {end:g} epochs of training, which will end {ends}, got "
                f"{self.end_epoch:g}"
            )
        if self.final_sparsities[-1] == 1:
            found.append("final_sparsity: expected below 1, which sets every weight of a parameter to zero, got 1")
        return found

    def _sparsity_at(self, epoch: float, final: float) -> float:
        """Return the sparsity after the updates that are due by an epoch."""
        start = max(self.start_epoch, 0.0)
        schedule = Schedule(self.init_sparsity, final, start, self.end_epoch, self.update_frequency, self.inter_func)
        time = schedule.nominal_time(epoch)
        return 0.0 if time is None else schedule.sparsity(time)

    @staticmethod
    def _shown(name: str, settings: Mapping[str, Any]) -> str:
        """Return a setting as a reader of the recipe should see it."""
        if name == "corrections" and settings[name] is None:
            said = {"joint": "a correction at each recomputation", "auto": "corrections of joint updates"}
            return said.get(settings["update"], "no corrections")
        return f"{name}={settings[name]}"

    def describe(self, one_shot: bool) -> str:
        """Return a line that tells the settings of the recipe from those that it leaves open."""
        settings = self.settings_for(one_shot)
        said = [self._shown(name, settings) for name in settings if name in self.given]
        left = [self._shown(name, settings) for name in self.reported if name not in self.given]
        parts = [f"{what} {', '.join(settings)}" for what, settings in (("of the recipe", said), ("by default", left))]
        used = [part for part, settings in zip(parts, (said, left), strict=True) if settings]
        return f"{type(self).__name__}: {'; '.join(used)}"

    @classmethod
    def setting_names(cls) -> list[str]:
        """Return the settings of :class:`mfac.Pruner` that a recipe may give by their names."""
        return [name for name in definitions(PrunerSettings) if name not in cls.not_taken]

    @classmethod
    def normalize(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` with the settings of :class:`mfac.Pruner` under `settings`."""
        known = set(cls.setting_names())
        own = {key: value for key, value in arguments.items() if key not in known}
        return {**own, "settings": {key: value for key, value in arguments.items() if key in known}}

    def settled(self, end: float) -> float:
        """Return the epoch of the last update."""
        return end if self.end_epoch < 0 else self.end_epoch

    def settings_for(self, one_shot: bool) -> dict[str, Any]:
        """Return the settings of the Pruner; ``one_shot``: no training follows."""
        return self.settings

    def bind(self, target: Target) -> Pruning:
        """Return the Pruner that carries out the modifier, as an action; its time is measured in epochs."""
        start = end = initial = 0.0
        from_param = self.init_sparsity == FROM_PARAM
        if not target.one_shot:
            start, end = max(self.start_epoch, 0.0), target.end if self.end_epoch < 0 else self.end_epoch
            initial = "current" if from_param else self.init_sparsity
        per_layer = isinstance(self.final_sparsity, dict)
        pruner = self._pruner(
            target.model,
            target.batches if CRITERIA[self.criterion].needs_gradients else None,
            target.loss_fn,
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
            masks="nonzero" if from_param else None,
            progress=target.progress,
            forward=target.forward,
            process_group=target.process_group,
            **self.settings_for(target.one_shot),
        )
        return Pruning(pruner, self.leave_enabled or target.one_shot)

    def check_thawed(self, model: nn.Module, thawed: Collection[str]) -> None:
        """Check that no parameter is left out because it is frozen when the recipe is applied.

        Args:
            model: The model.
            thawed: Names of frozen parameters that the recipe makes trainable later.

        Raises:
            ValueError: If one is.
        """
        left_out = prunable_parameters(model, self.params).left_out if self.params else {}
        missed = [name for name in left_out if name in thawed]
        if missed:
            raise ValueError(
                f"params: expected the names of {shorten(missed, 3)} too, frozen when the recipe is applied and made "
                f"trainable by it later, which __ALL_PRUNABLE__ leaves out, got {self.params}"
            )

    @staticmethod
    def _pruner(*arguments: Any, **settings: Any) -> Pruner:
        """Return a Pruner, whose errors name the arguments of the recipe."""
        try:
            return Pruner(*arguments, **settings)
        except ValueError as error:
            name, colon, text = str(error).partition(":")
            raise ValueError(f"{_NAMES.get(name, name)}{colon}{text}") from error


class Pruning(Action):
    """A Pruner as an action.

    Args:
        pruner: Its time is measured in epochs.
        leave_enabled: Hold the masks after the last update; else the weights are free again.

    Attributes:
        pruner: As given.
    """

    def __init__(self, pruner: Pruner, leave_enabled: bool) -> None:
        self.pruner, self._leave_enabled = pruner, leave_enabled

    @property
    def released(self) -> bool:
        """Whether the weights are free again."""
        return self.pruner.finished and not self._leave_enabled

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks that are held."""
        return {} if self.released else self.pruner.masks

    def step(self, last: float, epoch: float) -> PruneResult | None:
        """Enforce the masks, and prune if an update is due."""
        return None if self.released else self.pruner.step(epoch)

    def permanent(self, epoch: float) -> bool:
        """Return whether its masks are never dropped."""
        return self._leave_enabled

    def due(self, epoch: float) -> bool:
        """Return whether an update is due."""
        return not self.released and self.pruner.due(epoch)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Count what masks of other modifiers hold as pruned, in the parameters that this one prunes."""
        own = {name: masks[name] for name in self.pruner.params if name in masks}
        if own:
            self.pruner.hold(own)

    def enforce(self) -> None:
        """Set pruned weights to zero."""
        if not self.released:
            self.pruner.apply_masks()

    def state_dict(self) -> dict[str, Any]:
        """Return the Pruner's state."""
        return {**self.pruner.state_dict(), "released": self.released}

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Check a state of the Pruner."""
        self.pruner.check_state_dict(state, strict)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the Pruner's state, and enforce its masks if they are held."""
        self.pruner.restore(state, strict=False)  # checked already
        self.enforce()


@dataclass(kw_only=True)
class GlobalMagnitudePruning(MagnitudePruning):
    """Magnitude pruning with one threshold for all weights."""

    global_sparsity: bool = True
