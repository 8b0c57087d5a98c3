"""The compressed form of a sparse matrix: slices of four rows.

W [N, K] is cut into slices of 4 rows. A slice holds its entries step by step, in each step one entry of each row, so
that a kernel computes four rows with one loop. In ``"rows"`` every entry has its own column, and the rows are sorted by
their numbers of entries within windows of 128, so that the rows of a slice have like numbers; a shorter row is filled
with zeros at column K: 6 bytes per weight in float32. In ``"blocks"`` (4 rows by 1 column, as ``pattern=[4, 1]`` leaves
them) the rows keep their order, and the four entries of a step share one column: 4.5 bytes per weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfac.checks import check_choice, check_instance

SLICE_ROWS = 4  # csrc/sparse/kernels.h
WINDOW_ROWS = 128  # csrc/sparse/kernels.h: a permutation of rows stays within windows of so many
MAX_INPUTS = torch.iinfo(torch.int16).max - 1  # columns are int16, and K itself is the column of no weight
FORMATS = ("rows", "blocks")
PARTS = ("values", "columns", "pointers", "order")  # of a SlicedMatrix
CONVERTED = "mfac.sparse"  # key under which a file describes the layers of a converted model


@dataclass(frozen=True)
class SlicedMatrix:
    """A sparse matrix W [N, K] in slices of four rows.

    Args:
        values: [steps, 4], one entry of each row of a slice per step; 0 where a row has no more.
        columns: int16, their columns in [0, K], K where there is no weight: [steps, 4], or [steps] for blocks, whose
            rows share the column.
        pointers: [ceil(N/4) + 1] int32, the first step of each slice.
        order: [4 ceil(N/4)] int32, the row of W of each row of a slice, -1 for none.

    Example:
        >>> import torch
        >>> from mfac.sparse.formats import slice_matrix
        >>> w = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
        >>> sliced = slice_matrix(w, "rows")
        >>> sliced.columns.tolist()  # the two rows that are missing have the column of no weight
        [[1, 2, 3, 3]]
        >>> torch.equal(sliced.to_dense(2, 3), w)
        True
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor
    order: Tensor

    @property
    def format(self) -> str:
        """``"blocks"`` if four rows share each column, else ``"rows"``."""
        return "blocks" if self.columns.dim() == 1 else "rows"

    @property
    def nbytes(self) -> int:
        """The memory that the matrix takes."""
        return sum(getattr(self, part).nbytes for part in PARTS)

    def to_dense(self, rows: int, inputs: int) -> Tensor:
        """Return W.

        Args:
            rows: N.
            inputs: K.

        Returns:
            [N, K], of the type of the values.
        """
        return dense_matrix(self.values, self.columns, self.pointers, self.order, rows, inputs)


def slice_matrix(weight: Tensor, layout: str) -> SlicedMatrix:
    """Compress a matrix.

    Args:
        weight: W [N, K] float32 or bfloat16, its zeros being left out; K <= 32766.
        layout: ``"rows"``, or ``"blocks"`` of four rows, in which a block is left out if all four are zero.

    Returns:
        The same matrix in slices, contiguous and without gradient.

    Raises:
        TypeError: If `weight` is not a tensor of one of these types.
        ValueError: If it is not a matrix, has too many columns, or the layout is another.
    """
    check_choice("layout", layout, FORMATS)
    check_instance("weight", weight, Tensor, "a tensor")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weight: expected float32 or bfloat16, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] > MAX_INPUTS:
        raise ValueError(f"weight: expected shape [N, K] with K <= {MAX_INPUTS}, got {list(weight.shape)}")
    (n, k), w = weight.shape, weight.detach()
    by_slice = _by_slice(w)
    slices, padded = len(by_slice), by_slice.flatten(0, 1)
    order = torch.arange(len(padded))
    if layout == "blocks":
        used = (by_slice != 0).any(1)
        lengths = used.sum(1)
        where, columns = torch.nonzero(used, as_tuple=True)
        values = by_slice[where, :, columns]
    else:
        counts = (padded != 0).sum(1)
        windows = [torch.sort(part, descending=True, stable=True).indices for part in counts.split(WINDOW_ROWS)]
        order = torch.cat([part + WINDOW_ROWS * i for i, part in enumerate(windows)]) if windows else order
        padded, counts = padded[order], counts[order]
        lengths = counts.view(slices, SLICE_ROWS).amax(1) if slices else counts
        values = w.new_zeros(int(lengths.sum()), SLICE_ROWS)
        columns = torch.full(values.shape, k)
        row, column = torch.nonzero(padded, as_tuple=True)
        rank = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        step = (lengths.cumsum(0) - lengths)[row // SLICE_ROWS] + rank
        values[step, row % SLICE_ROWS] = padded[row, column]
        columns[step, row % SLICE_ROWS] = column
    pointers = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    order = torch.where(order < n, order, -1)
    return SlicedMatrix(values.contiguous(), columns.to(torch.int16), pointers.int(), order.int())


def read_description(metadata: Mapping[str, str], name: str, path: Path) -> Any:
    """Return what a safetensors file says of the layers of a converted model.

    Args:
        metadata: The strings that the file holds beside its tensors.
        name: Of the argument that names the file, for the error.
        path: The file, for the error.

    Returns:
        The value; None if the file says nothing.

    Raises:
        ValueError: If it is no JSON.
    """
    try:
        return json.loads(metadata.get(CONVERTED, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON as {CONVERTED} in {path}, got {error}") from error


def has_all_rows(order: Tensor, rows: int) -> bool:
    """Return whether the order of a :class:`SlicedMatrix` names each of so many rows once."""
    return torch.equal(order[order >= 0].long().sort().values, torch.arange(rows, device=order.device))


def count_blocks(weight: Tensor) -> int:
    """Return the number of blocks of four rows by one column of a matrix [N, K] that are not all zero."""
    return int((_by_slice(weight) != 0).any(1).sum())


def _by_slice(w: Tensor) -> Tensor:
    """Return w [N, K] as [slices, 4, K], with rows of zeros at the end."""
    n, k = w.shape
    slices = -(-n // SLICE_ROWS)
    padded = w.new_zeros(slices * SLICE_ROWS, k)
    padded[:n] = w
    return padded.unflatten(0, (slices, SLICE_ROWS))


def dense_matrix(values: Tensor, columns: Tensor, pointers: Tensor, order: Tensor, rows: int, inputs: int) -> Tensor:
    """Return the matrix that the tensors of a :class:`SlicedMatrix` hold.

    Args:
        values: [steps, 4].
        columns: [steps, 4] or [steps], int16.
        pointers: [slices + 1] int32.
        order: [4 slices] int32.
        rows: N.
        inputs: K.

    Returns:
        [N, K], of the type of the values.
    """
    lengths = pointers.diff().long()
    starts = torch.arange(len(lengths), device=values.device) * SLICE_ROWS
    first = torch.repeat_interleave(starts, lengths, output_size=len(values))  # the size is known: torch.export asks
    places = first[:, None] + torch.arange(SLICE_ROWS, device=values.device)
    row = order.long()[places]
    column = columns.long() if columns.dim() == 2 else columns.long()[:, None].expand(-1, SLICE_ROWS)
    dense = values.new_zeros(rows + 1, inputs + 1)  # with a row and a column for what is no weight
    dense[row, column] = values  # row -1 is the last one
    return dense[:rows, :inputs]
