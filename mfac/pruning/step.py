"""One pruning step: saliency, mask, update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mfac.fisher import Fisher, check_precision
from mfac.gradients.buffer import GradientBuffer
from mfac.model.targets import names_of, prunable_parameters
from mfac.ops import compiled
from mfac.ops.backend import select_backend
from mfac.pruning.quadratic import Method, check_settings, choose_settings, prune_vector, saliencies, timed
from mfac.pruning.result import PruneResult
from mfac.pruning.selection import Selection

SCOPES = ("global", "layer")
UPDATES = ("joint", "independent", "none")
CRITERIA = ("fisher", "magnitude")


def prune_step(
    model: nn.Module,
    grads: GradientBuffer | Tensor | Sequence[Mapping[str, Tensor]] | None = None,
    sparsity: float | Mapping[str, float] = 0.5,
    *,
    params: str | Iterable[str] | None = None,
    damping: float | str = "3e-2*mean",
    block_size: int | str | None = 512,
    pattern: str | Sequence[int] = "unstructured",
    scope: str = "global",
    update: str = "joint",
    criterion: str = "fisher",
    substeps: int = 8,
    masks: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
    precision: str = "highest",
) -> PruneResult:
    """Prune the model's weights in place to the given sparsity, by Optimal Brain Surgeon with an empirical Fisher.

    Weight i is scored by its saliency w_i² / (2 [F⁻¹]_ii), the lowest are removed, and the others are moved to make
    up for it. F = λ I + (1/m) Gᵀ G, block-diagonal (M-FAC, Frantar, Kurtic, Alistarh, NeurIPS 2021; as published:
    ``update="independent", substeps=1, damping=1e-5, block_size=2000``). Exactly round(sparsity · n) weights are zero
    afterwards, ties going to the lower index. Unstructured zeros make a model smaller to store, not faster to run by
    themselves.

    Args:
        model: Its weights are written, nothing else.
        grads: A :class:`GradientBuffer`, a tensor [m, d] in the order of :func:`prunable_parameters`, or m dicts name
            -> gradient. None is for ``criterion="magnitude"``, which then updates nothing. For a model on a GPU they
            may be in host memory: they go to the GPU page by page.
        sparsity: Share of zeros in [0, 1]; or a dict of such shares by name or ``"re:<regex>"``, parameters that no key
            matches staying dense (the update may move them: leave them out of ``params`` if it must not).
        params: What to prune; see :func:`prunable_parameters`. Default: the weights of Linear and ConvNd layers, or the
            parameters of the GradientBuffer.
        damping: λ in [1e-30, 1e30]; ``"<number>*mean"``, relative to the mean square of the gradients; or ``"auto"``:
            the best of a few by the loss that a quarter of the gradients predicts for a step made from the others.
        block_size: B, columns per block of F; None for the full matrix; ``"auto"`` as for damping. ``"auto"`` takes as
            long as some 10 steps, for both together.
        pattern: ``"unstructured"``; ``"N:M"`` (N kept of M neighbouring input channels); ``"block4"`` (4 of them
            together); or ``[rows, cols]`` (blocks of output by input channels). Convolutions are grouped at each
            position of the kernel. Groups are scored as such, ½ w_Pᵀ ([F⁻¹]_PP)⁻¹ w_P. What makes no whole group stays
            dense, and sparsity counts the weights in whole groups: 0.5 for all groups of 2:4, less for some of them.
        scope: ``"global"`` ranks all weights together (under one key, for a dict), ``"layer"`` each parameter by
            itself.
        update: ``"joint"``: the exact minimum of the quadratic model given the mask. ``"independent"``: the sum of
            single-weight updates, as published. ``"none"``: only zeros.
        criterion: ``"fisher"`` or ``"magnitude"`` (|w|; for groups the sum of squares).
        substeps: S: the step is made in S sub-steps of selection and update under the same gradients, so that the
            choice of weights knows of those that have gone before. Takes S times as long. (1 for magnitude.)
        masks: Name -> bool tensor, True = kept, from an earlier step: what is pruned stays pruned, and the Fisher is
            restricted to the rest.
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.
        precision: ``"highest"``, or, for speed on a GPU, ``"high"`` or ``"medium"``; see :class:`Fisher`. No effect on
            the CPU.

    Returns:
        Masks, sparsity reached, counts, settings, predicted loss increase and timings.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value, shape, device or name is wrong, the pattern fits no layer or not one named in
            ``params``, there are fewer than 4 gradients for ``"auto"``, or the sparsity is below what ``masks`` hold.
            The model is unchanged then.
        RuntimeError: If the update is not finite (the model is unchanged), or ``backend="compiled"`` cannot be had.

    Example:
        >>> model = torch.nn.Linear(64, 10)
        >>> result = prune_step(model, torch.randn(32, 640), sparsity=0.9)
        >>> int((model.weight == 0).sum())
        576
    """
    method = check_method(scope, update, criterion, substeps)
    check_settings(damping, block_size)
    problem = Problem(
        model, grads, sparsity, params=params, pattern=pattern, scope=scope, masks=masks, criterion=criterion,
        backend=backend, precision=precision,
    )  # fmt: skip
    return prune_problem(problem, method, damping, block_size)


class Problem:
    """A model to be pruned as flat vectors: the arguments that say what, checked.

    Args:
        model: See :func:`prune_step`, as for the rest.
        grads: Gradients or None.
        sparsity: Shares of zeros.
        params: What to prune.
        pattern: How weights group.
        scope: What is ranked together.
        masks: Of an earlier step.
        criterion: ``"fisher"`` needs gradients.
        backend: What computes.
        precision: Of matrix products.
        named: What the user wrote as ``params``, if it was not these.

    Raises:
        TypeError: If one is of the wrong type.
        ValueError: If one is wrong.
    """

    def __init__(
        self, model, grads, sparsity, *, params, pattern, scope, masks, criterion, backend, precision, named=None
    ) -> None:
        """Check; nothing is computed."""
        self.criterion = criterion
        if grads is None and criterion == "fisher":
            raise ValueError("grads: expected gradients for criterion='fisher', got None")
        params = names_of(params)
        named = params if named is None else named
        self.chosen = prunable_parameters(
            model, grads.names if params is None and isinstance(grads, GradientBuffer) else params
        )
        device = _check_parameters(self.chosen)
        self.selection = Selection(self.chosen, sparsity, scope, pattern, named or ())
        matrix = None if grads is None else _gradient_matrix(grads, self.chosen, device)
        self.active = None if masks is None else _flat_masks(masks, self.chosen, device)
        self.kernels = select_backend(backend, device)
        options = {"backend": backend, "precision": check_precision(precision), "device": device}
        # With a damping that always serves: the real one may depend on the gradients.
        self.fisher = None if matrix is None else Fisher(matrix, 1.0, **options)

    def weights(self) -> Tensor:
        """Return the weights as one float32 vector [d], zero where pruned before."""
        weights = torch.cat([p.detach().reshape(-1).float() for p in self.chosen.values()])
        return weights if self.active is None else weights.masked_fill_(~self.active, 0)

    def masks(self, kept: Tensor) -> dict[str, Tensor]:
        """Return a mask [d] as masks of the parameters' shapes."""
        parts = kept.split(list(self.selection.sizes.values()))
        return {name: part.view_as(p).clone() for (name, p), part in zip(self.chosen.items(), parts, strict=True)}

    def write(self, weights: Tensor, kept: Tensor, advice: str) -> None:
        """Copy weights [d] into the model, all or nothing.

        Args:
            weights: The new ones.
            kept: [d] bool.
            advice: End of the error message.

        Raises:
            RuntimeError: If a weight is not finite in its parameter's type, or weight norm would divide by zero; the
                model is unchanged.
        """
        # In the parameter's own type: a weight that did not move keeps all its digits, and float16 may overflow.
        parts = (x.split(list(self.selection.sizes.values())) for x in (weights, kept))
        new = []
        for p, a, k in zip(self.chosen.values(), *parts, strict=True):
            same = k.view_as(p) & (p.detach().float() == a.view_as(p))
            new.append(torch.where(same, p.detach(), a.view_as(p)).to(p.dtype))
        if not all(torch.isfinite(x).all() for x in new):
            raise RuntimeError(f"update: the result is not finite{advice}")
        for target, x in zip(self.chosen.targets.values(), new, strict=True):
            if target.divides_by_zero(x):
                raise RuntimeError(
                    f"update: expected weights whose norms are not zero, got {target.name!r} with a part pruned whole "
                    "that is divided by its norm; remove the weight norm, prune less, or leave it out with exclude="
                )
        for p, x in zip(self.chosen.values(), new, strict=True):
            p.detach().copy_(x)


