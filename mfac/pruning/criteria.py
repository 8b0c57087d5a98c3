"""Criteria: what scores the weights, or groups of weights, that are candidates for pruning.

A new criterion is a class here and a line in ``CRITERIA``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mfac.fisher import Fisher


class Criterion(Protocol):
    """A score of weights; the lowest are pruned.

    Attributes:
        needs_gradients: Whether there must be a Fisher.
        needs_diagonal: Whether single weights are scored with diag(F⁻¹).
        num_substeps: Sub-steps of a step for which the user asks for ``n``; 1 where scores do not change between them.
    """

    needs_gradients: bool
    needs_diagonal: bool

    def num_substeps(self, n: int) -> int:
        """Return how many sub-steps of n are worth making."""

    def score_weights(self, weights: Tensor, diagonal: Tensor | None) -> Tensor:
        """Return the scores [d] float32, a new tensor, of weights [d] with diag(F⁻¹) [d]."""

    def score_groups(self, weights: Tensor, fisher: Fisher | None, groups: Tensor, subsets: Tensor) -> Tensor:
        """Return the scores [n, k] float32 of k subsets of each of n groups (see :meth:`Fisher.group_saliency`)."""


class FisherSaliency:
    """The increase of the loss under the quadratic model: w²/(2 [F⁻¹]_ii), and ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q for groups.

    Optimal Brain Surgeon (Hassibi, Stork, 1993) with an empirical Fisher (M-FAC, NeurIPS 2021, equation 3).
    """

    needs_gradients = True
    needs_diagonal = True

    def num_substeps(self, n: int) -> int:
        """All: each choice depends on those made before."""
        return n

    def score_weights(self, weights: Tensor, diagonal: Tensor | None) -> Tensor:
        """Score single weights."""
        return weights.square().div_(diagonal).mul_(0.5)

    def score_groups(self, weights: Tensor, fisher: Fisher | None, groups: Tensor, subsets: Tensor) -> Tensor:
        """Score groups."""
        return fisher.group_saliency(weights, groups, subsets)


class Magnitude:
    """The absolute value of a weight, and the sum of squares of a group: the saliency for F = I."""

    needs_gradients = False
    needs_diagonal = False

    def num_substeps(self, n: int) -> int:
        """One: magnitudes do not change between sub-steps."""
        return 1

    def score_weights(self, weights: Tensor, diagonal: Tensor | None) -> Tensor:
        """Score single weights."""
        return weights.abs()

    def score_groups(self, weights: Tensor, fisher: Fisher | None, groups: Tensor, subsets: Tensor) -> Tensor:
        """Score groups."""
        squares = weights.square()[groups]
        return torch.stack([squares[:, subset].sum(1) for subset in subsets], 1)


CRITERIA: dict[str, Criterion] = {"fisher": FisherSaliency(), "magnitude": Magnitude()}
