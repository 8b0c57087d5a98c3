"""The modifiers that a recipe can hold, by the names that recipes use, and how one is made from what was read."""

from __future__ import annotations

from dataclasses import MISSING, fields

from mfac.checks import suggestion, warn
from mfac.recipe.document import Item
from mfac.recipe.modifiers.base import Action, EpochRange, Modifier, Target
from mfac.recipe.modifiers.masks import ACDCPruning, ConstantPruning
from mfac.recipe.modifiers.mfac import MFACGlobalPruning, MFACPruning, OBSPruning
from mfac.recipe.modifiers.optimizer import (
    LearningRate,
    LearningRateFunction,
    SetLearningRate,
    SetWeightDecay,
)
from mfac.recipe.modifiers.params import SetParam, TrainableParams
from mfac.recipe.modifiers.pruning import GlobalMagnitudePruning, MagnitudePruning, Pruning

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
# Modifiers of SparseML and of well-known forks that are not run, and what they do. The nearest of those that are run
# would do something else.
_NOT_RUN: dict[str, str] = {
    "LayerPruningModifier": "removes whole layers",
    "StructuredPruningModifier": "removes whole filters or channels",
    "LayerThinningModifier": "cuts pruned filters and channels out of the network",
    "MovementPruningModifier": "scores weights by how they move in training",
    "ASRegModifier": "regularises activations towards zero",
    "GradualParamModifier": "moves parameters between two values in training",
    "SparsificationLoggingModifier": "logs the sparsity",
    "ConstantKSModifier": "holds what is zero; !ConstantPruningModifier does so here",
    "GradualKSModifier": "prunes the smallest weights gradually; !GMPruningModifier does so here",
    "ACDCGlobalMagnitudePruningModifier": "alternates dense and sparse phases; !ACDCPruningModifier does so here",
    "ACDCMFACPruningModifier": "alternates dense and sparse phases, with masks by M-FAC",
    "AdaPruneGlobalMagnitudePruningModifier": "prunes by magnitude and reconstructs the output of each layer",
    "AdaPruneMFACPruningModifier": "prunes by M-FAC and reconstructs the output of each layer",
    "CAPruningModifier": "prunes by correlations within a layer (CAP)",
    "GWProdPruningModifier": "scores weights by weight times gradient",
    "WandaPruningModifier": "scores weights by the norm of their inputs",
    "SparseGPTModifier": "prunes layer by layer by the outputs of each (SparseGPT)",
    "GPTQModifier": "quantizes layer by layer by the outputs of each",
    "SmoothQuantModifier": "rescales weights for quantization",
    "LogarithmicEqualizationModifier": "rescales weights for quantization",
}
_CUTOFF = 0.9  # of a misspelling to what was meant; whole words such as Layer and GM must not be taken for each other


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
        if known_name in _NOT_RUN:
            raise ValueError(f"{where}: expected a modifier that mfac runs, got one that {_NOT_RUN[known_name]}")
        raise ValueError(
            f"{where}: expected one of {', '.join(MODIFIERS)}, got an unknown modifier"
            f"{suggestion(known_name, MODIFIERS, _CUTOFF)}"
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