def prune_problem(problem: Problem, method: Method, damping: float | str, block_size: int | str | None) -> PruneResult:
    """Make one step; see :func:`prune_step`.

    Args:
        problem: The model and what is to go.
        method: How.
        damping: λ, relative, or ``"auto"``.
        block_size: B, None or ``"auto"``.

    Returns:
        The result.
    """
    seconds: dict[str, float] = {}
    fisher, candidates, loss = problem.fisher, [], None
    with torch.no_grad(), timed(seconds, "total"):
        weights = problem.weights()
        if fisher is None:
            scores = saliencies(weights, None, problem.selection, problem.criterion)
            kept = problem.selection.select(scores, problem.active, 1, problem.kernels, weights)
        else:
            with timed(seconds, "settings"):
                fisher, candidates = choose_settings(
                    fisher, weights, problem.active, problem.selection, method, damping, block_size
                )
            kept, loss = prune_vector(weights, problem.active, fisher, problem.selection, method, seconds)
        problem.write(weights, kept, "" if fisher is None else f" with damping={fisher.damping:g}; raise the damping")
    masks = problem.masks(kept)
    return PruneResult(
        masks=masks,
        layers=[(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()],
        sparsity=1 - int(kept.sum()) / len(kept),
        predicted_loss_increase=loss,
        damping=None if fisher is None else fisher.damping,
        block_size=None if fisher is None else fisher.block_size,
        candidates=candidates,
        seconds=seconds,
        backend="compiled" if problem.kernels is compiled else "reference",
    )


def check_method(scope: str, update: str, criterion: str, substeps: int) -> Method:
    """Check how a step is to be made.

    Args:
        scope: One of SCOPES.
        update: One of UPDATES.
        criterion: One of CRITERIA.
        substeps: At least 1.

    Returns:
        The method.

    Raises:
        TypeError: If ``substeps`` is not an int.
        ValueError: If one is out of range.
    """
    for name, value, known in (
        ("scope", scope, SCOPES),
        ("update", update, UPDATES),
        ("criterion", criterion, CRITERIA),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if isinstance(substeps, bool) or not isinstance(substeps, int):
        raise TypeError(f"substeps: expected an int, got {substeps!r}")
    if substeps < 1:
        raise ValueError(f"substeps: expected >= 1, got {substeps}")
    return Method(update, criterion, substeps if criterion == "fisher" else 1)  # magnitudes say all at once


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
    if matrix.device not in (device, torch.device("cpu")):
        raise ValueError(f"grads: expected on {device} like the model, or on the CPU, got {matrix.device}")
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
