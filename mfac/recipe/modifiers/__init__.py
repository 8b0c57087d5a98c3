"""The modifiers that a recipe can hold, by the names that recipes use, and how one is made from what was read."""

from __future__ import annotations

from dataclasses import MISSING, fields

from mfac.checks import suggestion, warn
from mfac.recipe.document import Item
from mfac.recipe.modifiers.base import EpochRange, Modifier
from mfac.recipe.modifiers.optimizer import OptimizerSetting, SetLearningRate, SetWeightDecay
from mfac.recipe.modifiers.pruning import GlobalMagnitudePruning, MagnitudePruning, MFACGlobalPruning, MFACPruning

__all__ = ["MODIFIERS", "EpochRange", "MagnitudePruning", "Modifier", "OptimizerSetting", "build"]

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
_SKIPPED = ("Quantization", "Distillation")  # modifiers of these kinds are skipped with a warning


def build(item: Item, strict: bool = False) -> Modifier | None:
    """Return the modifier that a recipe's item describes.

    Args:
        item: The name and arguments as read.
        strict: Refuse what is otherwise skipped with a warning (quantization, distillation).

    Returns:
        The modifier, or None if it is skipped.

    Raises:
        ValueError: If the modifier or one of its arguments is unknown, missing or has a wrong value. The message gives
            the recipe's line.

    Example:
        >>> build(Item("EpochRangeModifier", {"start_epoch": 0, "end_epoch": 3}, line=1)).end_epoch
        3.0
    """
    where = f"recipe line {item.line}: !{item.name:.80}"
    if any(kind in item.name for kind in _SKIPPED):
        if strict:
            raise ValueError(f"{where}: expected modifiers that prune or train, got one that mfac does not run")
        warn(f"{where} neither prunes nor trains; it is skipped")
        return None
    if item.name not in MODIFIERS:
        raise ValueError(
            f"{where}: expected one of {', '.join(MODIFIERS)}, got an unknown modifier"
            f"{suggestion(item.name, MODIFIERS)}"
        )
    cls = MODIFIERS[item.name]
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
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error!s:.1000}") from error
