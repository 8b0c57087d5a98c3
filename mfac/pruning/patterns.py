"""Patterns: which weights are pruned together."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfac.checks import as_number
from mfac.model.layers import Axes

_MAX_SUBSETS = 5000
_MAX_GROUP_SIZE = 1024  # P² elements of F⁻¹ are formed


@dataclass(frozen=True)
class Pattern:
    """How the weights of a layer group.

    A group is a rectangle of ``rows`` output by ``cols`` input channels, at one position of the kernel for a
    convolution. Of each group that is pruned, ``pruned`` weights go: all of a block, M - N of an N:M group. Weights
    that do not fill a group stay dense.

    Attributes:
        name: What the user wrote.
        rows: Output channels of a group.
        cols: Input channels of a group.
        pruned: Weights of a group that go.
    """

    name: str
    rows: int = 1
    cols: int = 1
    pruned: int = 1

    @property
    def size(self) -> int:
        """P, weights of a group."""
        return self.rows * self.cols

    @property
    def max_sparsity(self) -> float:
        """The largest sparsity of whole groups."""
        return self.pruned / self.size

    def allows(self, sparsity: float) -> bool:
        """Return whether a sparsity is within ``max_sparsity``, up to rounding."""
        return sparsity <= self.max_sparsity + 1e-9

    @property
    def substeps_per_halving(self) -> int:
        """Sub-steps of ``"auto"`` for each halving of the weights: the more go together, the more choices interact."""
        if self.size == 1:
            return 2
        return 8 if self.pruned == self.size else 4

    @property
    def num_subsets(self) -> int:
        """k, the number of subsets of a group that may be pruned."""
        return math.comb(self.size, self.pruned)

    def subsets(self) -> Tensor:
        """Return the subsets of a group that may be pruned, [k, pruned] int64, places in [0, P)."""
        return torch.tensor(list(itertools.combinations(range(self.size), self.pruned)))

    def groups(self, shape: Sequence[int], axes: Axes | None) -> Tensor:
        """Return the positions of the weights of every whole group in the flattened weight.

        No group holds weights of two groups of channels (``axes.groups``).

        Args:
            shape: Of the weight.
            axes: Which of its axes are outputs and inputs; None if unknown, which only single weights do without.

        Returns:
            [n, P] int64, outputs before kernel positions, the weights of a group in the order of outputs, then inputs;
            n = 0 if none fits.
        """
        index = torch.arange(math.prod(shape))
        if self.size == 1:
            return index[:, None]
        if axes is None or len(shape) <= max(axes.outputs, axes.inputs):
            return torch.empty(0, self.size, dtype=torch.long)
        split = index.view(*shape).unflatten(0, (axes.groups, -1))
        ordered = split.movedim((axes.outputs + 1, axes.inputs + 1), (1, 2))
        groups, outputs, inputs, *kernel = ordered.shape
        ordered = ordered.reshape(groups, outputs, inputs, math.prod(kernel))
        down, across = outputs // self.rows, inputs // self.cols
        whole = ordered[:, : down * self.rows, : across * self.cols]
        tiles = whole.reshape(groups, down, self.rows, across, self.cols, math.prod(kernel))
        return tiles.permute(0, 1, 3, 5, 2, 4).reshape(-1, self.size)


# Patterns that have a name; N:M and [rows, cols] are understood by parse_pattern.
PATTERNS = {pattern.name: pattern for pattern in (Pattern("unstructured"), Pattern("block4", 1, 4, 4))}


def parse_pattern(pattern: str | Sequence[int]) -> Pattern:
    """Understand what the user wrote.

    Args:
        pattern: ``"unstructured"``; ``"N:M"``: of M neighbouring input channels N weights are kept; ``"block4"``:
            blocks of 4 neighbouring input channels; or ``[rows, cols]``: blocks of output by input channels.

    Returns:
        The pattern.

    Raises:
        TypeError: If it is neither a string nor two integers.
        ValueError: If it is another word, N is not below M, or a group has too many weights or subsets.

    Example:
        >>> parse_pattern("2:4").subsets().tolist()
        [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
        >>> parse_pattern([2, 2]).groups((4, 2), Axes(outputs=0, inputs=1)).tolist()
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    known = f"expected {', '.join(map(repr, PATTERNS))}, 'N:M' such as '2:4', or [rows, cols]"
    if isinstance(pattern, str):
        if pattern in PATTERNS:
            return PATTERNS[pattern]
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pattern)
        if not match:
            raise ValueError(f"pattern: {known}, got {pattern!r}")
        keep, size = map(int, match.groups())
        if not 1 <= keep < size:
            raise ValueError(f"pattern: expected N:M with 1 <= N < M (N kept of M), got {pattern!r}")
        if size > _MAX_GROUP_SIZE:
            raise ValueError(f"pattern: expected N:M with M <= {_MAX_GROUP_SIZE}, got {pattern!r}")
        if math.comb(size, keep) > _MAX_SUBSETS:
            raise ValueError(
                f"pattern: expected N:M with at most {_MAX_SUBSETS} subsets of a group, all of which are scored, got "
                f"{pattern!r} with {math.comb(size, keep)}"
            )
        return Pattern(f"{keep}:{size}", 1, size, size - keep)
    if not isinstance(pattern, Sequence) or len(pattern) != 2:
        raise TypeError(f"pattern: {known}, got {pattern!r}")
    rows, cols = map(as_number, pattern)
    if not (isinstance(rows, int) and isinstance(cols, int)):
        raise TypeError(f"pattern: {known}, got {pattern!r}")
    if rows < 1 or cols < 1:
        raise ValueError(f"pattern: expected [rows, cols] >= 1, got {list(pattern)}")
    if rows * cols > _MAX_GROUP_SIZE:
        raise ValueError(f"pattern: expected blocks of at most {_MAX_GROUP_SIZE} weights, got {list(pattern)}")
    return Pattern(f"[{rows}, {cols}]", rows, cols, rows * cols)
