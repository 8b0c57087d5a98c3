"""The ops in plain PyTorch, as readable as the formulas.

Every function here has the signature of its namesake in :mod:`mfac.ops.compiled` and computes in float64, block by
block, whatever the precision asked for. The compiled kernels are tested against these functions, which replace them
where they cannot be built.

Symbols: G [m, d] gradients, λ ``damping``, B ``block_size``, F = λ I + (1/m) Gᵀ G block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mfac.checks import check_instance


def block_slices(d: int, block_size: int) -> Iterator[slice]:
    """Return the columns of each block of F."""
    return (slice(start, min(start + block_size, d)) for start in range(0, d, block_size))


def _capacitance_side(g: Tensor) -> bool:
    """Whether there are fewer gradients than columns; with as many, 1 - ‖L⁻¹g‖² would cancel in every column."""
    return g.shape[0] < g.shape[1]


def _factor(g: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of mλ I + G Gᵀ (m < columns) or of mλ I + GᵀG, for one block."""
    m = g.shape[0]
    gram = g @ g.T if _capacitance_side(g) else g.T @ g
    gram.diagonal().add_(m * damping)
    jitter = 0.0
    for _ in range(10):
        factor, info = torch.linalg.cholesky_ex(gram + jitter * torch.eye(len(gram), dtype=g.dtype, device=g.device))
        if not info and factor.diagonal().isfinite().all():
            return factor
        # Rounding made it indefinite: add a jitter of the size of the rounding error.
        jitter = max(10 * jitter, torch.finfo(gram.dtype).eps * float(gram.trace()))
    raise RuntimeError("grads: expected finite numbers, got a block that has no Cholesky factor")


def _inverse_times(g: Tensor, factor: Tensor, x: Tensor, damping: float) -> Tensor:
    """F⁻¹ x for the columns of x, one block."""
    if _capacitance_side(g):
        return (x - g.T @ torch.cholesky_solve(g @ x, factor)) / damping
    return torch.cholesky_solve(x, factor) * g.shape[0]


def _used(grads: Tensor, block: slice, active: Tensor | None) -> tuple[Tensor, Tensor]:
    """The block's columns in use, in float64, and their positions in [0, d)."""
    columns = torch.arange(block.start, block.stop, device=grads.device)
    if active is not None:
        columns = columns[active[block]]
    return grads[:, columns].double(), columns


def block_factor(grads: Tensor, damping: float, block_size: int, active: Tensor | None = None) -> Tensor:
    """Cholesky factors of all blocks; see :func:`mfac.ops.compiled.block_factor`."""
    m, d = grads.shape
    s = min(m, block_size, d)
    blocks = list(block_slices(d, block_size))
    out = torch.zeros(len(blocks), s, s, dtype=torch.float64, device=grads.device)
    for factor, block in zip(out, blocks, strict=True):
        g, columns = _used(grads, block, active)
        n = min(m, len(columns))
        factor[:n, :n] = _factor(g, damping)
    return out


def inverse_diagonal(
    grads: Tensor, damping: float, block_size: int, active: Tensor | None = None, precision: str = "highest"
) -> Tensor:
    """Diagonal of F⁻¹; see :func:`mfac.ops.compiled.inverse_diagonal`."""
    m, d = grads.shape
    out = torch.full((d,), 1 / damping, dtype=torch.float64, device=grads.device)
    for block in block_slices(d, block_size):
        g, columns = _used(grads, block, active)
        factor = _factor(g, damping)
        if _capacitance_side(g):
            value = (1 - torch.linalg.solve_triangular(factor, g, upper=False).square().sum(0)) / damping
            # Whatever the rounding, 1/F_ii <= [F⁻¹]_ii.
            out[columns] = torch.maximum(value, 1 / (damping + g.square().sum(0) / m))
        else:
            eye = torch.eye(len(columns), dtype=g.dtype, device=g.device)
            out[columns] = m * torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(0)
    limits = torch.finfo(torch.float32)
    return out.clamp(limits.tiny, limits.max).float()


