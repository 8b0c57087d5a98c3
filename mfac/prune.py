"""One pruning step: saliency, mask, update."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from mfac import ops
from mfac.fisher import Fisher, check_fisher_settings
from mfac.gradients import GradientBuffer
from mfac.parameters import matching_names, prunable_parameters

SCOPES = ("global", "layer")
UPDATES = ("joint", "independent", "none")
CRITERIA = ("fisher", "magnitude")


@dataclass(repr=False)
class PruneResult:
    """What a pruning step did; ``print`` shows it as a table.

    Attributes:
        masks: Name to bool tensor of the parameter's shape, True = kept.
        sparsity: Share of zeros that the masks hold, over all chosen parameters.
        layers: (name, weights, weights kept) of every parameter.
        predicted_loss_increase: ½ δᵀFδ of the whole step; None without gradients.
        seconds: Wall time by stage.
        backend: ``"compiled"`` or ``"reference"``.
    """

    masks: dict[str, Tensor]
    sparsity: float
    layers: list[tuple[str, int, int]]
    predicted_loss_increase: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    backend: str = "compiled"

    def __str__(self) -> str:
        """Return the table."""
        width = max(len("all"), len("layer"), *(len(name) for name, _, _ in self.layers))
        total, kept = sum(n for _, n, _ in self.layers), sum(k for _, _, k in self.layers)
        lines = [f"{'layer':<{width}} {'weights':>12} {'kept':>12} {'sparsity':>9}"]
        for name, n, k in [*self.layers, ("all", total, kept)]:
            lines.append(f"{name:<{width}} {n:>12,} {k:>12,} {1 - k / n:>9.2%}")
        if self.predicted_loss_increase is not None:
            lines.append(f"predicted loss increase {self.predicted_loss_increase:.4g}")
        lines.append(", ".join(f"{stage} {s:.3f} s" for stage, s in self.seconds.items()) + f" ({self.backend})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return one line."""
        return f"PruneResult(sparsity={self.sparsity:.4f}, layers={len(self.layers)}, backend={self.backend!r})"


