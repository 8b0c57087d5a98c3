"""Gradients of which each process keeps some columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mfac.distributed.replicas import Replicas, shard_edges
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.rows import row_norm
from mfac.interrupts import write_whole

_STORED, _SKIPPED, _IDLE = 1.0, 0.0, -1.0  # what a rank did in a round


class ShardedBuffer(GradientBuffer):
    """A :class:`GradientBuffer` whose columns are spread over the ranks of a process group.

    Each rank computes gradients of its own batches, whole rows; one exchange per round turns rows by rank into columns
    by rank. Rank r keeps all m rows of the columns from ``edges[r]`` to ``edges[r + 1]``: m d / W numbers, where each
    round sends (d - d_r) numbers from each rank. The rows are in the order of the rounds and, in each, of the ranks.

    Of a model that is sharded itself (``fully_shard``) a row is the gradient of the mean loss of all ranks' batches:
    each rank gathers it and keeps its columns.

    Methods are collective: all ranks call them in the same order. :func:`mfac.collect_gradients` fills it.

    Args:
        num_grads: m, rows of all ranks together.
        params: As for GradientBuffer; the same on all ranks.
        replicas: The ranks.
        unit: Inner edges are multiples of it: of the block size of a Fisher.
        dtype: As for GradientBuffer.
        device: As for GradientBuffer.

    Attributes:
        replicas: The ranks.
        edges: [W + 1], the first column of each rank, and d.
        unit: See above.
    """

    def __init__(
        self,
        num_grads: int,
        params: Mapping[str, Tensor],
        replicas: Replicas,
        unit: int,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate this rank's columns."""
        self.replicas, self.unit = replicas, unit
        self.edges: list[int] = []
        replicas.together(lambda: super(ShardedBuffer, self).__init__(num_grads, params, dtype, device))
        # Rows come where the parameters are, on every rank, wherever they are kept.
        self._like = torch.empty(0, dtype=self.dtype, device=next(iter(params.values())).device)

    def _width(self) -> int:
        self.edges = shard_edges(sum(self._sizes), self.unit, self.replicas.size)
        return self.edges[self.replicas.rank + 1] - self.edges[self.replicas.rank]

    def append_gradients(self, grads: Sequence[Tensor | None], scale: Any = 1.0) -> bool:
        """Refuse: a gradient that is given to one rank has no place here.

        Args:
            grads: Not used.
            scale: Not used.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "buffer: expected a GradientBuffer of one process, got one that is spread over ranks, which only "
            "collect_gradients fills"
        )

    def append_round(
        self,
        compute: Callable[[], tuple[Sequence[Tensor | None], float, float]],
        wanted: int,
        skip: Callable[[], Any] = lambda: None,
    ) -> list[tuple[float, float]]:
        """Append the gradient of one batch of each rank; see :meth:`GradientBuffer.append_round`.

        Args:
            compute: Returns the gradient of this rank, and two numbers that come with it.
            wanted: At most so many rows: the first ranks' gradients are computed.
            skip: Called on the other ranks.

        Returns:
            The two numbers of each row that was stored.
        """
        row: Tensor | None = None
        together = self.replicas.lockstep

        def gradient() -> tuple[float, ...]:
            nonlocal row
            if self.replicas.rank >= wanted and not together:
                skip()
                return _IDLE, 0.0, 0.0, 0.0
            grads, *numbers = compute()
            parts = self._checked(grads)
            if parts is None:
                return _SKIPPED, 0.0, *numbers
            sized = zip(parts, self._sizes, strict=True)
            row = torch.cat([self._like.new_zeros(n) if part is None else part.reshape(-1) for part, n in sized])
            return _STORED, float(row_norm(row)), *numbers

        found = self.replicas.together(gradient, 4)
        self.skipped += sum(state == _SKIPPED for state, *_ in (found[:1] if together else found))
        senders = [rank for rank, (state, *_) in enumerate(found) if state == _STORED]
        if not senders:
            return []
        if together:
            own = row[None, self.edges[self.replicas.rank] : self.edges[self.replicas.rank + 1]]
            self._store_rows(own, [found[0][1]])
            return [tuple(sum(column) / len(found) for column in list(zip(*found, strict=True))[2:])]
        rows = self.replicas.exchange_rows(row, senders, self.edges, self._like)
        self._store_rows(rows, [found[rank][1] for rank in senders])
        return [tuple(found[rank][2:]) for rank in senders]

    def _store_rows(self, rows: Tensor, norms: Sequence[float]) -> None:
        def store() -> None:
            for new, norm in zip(rows, norms, strict=True):
                index = self._next
                self._rows[index].copy_(new)
                self._count(index, norm)

        write_whole(store)

    def agree(self) -> None:
        """Share which parameters have had a gradient."""
        flags = self.replicas.sums(lambda: [float(name in self.reached) for name in self.names], len(self.names))
        self.reached = {name for name, count in zip(self.names, flags, strict=True) if count}

    def mean(self, newest: int | None = None) -> Tensor:
        """Return the mean of the newest rows, all columns of it.

        Args:
            newest: How many; None: all.

        Returns:
            [d] float32, where the rows are.

        Raises:
            ValueError: If there are fewer.
        """
        return self.replicas.gather_columns(super().mean(newest), self.edges)

    def state_dict(self) -> dict[str, Any]:
        """Refuse: each rank has a part only.

        Raises:
            ValueError: Always.
        """
        raise ValueError("buffer: expected one of a single process to save, got one that is spread over ranks")
