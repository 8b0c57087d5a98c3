"""A Fisher of gradients whose columns are spread over processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfac.fisher import DEFAULT_BLOCK_SIZE, DEFAULT_DAMPING, Fisher
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.sharded import ShardedBuffer
from mfac.ops.memory import StepMemory


class ShardedFisher:
    """The block-diagonal Fisher of a :class:`ShardedBuffer`, with the methods of :class:`mfac.Fisher`.

    Rank r owns whole blocks: their factors, diagonal and updates are computed from its columns alone, nothing is
    approximated, and a block's numbers are those of a single process bit for bit. Vectors are whole on every rank, as
    the weights of replicated models are: each method reads its columns and gathers the parts, d numbers per vector.

    Methods are collective. Those that are not documented here do what Fisher's do.

    Args:
        grads: The gradients.
        damping: As for Fisher.
        block_size: As for Fisher; it divides the inner edges of the shards.
        options: ``backend``, ``precision`` and ``device`` of Fisher.

    Raises:
        ValueError: If a block would lie on two ranks; and as for Fisher.
    """

    def __init__(
        self,
        grads: ShardedBuffer,
        damping: float | str = DEFAULT_DAMPING,
        block_size: int | None = DEFAULT_BLOCK_SIZE,
        **options: Any,
    ) -> None:
        """Check the arguments; nothing is computed yet."""
        self.replicas, self.edges, self._grads = grads.replicas, grads.edges, grads
        self._columns = slice(self.edges[self.replicas.rank], self.edges[self.replicas.rank + 1])
        self.shape = tuple(grads.shape)
        self._set_block_size(block_size)
        self._empty = self._columns.start == self._columns.stop
        # A rank without columns takes part with a block of zeros, whose results it does not send.
        own = grads if not self._empty else grads.tensor.new_zeros(max(1, len(grads)), 1)
        self._own = Fisher(own, 1.0, block_size, **options)
        self._own.mean_square = grads.mean_square
        self._own = self._own.replace(damping=damping)

    def __getattr__(self, name: str) -> Any:
        """Settings and backend are those of this rank's part."""
        if name in ("damping", "mean_square", "backend", "precision", "device", "kernels"):
            return getattr(self._own, name)
        raise AttributeError(name)

    def _set_block_size(self, block_size: int | None) -> None:
        d = self.shape[1]
        self.block_size = min(block_size or d, d)
        if not self.accepts(self.block_size):
            raise ValueError(
                f"block_size: expected a divisor of {self._grads.unit}, by which columns are cut into the parts of "
                f"{self.replicas.size} ranks, got {block_size}"
            )

    def accepts(self, block_size: int) -> bool:
        """See :meth:`mfac.Fisher.accepts`: no block may lie on two ranks."""
        d = self.shape[1]
        return all(edge in (0, d) or edge % block_size == 0 for edge in self.edges)

    def replace(self, **changes: Tensor | float | int | StepMemory | None) -> ShardedFisher:
        """See :meth:`mfac.Fisher.replace`."""
        other = copy.copy(self)
        if "block_size" in changes:
            other._set_block_size(changes["block_size"])
        if changes.get("active") is not None:
            changes["active"] = self._part(changes["active"])
        other._own = self._own.replace(**changes)
        return other

    def rows(self, begin: int, end: int) -> ShardedFisher:
        """See :meth:`mfac.Fisher.rows`."""
        other = copy.copy(self)
        other._own = self._own.rows(begin, end)
        other.shape = (other._own.shape[0], self.shape[1])
        (square,) = self.replicas.sums(lambda: [other._own.mean_square * other._own.grads.numel()], 1)
        other._own.mean_square = square / (other.shape[0] * other.shape[1])
        return other

    def project(self, x: Tensor) -> Tensor:
        """See :meth:`mfac.Fisher.project`."""
        return self.replicas.gather(self._own.project(self._part(x)).double()).sum(0)

    def inverse_diagonal(self) -> Tensor:
        """See :meth:`mfac.Fisher.inverse_diagonal`."""
        return self._gathered(self._own.inverse_diagonal)

    def inverse_product(self, x: Tensor) -> Tensor:
        """See :meth:`mfac.Fisher.inverse_product`."""
        return self._gathered(lambda: self._own.inverse_product(self._part(x)))

    def joint_update(self, weights: Tensor, kept: Tensor) -> float:
        """See :meth:`mfac.Fisher.joint_update`."""
        return self._updated(weights, kept, lambda own, keep: self._own.joint_update(own, keep))

    def joint_step(self, weights: Tensor, kept: Tensor) -> tuple[float, Tensor]:
        """See :meth:`mfac.Fisher.joint_step`."""
        diagonal: list[Tensor] = []

        def step(own: Tensor, keep: Tensor) -> float:
            loss, inverse = self._own.joint_step(own, keep)
            diagonal.append(inverse)
            return loss

        loss = self._updated(weights, kept, step)
        return loss, self._gathered(diagonal.pop)

    def independent_update(self, weights: Tensor, kept: Tensor, inverse_diagonal: Tensor) -> None:
        """See :meth:`mfac.Fisher.independent_update`."""

        def update(own: Tensor, keep: Tensor) -> float:
            self._own.independent_update(own, keep, self._part(inverse_diagonal))
            return 0.0

        self._updated(weights, kept, update)

    def step_memory(self) -> StepMemory | None:
        """See :meth:`mfac.Fisher.step_memory`."""
        return None if self._empty else self._own.step_memory()

    def group_saliency(self, weights: Tensor, groups: Tensor, subsets: Tensor) -> Tensor:
        """See :meth:`mfac.Fisher.group_saliency`.

        A group that lies on two ranks costs what its parts cost, for it lies in two blocks.

        Args:
            weights: As there.
            groups: As there.
            subsets: As there.

        Returns:
            [n, k] float32.
        """
        out = torch.zeros(len(groups), len(subsets), device=self.device)

        def score() -> None:
            inside = (groups >= self._columns.start) & (groups < self._columns.stop)
            here = inside.any(1)
            own = torch.where(inside[here], groups[here] - self._columns.start, -1)
            if len(own):
                out[here] = self._own.group_saliency(self._part(weights), own, subsets)

        self.replicas.together(score)
        return self.replicas.add(out)

    def quadratic_form(self, x: Tensor) -> float:
        """See :meth:`mfac.Fisher.quadratic_form`."""
        (total,) = self.replicas.sums(lambda: [0.0 if self._empty else self._own.quadratic_form(self._part(x))], 1)
        return total

    def _part(self, x: Tensor) -> Tensor:
        """This rank's columns of a vector [..., d]."""
        return x[..., self._columns] if not self._empty else x.new_zeros(*x.shape[:-1], 1)

    def _gathered(self, work: Callable[[], Tensor]) -> Tensor:
        """Do this rank's part of a vector, and put the parts together."""
        own: list[Tensor] = []
        self.replicas.together(lambda: own.append(work()))
        return self.replicas.gather_columns(own[0][..., :0] if self._empty else own[0], self.edges)

    def _updated(self, weights: Tensor, kept: Tensor, update: Callable[[Tensor, Tensor], float]) -> float:
        """Update this rank's weights, then all of them; return the predicted loss increase."""
        own = self._part(weights).clone()

        def work() -> list[float]:
            loss = update(own, self._part(kept))
            return [0.0 if self._empty else loss]

        (loss,) = self.replicas.sums(work, 1)
        weights.copy_(self.replicas.gather_columns(own[:0] if self._empty else own, self.edges))
        return loss


def fisher_of(grads: GradientBuffer | Tensor, **options: Any) -> Fisher | ShardedFisher:
    """Return the Fisher of gradients, wherever their columns are, with a damping of 1.

    Args:
        grads: A buffer, also one that is spread over ranks, or a tensor.
        options: ``backend``, ``precision`` and ``device`` of Fisher.

    Returns:
        A Fisher.
    """
    if isinstance(grads, ShardedBuffer):
        return ShardedFisher(grads, 1.0, grads.unit, **options)
    return Fisher(grads, 1.0, **options)