def inverse_product(
    grads: Tensor, factor: Tensor, x: Tensor, damping: float, block_size: int, active: Tensor | None = None
) -> Tensor:
    """F⁻¹ x; see :func:`mfac.ops.compiled.inverse_product`."""
    d = grads.shape[1]
    vectors = x.double().reshape(x.numel() // d, d).T
    out = vectors / damping
    for l, block in zip(factor, block_slices(d, block_size), strict=True):
        g, columns = _used(grads, block, active)
        n = min(g.shape)
        out[columns] = _inverse_times(g, l[:n, :n], vectors[columns], damping)
    return out.T.reshape(x.shape).float()


def joint_update(
    grads: Tensor, weights: Tensor, kept: Tensor, damping: float, block_size: int, precision: str = "highest"
) -> Tensor:
    """Exact update for pruning all weights that are not kept; see :func:`mfac.ops.compiled.joint_update`."""
    m, d = grads.shape
    loss = torch.zeros((), dtype=torch.float64, device=grads.device)
    for block in block_slices(d, block_size):
        g, _ = _used(grads, block, None)
        keep = kept[block]
        removed = weights[block].double()[~keep]
        if not removed.any():
            weights[block].masked_fill_(~keep, 0)
            continue
        survivors, r = g[:, keep], g[:, ~keep] @ removed
        factor = _factor(survivors, damping)
        if _capacitance_side(survivors):
            step = survivors.T @ torch.cholesky_solve(r[:, None], factor)[:, 0]
        else:
            step = torch.cholesky_solve((survivors.T @ r)[:, None], factor)[:, 0]
        moved = survivors @ step - r
        loss += 0.5 * (damping * (removed.square().sum() + step.square().sum()) + moved.square().sum() / m)
        new = torch.zeros(len(keep), dtype=torch.float64, device=grads.device)
        new[keep] = weights[block].double()[keep] + step
        weights[block] = new.to(weights.dtype)
    return loss


def joint_step(
    grads: Tensor,
    weights: Tensor,
    kept: Tensor,
    damping: float,
    block_size: int,
    precision: str = "highest",
    gram: Tensor | None = None,
    held: Tensor | None = None,
    diagonal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Update, then the diagonal; see :func:`mfac.ops.compiled.joint_step`. Keeps nothing in ``gram``."""
    loss = joint_update(grads, weights, kept, damping, block_size)
    return loss, inverse_diagonal(grads, damping, block_size, kept) if diagonal else weights.new_empty(0)


def independent_update(
    grads: Tensor,
    weights: Tensor,
    kept: Tensor,
    inverse_diagonal: Tensor,
    damping: float,
    block_size: int,
    active: Tensor | None = None,
    precision: str = "highest",
) -> None:
    """Sum of single-weight updates, as published; see :func:`mfac.ops.compiled.independent_update`."""
    u = torch.where(kept, 0, weights.double() / inverse_diagonal.double())
    factor = block_factor(grads, damping, block_size, active)
    step = inverse_product(grads, factor, u, damping, block_size, active)
    weights.copy_(torch.where(kept, weights - step, 0))


def quadratic_form(grads: Tensor, x: Tensor, damping: float, block_size: int) -> Tensor:
    """½ xᵀFx; see :func:`mfac.ops.compiled.quadratic_form`."""
    m, d = grads.shape
    total = damping * x.double().square().sum()
    for block in block_slices(d, block_size):
        total = total + (grads[:, block].double() @ x[block].double()).square().sum() / m
    return 0.5 * total


def check_groups(groups: Tensor, subsets: Tensor, d: int, device: torch.device) -> None:
    """The checks of csrc/checks.h."""
    for x, name, low, end in ((groups, "groups", -1, d), (subsets, "subsets", 0, None)):
        check_instance(name, x, Tensor, "a tensor")
        if x.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {list(x.shape)}")
        if x.dtype != torch.long:
            raise TypeError(f"{name}: expected int64, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected on {device} like grads, got {x.device}")
        end = groups.shape[1] if end is None else end
        if x.numel() and not (low <= x.min() and x.max() < end):
            raise ValueError(f"{name}: expected numbers in [{low}, {end}), got {int(x.min())} to {int(x.max())}")


def group_saliency(
    grads: Tensor,
    weights: Tensor,
    groups: Tensor,
    subsets: Tensor,
    damping: float,
    block_size: int,
    active: Tensor | None = None,
    precision: str = "highest",
    gram: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """Saliency of weights that go together; see :func:`mfac.ops.compiled.group_saliency`. Keeps nothing in ``gram``."""
    m, d = grads.shape
    check_groups(groups, subsets, d, grads.device)
    out = torch.zeros(len(groups), len(subsets), dtype=torch.float64, device=grads.device)
    size, blocks = groups.shape[1], torch.where(groups < 0, -1, groups // block_size).flatten()
    blocks, order = torch.sort(blocks, stable=True)  # the members of the groups, by block
    bounds = torch.searchsorted(blocks, torch.arange(-(-d // block_size) + 1, device=grads.device)).tolist()
    for block in block_slices(d, block_size):
        g, columns = _used(grads, block, active)
        here = order[bounds[block.start // block_size] : bounds[block.start // block_size + 1]]
        where = torch.unique(here // size)
        if len(where) == 0 or len(columns) == 0:
            continue
        place = torch.full((block.stop - block.start + 1,), -1, device=grads.device)  # of a column among those in use
        place[columns - block.start] = torch.arange(len(columns), device=grads.device)
        local = groups[where] - block.start
        local = place[torch.where((local >= 0) & (local < len(place) - 1) & (groups[where] >= 0), local, -1)]
        factor = _factor(g, damping)
        side = g if _capacitance_side(g) else torch.eye(len(columns), dtype=g.dtype, device=g.device)
        z = torch.linalg.solve_triangular(factor, side, upper=False).T
        for k, subset in enumerate(subsets):
            positions = local[:, subset]
            inside = positions >= 0
            part = z[positions] * inside[..., None]
            inverse = part @ part.mT
            eye = torch.eye(len(subset), dtype=g.dtype, device=g.device)
            inverse = (eye - inverse) / damping if _capacitance_side(g) else m * inverse + eye * ~inside[..., None]
            w = torch.where(inside, weights.double()[groups[where][:, subset]], 0)
            scores = (w * torch.linalg.solve(inverse, w)).sum(1)
            out[where, k] += 0.5 * scores
    return out.float()


def select_smallest(
    scores: Tensor, k: int | list[int], sizes: list[int] | None = None, weights: Tensor | None = None
) -> Tensor:
    """Mask of the k smallest scores; see :func:`mfac.ops.compiled.select_smallest`."""
    sizes = [len(scores)] if sizes is None else sizes
    k = [k] if isinstance(k, int) else k
    if len(k) != len(sizes):
        raise ValueError(f"k: expected one number for each of the {len(sizes)} segments, got {k}")
    if min(sizes, default=0) < 0 or sum(sizes) != len(scores):
        raise ValueError(f"sizes: expected numbers >= 0 that sum to {len(scores)}, got {sizes}")
    for count, size in zip(k, sizes, strict=True):
        if not 0 <= count <= size:
            raise ValueError(f"k: expected 0 to {size}, got {count}")
    if weights is not None and weights.shape != scores.shape:
        raise ValueError(f"weights: expected shape {list(scores.shape)}, got {list(weights.shape)}")
    if weights is not None and weights.dtype != torch.float32:
        raise TypeError(f"weights: expected float32, got {weights.dtype}")
    if scores.isnan().any():
        raise ValueError(f"scores: expected no NaN, got one at index {int(scores.isnan().nonzero()[0])}")
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    for segment, part, count in zip(scores.split(sizes), kept.split(sizes), k, strict=True):
        part[torch.sort(segment + 0.0, stable=True).indices[:count]] = False
    if weights is not None:
        weights.masked_fill_(~kept, 0)
    return kept
