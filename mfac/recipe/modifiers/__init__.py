"""The modifiers that a recipe can hold, by the names that recipes use, and how one is made from what was read."""

from __future__ import annotations

from dataclasses import MISSING, fields

from mfac.checks import suggestion, warn
from mfac.recipe.document import Item
from mfac.recipe.modifiers.base import Action, EpochRange, Modifier, Target
from mfac.recipe.modifiers.masks import ACDCPruning, ConstantPruning
from mfac.recipe.modifiers.optimizer import (
    LearningRate,
    LearningRateFunction,
    SetLearningRate,
    SetWeightDecay,
)
from mfac.recipe.modifiers.params import SetParam, TrainableParams
from mfac.recipe.modifiers.pruning import (
    GlobalMagnitudePruning,
    MagnitudePruning,
    MFACGlobalPruning,
    MFACPruning,
    OBSPruning,
    Pruning,
)

__all__ = [
    "MODIFIERS",
    "Action",
    "EpochRange",
    "MagnitudePruning",
    "Modifier",
    "Pruning",
    "Target",
    "build",
]

MODIFIERS: dict[str, type[Modifier]] = {
    "EpochRangeModifier": EpochRange,
    "SetLearningRateModifier": SetLearningRate,
    "LearningRateFunctionModifier": LearningRateFunction,
    "LearningRateModifier": LearningRate,
    "SetWeightDecayModifier": SetWeightDecay,
    "MagnitudePruningModifier": MagnitudePruning,
    "GMPruningModifier": MagnitudePruning,
    "LegacyGMPruningModifier": MagnitudePruning,
    "GlobalMagnitudePruningModifier": GlobalMagnitudePruning,
    "MFACPruningModifier": MFACPruning,
    "MFACGlobalPruningModifier": MFACGlobalPruning,
    "OBSPruningModifier": OBSPruning,
    "ConstantPruningModifier": ConstantPruning,
    "ACDCPruningModifier": ACDCPruning,
    "TrainableParamsModifier": TrainableParams,
    "SetParamModifier": SetParam,
}
_SKIPPED = ("Quantization", "Distillation")  # modifiers of these kinds are skipped with a warning


def build(item: Item, strict: bool = False, name: str = "recipe") -> Modifier | None:
    """Return the modifier that a recipe's item describes.

    Args:
        item: The name and arguments as read.
        strict: Refuse what is otherwise skipped with a warning (quantization, distillation).
        name: What to call the recipe in errors.

    Returns:
        The modifier, or None if it is skipped.

    Raises:
        ValueError: If the modifier or one of its arguments is unknown, missing or has a wrong value. The message gives
            the recipe's line.

    Example:
        >>> build(Item("EpochRangeModifier", {"start_epoch": 0, "end_epoch": 3}, line=1)).end_epoch
        3.0
    """
    where = f"{name} line {item.line}: !{item.name:.80}"
    if any(kind in item.name for kind in _SKIPPED):
        if strict:
            raise ValueError(f"{where}: expected modifiers that prune or train, got one that mfac does not run")
        warn(f"{where} neither prunes nor trains; it is skipped")
        return None
    known_name = item.name.removeprefix("pytorch.")
    if known_name not in MODIFIERS:
        raise ValueError(
            f"{where}: expected one of {', '.join(MODIFIERS)}, got an unknown modifier"
            f"{suggestion(item.name, MODIFIERS)}"
        )
    cls = MODIFIERS[known_name]
    try:
        arguments = cls.normalize(item.arguments)
        known = [field.name for field in fields(cls) if field.name != "settings"]
        written = [key for key in arguments if key != "settings" or key in item.arguments]
        for key in written:
            if key not in known:
                names = [*known, *cls.setting_names(), *cls.spellings] if issubclass(cls, MagnitudePruning) else known
                raise ValueError(
                    f"argument: expected one of {', '.join(names)}, got {key!r:.80}{suggestion(str(key), names)}"
                )
        for needed in [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]:
            if needed not in arguments:
                raise ValueError(f"{needed}: expected a value, got none")
        modifier = cls(**arguments)
        modifier.where = where
        return modifier
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} line {_line(cls, item, str(error))}: !{item.name:.80}: {error!s:.1000}") from error


def _line(cls: type[Modifier], item: Item, message: str) -> int:
    """Return the line of the argument that an error `name: expected ..., got ...` is about."""
    argument = message.partition(":")[0]
    if argument == "argument":
        argument = next((key for key in item.lines if f"got {key!r}" in message), "")
    spellings = getattr(cls, "spellings", {})
    written = [key for key in item.lines if argument in (key, spellings.get(key))]
    return item.at(written[0]) if written else item.line
