"""Modifiers that prune by the empirical Fisher."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mfac.checks import check_int, warn
from mfac.pruning.settings import least_num_grads
from mfac.recipe.modifiers.base import names, plain_number
from mfac.recipe.modifiers.pruning import BY_THE_FORMAT, MagnitudePruning

_REFRESH_DIVISOR = 16  # of so many gradients one is new at each recomputation


@dataclass(kw_only=True)
class MFACPruning(MagnitudePruning):
    """Prune by the empirical Fisher (M-FAC), updating the remaining weights.

    Beyond the format's own arguments it takes settings of :class:`mfac.Pruner` by their names. Settings in the recipe
    are used exactly as written. What it leaves open, damping and block size too, has the defaults of the Pruner, but
    only a sixteenth of the gradients is new at each recomputation (docs/defaults.md).
    """

    criterion: ClassVar[str] = "fisher"
    score_types: ClassVar[tuple[str, ...]] = ("MFAC",)
    spellings: ClassVar[dict[str, str]] = {
        "damp": "damping",
        "fisher_block_size": "block_size",
        "available_gpus": "available_devices",
    }
    reported: ClassVar[tuple[str, ...]] = (
        "num_grads", "recomputations", "refresh", "damping", "block_size", "update", "substeps", "corrections",
    )  # fmt: skip
    not_taken: ClassVar[tuple[str, ...]] = BY_THE_FORMAT

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
            The arguments by the names of this class's fields and settings.

        Raises:
            ValueError: If `mfac_options` is not a mapping, or an argument is given twice.
        """
        options = arguments.get("mfac_options") or {}
        if not isinstance(options, dict):
            raise ValueError(f"mfac_options: expected a mapping, got {options!r:.80}")
        renamed: dict[str, Any] = {}
        for key, value in [*arguments.items(), *options.items()]:
            if key == "mfac_options":
                continue
            name = cls.spellings.get(key, key)
            if name in renamed:
                raise ValueError(f"{key}: expected one value for {name}, got two")
            renamed[name] = value
        return super().normalize(renamed)

    def settings_for(self, one_shot: bool) -> dict[str, Any]:
        """Return the settings of the Pruner. An update that the recipe leaves open is joint if no training follows."""
        return {**self.settings, "update": "joint"} if one_shot and "update" not in self.given else self.settings

    def __post_init__(self) -> None:
        """Check the arguments."""
        given = self.settings.get("num_grads")
        if isinstance(given, dict):
            self.settings["num_grads"] = {plain_number(key): plain_number(value) for key, value in given.items()}
        super().__post_init__()
        least = least_num_grads(self.settings["num_grads"])
        if "refresh" not in self.given:
            self.settings["refresh"] = max(1, least // _REFRESH_DIVISOR)
        check_int("refresh", self.settings["refresh"] or 1, 1, least)
        device = self.settings["grads_device"]
        if device is not None and not re.fullmatch(r"cpu|disk(:.+)?|cuda(:\d+)?", str(device)):
            raise ValueError(
                f"grads_device: expected cpu, disk, disk:<folder>, cuda or cuda:<index>, got {device!r:.80}"
            )
        asked = [*names("available_devices", self.available_devices or []), str(device)]
        asked = [name for name in asked if name.startswith("cuda")]
        if asked and not torch.cuda.is_available():
            warn(f"the recipe asks for {', '.join(asked)}, but CUDA is not available: the CPU is used")
        if str(device).startswith("cuda"):  # on a GPU: where the model is
            self.settings["grads_device"] = None
        if self.num_pages is not None and check_int("num_pages", plain_number(self.num_pages)) > 1:
            self.settings["grads_device"] = "cpu"
        if self.use_gradient_buffering or self.grad_sampler_kwargs:
            warn(
                "use_gradient_buffering and grad_sampler_kwargs have no effect: gradients come from the batches given "
                "to Manager.apply"
            )


@dataclass(kw_only=True)
class MFACGlobalPruning(MFACPruning):
    """M-FAC pruning with one threshold for all weights (a legacy spelling)."""

    global_sparsity: bool = True


@dataclass(kw_only=True)
class OBSPruning(MFACPruning):
    """Prune by the empirical Fisher as oBERT does (Kurtic et al., 2022, arXiv 2203.07259); another spelling of M-FAC.

    A block of the Fisher may hold the end of one parameter and the beginning of the next.
    """

    score_types: ClassVar[tuple[str, ...]] = ("OBS",)
    spellings: ClassVar[dict[str, str]] = {**MFACPruning.spellings, "num_recomputations": "recomputations"}

    global_sparsity: Any = True