def prune_step(
    model: nn.Module,
    grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]] | None = None,
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    params: str | Iterable[str] | None = None,
    damping: float = 1e-5,
    block_size: int | None = 2000,
    scope: str = "global",
    update: str = "joint",
    criterion: str = "fisher",
    masks: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> PruneResult:
    """Prune the model's weights in place to the given sparsity, by Optimal Brain Surgeon with an empirical Fisher.

    Weight i is scored by its saliency w_i² / (2 [F⁻¹]_ii), the lowest are removed, and the others are moved to make
    up for it. F = λ I + (1/m) Gᵀ G, block-diagonal (M-FAC, Frantar, Kurtic, Alistarh, NeurIPS 2021). Exactly
    round(sparsity · n) weights are zero afterwards, ties going to the lower index. Unstructured zeros make a model
    smaller to store, not faster to run by themselves.

    Args:
        model: Its weights are written, nothing else.
        grads: A :class:`GradientBuffer`, a tensor [m, d] in the order of :func:`prunable_parameters`, or m dicts name
            -> gradient. None is for ``criterion="magnitude"``, which then updates nothing.
        sparsity: Share of zeros in [0, 1]; or a dict of such shares by name or ``"re:<regex>"``, parameters that no key
            matches staying dense (the update may move them: leave them out of ``params`` if it must not).
        params: What to prune; see :func:`prunable_parameters`. Default: the weights of Linear and ConvNd layers, or the
            parameters of the GradientBuffer.
        damping: λ in [1e-30, 1e30].
        block_size: B, columns per block of F; None for the full matrix.
        scope: ``"global"`` ranks all weights together (under one key, for a dict), ``"layer"`` each parameter by
            itself.
        update: ``"joint"``: the exact minimum of the quadratic model given the mask. ``"independent"``: the sum of
            single-weight updates, as published. ``"none"``: only zeros.
        criterion: ``"fisher"`` or ``"magnitude"`` (|w|).
        masks: Name -> bool tensor, True = kept, from an earlier step: what is pruned stays pruned, and the Fisher is
            restricted to the rest.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Returns:
        Masks, sparsity reached, counts, predicted loss increase and timings.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value, shape, device or name is wrong, or the sparsity is below what ``masks`` hold. The
            model is unchanged then.
        RuntimeError: If the update is not finite (the model is unchanged), or ``backend="compiled"`` cannot be had.

    Example:
        >>> model = torch.nn.Linear(64, 10)
        >>> result = prune_step(model, torch.randn(32, 640), sparsity=0.9)
        >>> int((model.weight == 0).sum())
        576
    """
    check_choices(scope, update, criterion)
    check_fisher_settings(damping, block_size)
    if grads is None and criterion == "fisher":
        raise ValueError("grads: expected gradients for criterion='fisher', got None")
    if params is None and isinstance(grads, GradientBuffer):
        params = grads.names
    chosen = prunable_parameters(model, params)
    device = _check_parameters(chosen)
    groups = sparsity_groups(list(chosen), sparsity, scope)
    matrix = None if grads is None else _gradient_matrix(grads, chosen, device)
    active = None if masks is None else _flat_masks(masks, chosen, device)
    fisher = None if matrix is None else Fisher(matrix, damping, block_size, active=active, backend=backend)
    kernels = ops.select_backend(backend, device)

    seconds: dict[str, float] = {}
    with torch.no_grad(), _timed(seconds, "total"):
        sizes = [p.numel() for p in chosen.values()]
        weights = torch.cat([p.reshape(-1).float() for p in chosen.values()])
        if active is not None:
            weights.masked_fill_(~active, 0)
        before = weights.clone()
        diagonal = None
        if fisher is not None and (criterion == "fisher" or update == "independent"):
            with _timed(seconds, "inverse diagonal"):
                diagonal = fisher.inverse_diagonal()
        with _timed(seconds, "selection"):
            scores = weights.abs() if criterion == "magnitude" else weights.square().div_(diagonal).mul_(0.5)
            zeroed = weights if fisher is None or update == "none" else None
            kept = _select(scores, active, dict(zip(chosen, sizes, strict=True)), groups, kernels, zeroed)
        with _timed(seconds, "update"):
            loss = None
            if fisher is not None and update == "joint":
                loss = fisher.joint_update(weights, kept)
            elif fisher is not None:
                if update == "independent":
                    fisher.independent_update(weights, kept, diagonal)
                loss = fisher.quadratic_form(weights - before)
        # In the parameter's own type: a weight that did not move keeps all its digits, and float16 may overflow.
        parts = zip(chosen.values(), *(x.split(sizes) for x in (weights, before, kept)), strict=True)
        new = [torch.where((k & (a == b)).view_as(p), p, a.view_as(p)).to(p.dtype) for p, a, b, k in parts]
        if not all(torch.isfinite(x).all() for x in new):
            raise RuntimeError(f"update: the result is not finite with damping={damping}; raise the damping")
        for p, x in zip(chosen.values(), new, strict=True):
            p.copy_(x)
    shaped = {name: part.view_as(p).clone() for (name, p), part in zip(chosen.items(), kept.split(sizes), strict=True)}
    return PruneResult(
        masks=shaped,
        sparsity=1 - int(kept.sum()) / len(kept),
        layers=[(name, mask.numel(), int(mask.sum())) for name, mask in shaped.items()],
        predicted_loss_increase=loss,
        seconds=seconds,
        backend="compiled" if kernels is ops else "reference",
    )


