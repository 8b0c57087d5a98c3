"""The compiled ops, one thin function each; see :mod:`mfac.ops` for the shapes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mfac.ops.extension import Extension

_extension = Extension("_C", "mfac")
_FAKES, _fake = _extension.fakes, _extension.fake
load = functools.cache(_extension.load)


def block_factor(grads: Tensor, damping: float, block_size: int, active: Tensor | None = None) -> Tensor:
    """Cholesky factor of every block: of mλ I + G Gᵀ where m < columns in use, else of mλ I + GᵀG.

    Returns:
        [ceil(d/B), s, s] float64 with s = min(m, B, d), each lower triangular and padded with zeros.
    """
    return torch.ops.mfac.block_factor(grads, damping, block_size, active)


@_fake
def _fake_block_factor(grads, damping, block_size, active=None):
    m, d = grads.shape
    s = min(m, block_size, d)
    return grads.new_empty((-(-d // block_size), s, s), dtype=torch.float64)


def inverse_diagonal(
    grads: Tensor, damping: float, block_size: int, active: Tensor | None = None, precision: str = "highest"
) -> Tensor:
    """Diagonal of F⁻¹: (1 - ‖L⁻¹ g_i‖²) / λ with g_i column i of G, or m ‖L⁻¹ e_i‖²; 2 m min(m, B) flops per weight.

    Returns:
        [d] float32, within 1/F_ii and 1/λ, hence positive.
    """
    return torch.ops.mfac.inverse_diagonal(grads, damping, block_size, active, precision)


@_fake
def _fake_inverse_diagonal(grads, damping, block_size, active=None, precision="highest"):
    return grads.new_empty(grads.shape[1], dtype=torch.float32)


def inverse_product(
    grads: Tensor, factor: Tensor, x: Tensor, damping: float, block_size: int, active: Tensor | None = None
) -> Tensor:
    """F⁻¹ x = (x - Gᵀ (mλ I + G Gᵀ)⁻¹ G x) / λ, for x [d] or [k, d] float32 and ``factor`` from :func:`block_factor`.

    Returns:
        float32, shaped like x.
    """
    return torch.ops.mfac.inverse_product(grads, factor, x, damping, block_size, active)


@_fake
def _fake_inverse_product(grads, factor, x, damping, block_size, active=None):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def joint_update(
    grads: Tensor, weights: Tensor, kept: Tensor, damping: float, block_size: int, precision: str = "highest"
) -> Tensor:
    """Prune in place all weights that are not kept, moving the kept ones to the minimum of ½ δᵀFδ.

    w_S += G_Sᵀ (mλ I + G_S G_Sᵀ)⁻¹ G_Q w_Q and w_Q = 0, with S the kept and Q the pruned weights of a block.
    ``weights`` [d] float32 is the only tensor written.

    Returns:
        ½ δᵀFδ, the predicted loss increase, a float64 scalar.
    """
    return torch.ops.mfac.joint_update(grads, weights, kept, damping, block_size, precision)


@_fake
def _fake_joint_update(grads, weights, kept, damping, block_size, precision="highest"):
    return grads.new_empty((), dtype=torch.float64)


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
    """:func:`joint_update`, and :func:`inverse_diagonal` with ``kept`` as the active columns, from one factor.

    ``gram`` [ceil(d/B), 2 + n] float64 and ``held`` [d] bool, both or none, carry small matrices of up to n elements
    from one call of this op or of :func:`group_saliency` to the next, for the same gradients, damping, block size and
    precision: that of fewer columns is part of that of more, mλ I + GᵀG, or what is left of it without the others,
    mλ I + G Gᵀ. They start with ``gram[:, 0] = 0`` and ``held`` False, and change no result by more than rounding.
    ``weights``, ``gram`` and ``held`` are the only tensors written.

    Returns:
        ½ δᵀFδ, a float64 scalar, and diag(F⁻¹) [d] float32, [0] without ``diagonal``.
    """
    return torch.ops.mfac.joint_step(grads, weights, kept, damping, block_size, precision, gram, held, diagonal)


@_fake
def _fake_joint_step(
    grads, weights, kept, damping, block_size, precision="highest", gram=None, held=None, diagonal=True
):
    size = grads.shape[1] if diagonal else 0
    return grads.new_empty((), dtype=torch.float64), grads.new_empty(size, dtype=torch.float32)


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
    """Prune in place by the sum of single-weight updates (M-FAC, equation 4).

    w -= F⁻¹ u with u_i = w_i / [F⁻¹]_ii where not kept, then zero there. ``weights`` [d] float32 is the only tensor
    written; ``inverse_diagonal`` [d] float32 comes from :func:`inverse_diagonal`.
    """
    torch.ops.mfac.independent_update(grads, weights, kept, inverse_diagonal, damping, block_size, active, precision)


@_fake
def _fake_independent_update(
    grads, weights, kept, inverse_diagonal, damping, block_size, active=None, precision="highest"
):
    return None


def quadratic_form(grads: Tensor, x: Tensor, damping: float, block_size: int) -> Tensor:
    """½ xᵀFx = ½ (λ ‖x‖² + Σ_blocks ‖G x‖² / m) for a step x [d] float32.

    Returns:
        A float64 scalar.
    """
    return torch.ops.mfac.quadratic_form(grads, x, damping, block_size)


@_fake
def _fake_quadratic_form(grads, x, damping, block_size):
    return grads.new_empty((), dtype=torch.float64)


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
    """½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q, what it costs to prune the weights Q together, for k subsets Q of each of n groups.

    ``weights`` [d] float32; ``groups`` [n, P] int64, positions in [0, d) or -1 for none; ``subsets`` [k, s] int64,
    places in [0, P). Members of a group that lie in different blocks do not interact. 2 m min(m, B) flops per weight
    and s³/6 per subset; half of them where ``gram`` and ``held``, the only tensors written, hold the small matrices
    (:func:`joint_step`).

    Returns:
        [n, k] float32.
    """
    return torch.ops.mfac.group_saliency(
        grads, weights, groups, subsets, damping, block_size, active, precision, gram, held
    )


@_fake
def _fake_group_saliency(
    grads, weights, groups, subsets, damping, block_size, active=None, precision="highest", gram=None, held=None
):
    return grads.new_empty((groups.shape[0], subsets.shape[0]), dtype=torch.float32)


def select_smallest(
    scores: Tensor, k: int | list[int], sizes: list[int] | None = None, weights: Tensor | None = None
) -> Tensor:
    """Mask of the k smallest of n float32 scores, exact, ties to the lower index.

    With ``sizes``, of segments that follow each other and sum to n, the ``k[i]`` smallest of each. ``weights`` [n]
    float32, if given, is the only tensor written: it becomes zero where pruned, in the pass that writes the mask.

    Returns:
        [n] bool, False for the k smallest.

    Raises:
        TypeError: If scores or weights are not float32.
        ValueError: If there is a NaN, k is not in [0, n], or shapes and sizes do not fit; nothing is written then.
    """
    return torch.ops.mfac.select_smallest(scores, k, sizes, weights)


@_fake
def _fake_select_smallest(scores, k, sizes=None, weights=None):
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
