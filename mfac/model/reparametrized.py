"""Weights that a layer computes from other parameters: weight norm, spectral norm, torch's pruning masks and others."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Parametrizations of torch under which zeros of one original are zeros of the weight: class name -> that original.
_KEEP_ZEROS = {"_WeightNorm": "original1", "_SpectralNorm": "original"}


@dataclass(frozen=True)
class Reparametrized:
    """How a layer computes one of its tensors.

    Attributes:
        originals: Names of the parameters that it is computed from, relative to the layer.
        pruned: The original whose zeros are zeros of the tensor; the first one if there is no such original.
        refusal: Why the tensor cannot be pruned through ``pruned``; empty if it can.
        norm_dim: ``pruned`` is divided by a norm of each of its slices along this axis, of the whole for -1.
    """

    originals: tuple[str, ...]
    pruned: str
    refusal: str = ""
    norm_dim: int | None = None


def reparametrized(layer: nn.Module) -> dict[str, Reparametrized]:
    """Return the tensors of a layer that are computed from other parameters of it.

    Known are ``torch.nn.utils.parametrize``, the hooks of ``torch.nn.utils.weight_norm`` and ``spectral_norm``, and
    ``torch.nn.utils.prune``.

    Args:
        layer: Any module; its children are not searched.

    Returns:
        Attribute of the layer, such as ``"weight"``, to how it is computed.
    """
    found = {}
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = Reparametrized((f"{hook.name}_g", f"{hook.name}_v"), f"{hook.name}_v", norm_dim=hook.dim)
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = Reparametrized((f"{hook.name}_orig",), f"{hook.name}_orig", norm_dim=-1)
        elif isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            refusal = (
                f"masked by torch.nn.utils.prune; call torch.nn.utils.prune.remove(layer, {name!r}) first, then pass "
                'masks="nonzero"'
            )
            found[name] = Reparametrized((f"{name}_orig",), f"{name}_orig", refusal)
    if parametrize.is_parametrized(layer):
        for name, steps in layer.parametrizations.items():
            path = f"parametrizations.{name}."
            originals = tuple(path + original for original, _ in steps.named_parameters(recurse=False))
            if originals:  # else a buffer is parametrized
                kept = _original_with_its_zeros(steps)
                kinds = ", ".join(type(step).__name__ for step in steps)
                refusal = (
                    "" if kept else f"parametrized by {kinds}, which may not keep zeros; leave it out with exclude="
                )
                norm_dim = steps[0].dim if kept == "original1" else -1 if kept else None
                found[name] = Reparametrized(originals, path + kept if kept else originals[0], refusal, norm_dim)
    for name, computed in found.items():  # the direction of weight norm may itself be masked
        inner = found.get(computed.pruned)
        if inner is not None:
            found[name] = replace(inner, norm_dim=computed.norm_dim)
    return found


def _original_with_its_zeros(steps: parametrize.ParametrizationList) -> str | None:
    step = type(steps[0])
    known = len(steps) == 1 and step.__module__ == "torch.nn.utils.parametrizations"
    return _KEEP_ZEROS.get(step.__name__) if known else None