def check_choices(scope: str, update: str, criterion: str) -> None:
    """Check the arguments that are one of a few words.

    Args:
        scope: One of SCOPES.
        update: One of UPDATES.
        criterion: One of CRITERIA.

    Raises:
        ValueError: If one is another word.
    """
    for name, value, known in (
        ("scope", scope, SCOPES),
        ("update", update, UPDATES),
        ("criterion", criterion, CRITERIA),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def sparsity_groups(
    names: list[str], sparsity: float | Mapping[str, float], scope: str
) -> list[tuple[list[str], float]]:
    """Split parameters into groups that are ranked together.

    Args:
        names: All chosen parameters.
        sparsity: A share for all, or shares by name or ``"re:<regex>"``.
        scope: ``"global"`` or ``"layer"``.

    Returns:
        (names, sparsity) of each group.

    Raises:
        TypeError: If a share is not a number.
        ValueError: If a share is not in [0, 1], or a key matches nothing or what another key matches.
    """
    groups: list[tuple[list[str], float]] = []
    if isinstance(sparsity, Mapping):
        taken: dict[str, str] = {}
        if not sparsity:
            raise ValueError("sparsity: expected at least one entry, got an empty dict")
        for key, value in sparsity.items():
            found = matching_names(key, names)
            if not found:
                raise ValueError(f"sparsity: {key!r} matches none of the parameters {', '.join(names[:8])}")
            for name in found:
                if name in taken:
                    raise ValueError(f"sparsity: {name!r} is matched by both {taken[name]!r} and {key!r}")
                taken[name] = key
            groups.append((found, _share(value, f"sparsity[{key!r}]")))
    else:
        groups.append((names, _share(sparsity, "sparsity")))
    if scope == "layer":
        groups = [([name], value) for found, value in groups for name in found]
    return groups


def _share(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected in [0, 1], got {value!r}")
    return float(value)


def _check_parameters(chosen: Mapping[str, Tensor]) -> torch.device:
    devices = {p.device for p in chosen.values()}
    if len(devices) > 1:
        raise ValueError(f"model: expected parameters on one device, got {', '.join(sorted(map(str, devices)))}")
    if torch.device("meta") in devices:
        raise ValueError("model: expected parameters with data, got them on the meta device")
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise TypeError(f"model: expected floating point parameters, got {p.dtype} for {name!r}")
        if not torch.isfinite(p).all():
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {name!r}")
    return devices.pop()


def _gradient_matrix(
    grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]], chosen: Mapping[str, Tensor], device: torch.device
) -> Tensor:
    d = sum(p.numel() for p in chosen.values())
    if isinstance(grads, GradientBuffer):
        if grads.names != list(chosen):
            raise ValueError(
                f"grads: the buffer holds {', '.join(grads.names[:8])}; params asks for {', '.join(chosen)}"
            )
        if len(grads) == 0:
            raise ValueError("grads: expected at least one gradient, got an empty GradientBuffer")
        matrix = grads.tensor
    elif isinstance(grads, Tensor):
        matrix = grads
    elif isinstance(grads, Sequence):
        buffer = GradientBuffer(max(len(grads), 1), chosen)
        for index, row in enumerate(grads):
            if not isinstance(row, Mapping):
                raise TypeError(f"grads[{index}]: expected a dict name -> gradient, got {type(row).__name__}")
            if set(row) != set(chosen):
                wrong = sorted(set(row) ^ set(chosen))[:4]
                raise ValueError(f"grads[{index}]: expected the names {', '.join(chosen)}; missing or unknown: {wrong}")
            if not buffer.append_gradients([row[name] for name in chosen]):
                raise ValueError(f"grads[{index}]: expected finite numbers, got NaN or infinity")
        matrix = buffer.tensor
    else:
        raise TypeError(f"grads: expected a GradientBuffer, a tensor or a list of dicts, got {type(grads).__name__}")
    if matrix.device != device:
        raise ValueError(f"grads: expected on {device} like the model, got {matrix.device}")
    if matrix.dim() != 2 or matrix.shape[1] != d:
        raise ValueError(f"grads: expected [m, {d}] for these parameters, got shape {list(matrix.shape)}")
    return matrix


def _flat_masks(masks: Mapping[str, Tensor], chosen: Mapping[str, Tensor], device: torch.device) -> Tensor:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected name -> bool tensor, got {type(masks).__name__}")
    for name, mask in masks.items():
        if name not in chosen:
            raise ValueError(f"masks: {name!r} is none of the parameters {', '.join(chosen)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != chosen[name].shape:
            got = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"masks[{name!r}]: expected bool of shape {list(chosen[name].shape)}, got {got}")
        if mask.is_meta:
            raise ValueError(f"masks[{name!r}]: expected on {device}, got meta")
    full = [masks[n] if n in masks else torch.ones_like(p, dtype=torch.bool) for n, p in chosen.items()]
    return torch.cat([mask.to(device).reshape(-1) for mask in full])


def _select(
    scores: Tensor,
    active: Tensor | None,
    sizes: dict[str, int],
    groups: list[tuple[list[str], float]],
    kernels: ModuleType,
    weights: Tensor | None,
) -> Tensor:
    """Mask of all weights: the lowest round(sparsity · n) of each group pruned, and zeroed in weights if given."""
    if active is not None:
        scores.masked_fill_(~active, -torch.inf)  # what was pruned before is so again
    totals = [sum(sizes[name] for name in names) for names, _ in groups]
    counts = [round(sparsity * n) for (_, sparsity), n in zip(groups, totals, strict=True)]
    order = [name for names, _ in groups for name in names]
    in_order = order == list(sizes)
    parts = dict(zip(sizes, scores.split(list(sizes.values())), strict=True))
    values = scores if in_order else torch.cat([parts[name] for name in order])
    if active is not None:
        for (names, sparsity), segment, count in zip(groups, values.split(totals), counts, strict=True):
            held = int((segment == -torch.inf).sum())
            if count < held:
                raise ValueError(
                    f"sparsity: {sparsity} of {len(segment)} weights ({', '.join(names[:3])}) is {count}, but masks "
                    f"already hold {held} pruned; pruned weights stay pruned unless their mask is dropped"
                )
    if in_order:
        return kernels.select_smallest(values, counts, totals, weights)
    kept = torch.ones_like(scores, dtype=torch.bool) if active is None else active.clone()
    selected = kernels.select_smallest(values, counts, totals).split([sizes[name] for name in order])
    where = dict(zip(sizes, kept.split(list(sizes.values())), strict=True))
    for name, mask in zip(order, selected, strict=True):
        where[name].copy_(mask)
    if weights is not None:
        weights.masked_fill_(~kept, 0)
    return kept


@contextmanager
def _timed(seconds: dict[str, float], stage: str):
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
