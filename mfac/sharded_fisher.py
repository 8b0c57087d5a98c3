"""A Fisher of gradients whose columns are spread over processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mfac.distributed.replicas import Replicas
from mfac.fisher import DEFAULT_BLOCK_SIZE, DEFAULT_DAMPING, Fisher
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.sharded import ShardedBuffer
from mfac.ops.memory import StepMemory

_PAGE = 1 << 16  # columns that are taken to float64 at a time


class ShardedFisher:
    """The Fisher of a :class:`ShardedBuffer`: all methods of :class:`mfac.Fisher` that pruning uses.

    Rank r owns whole blocks: their factors, diagonal and updates are computed from its columns alone, nothing is
    approximated, and a block's numbers are those of a single process bit for bit. One block for all weights needs an
    m x m matrix of all ranks besides. Vectors are whole on every rank, as the weights of replicated models are: each
    method reads its columns and gathers the parts, d numbers per vector.

    Methods are collective but for ``accepts``, ``replace`` and ``step_memory``. Those that are not documented here do
    what Fisher's do.

    Args:
        grads: The gradients.
        damping: As for Fisher.
        block_size: As for Fisher: a divisor of the inner edges of the shards, or None.
        options: ``backend``, ``precision`` and ``device`` of Fisher.

    Attributes:
        replicas: The ranks.
        edges: [W + 1], from 0 to d: rank r has the columns ``edges[r]`` to ``edges[r + 1]``.
        shape: (m, d), of the gradients of all ranks.

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
        self._empty = self._columns.start == self._columns.stop
        self.shape = tuple(grads.shape)
        # A rank without columns takes part with a column of zeros, whose results it does not send.
        own = grads if not self._empty else grads.tensor.new_zeros(max(1, len(grads)), 1)
        self._blocks = Fisher(own, 1.0, None, **options)
        self._blocks.mean_square = grads.mean_square
        self._set(damping=damping, block_size=block_size)

    def __getattr__(self, name: str) -> Any:
        """Settings and backend are those of this rank's part."""
        if name in ("damping", "mean_square", "backend", "precision", "device", "kernels"):
            return getattr(self._blocks, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def _own(self) -> Fisher:
        """This rank's columns, and what is computed from them."""
        return _OneBlock(self._blocks, self.replicas) if self._whole else self._blocks

    def _set(self, **changes: Any) -> None:
        d = self.shape[1]
        if "block_size" in changes:
            block_size = changes["block_size"]
            self.block_size = min(block_size or d, d)
            self._whole = self.block_size == d and not self.accepts(d)
            if not self._whole and not self.accepts(self.block_size):
                raise ValueError(
                    f"block_size: expected a divisor of {self._grads.unit}, by which columns are cut into the parts of "
                    f"{self.replicas.size} ranks, or None, got {block_size}"
                )
        if changes.get("active") is not None:
            changes["active"] = self._part(changes["active"])
        self._blocks = self._blocks.replace(**changes)

    def accepts(self, block_size: int) -> bool:
        """See :meth:`mfac.Fisher.accepts`: no block may lie on two ranks."""
        d = self.shape[1]
        return all(edge in (0, d) or edge % block_size == 0 for edge in self.edges)

    def replace(self, **changes: Tensor | float | int | StepMemory | None) -> ShardedFisher:
        """See :meth:`mfac.Fisher.replace`."""
        other = copy.copy(self)
        other._set(**changes)
        return other

    def rows(self, begin: int, end: int) -> ShardedFisher:
        """See :meth:`mfac.Fisher.rows`."""
        other, part = copy.copy(self), self._blocks.rows(begin, end)
        other._blocks, other.shape = part, (part.shape[0], self.shape[1])
        (square,) = self.replicas.sums(lambda: [part.mean_square * part.grads.numel()], 1)
        part.mean_square = square / (other.shape[0] * other.shape[1])
        return other

    def project(self, x: Tensor) -> Tensor:
        """See :meth:`mfac.Fisher.project`."""
        return self.replicas.gather(self._own.project(self._part(x)).double()).sum(0).float()

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
        return None if self._empty or self._whole else self._own.step_memory()

    def group_saliency(self, weights: Tensor, groups: Tensor, subsets: Tensor) -> Tensor:
        """See :meth:`mfac.Fisher.group_saliency`.

        A group that lies on two ranks costs what its parts cost, for it lies in two blocks.

        Args:
            weights: As there.
            groups: As there.
            subsets: As there.

        Returns:
            [n, k] float32.

        Raises:
            ValueError: If there is one block for all weights.
        """
        if self._whole:
            raise ValueError(
                f"pattern: expected 'unstructured' for one block over {self.replicas.size} processes, got groups, "
                "which may lie on two of them; a number for block_size allows patterns"
            )
        out = torch.zeros(len(groups), len(subsets), device=self.device)

        def score() -> None:
            inside = (groups >= self._columns.start) & (groups < self._columns.stop)
            here = inside.any(1)
            own = torch.where(inside[here], groups[here] - self._columns.start, -1)
            if len(own):
                out[here] = self._own.group_saliency(self._part(weights), own, subsets)

        self._together(score)
        return self.replicas.add(out)

    def quadratic_form(self, x: Tensor) -> float:
        """See :meth:`mfac.Fisher.quadratic_form`."""
        return self._total(self._together(lambda: self._own.quadratic_form(self._part(x))))

    def _part(self, x: Tensor) -> Tensor:
        """This rank's columns of a vector [..., d]."""
        return x[..., self._columns] if not self._empty else x.new_zeros(*x.shape[:-1], 1)

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do this rank's part, which asks the others for nothing unless there is one block, on all ranks or on none."""
        return work() if self._whole else self.replicas.call(work)

    def _total(self, loss: float) -> float:
        (total,) = self.replicas.sums(lambda: [0.0 if self._empty and not self._whole else loss], 1)
        return total

    def _gathered(self, work: Callable[[], Tensor]) -> Tensor:
        """Do this rank's part of a vector, and put the parts together."""
        own = self._together(work)
        return self.replicas.gather_columns(own[..., :0] if self._empty else own, self.edges)

    def _updated(self, weights: Tensor, kept: Tensor, update: Callable[[Tensor, Tensor], float]) -> float:
        """Update this rank's weights, then all of them; return the predicted loss increase."""
        own = self._part(weights).clone()
        loss = self._together(lambda: update(own, self._part(kept)))
        weights.copy_(self.replicas.gather_columns(own[:0] if self._empty else own, self.edges))
        return self._total(loss)


class _OneBlock(Fisher):
    """The columns of one rank in a Fisher of one block: K = mλ I + Σ_r G_r G_rᵀ is summed over the ranks, in float64.

    With K = L Lᵀ all else is local: diag(F⁻¹)_i = (1 - ‖L⁻¹ g_i‖²) / λ, and F⁻¹x = (x - Gᵀ K⁻¹ Σ_r G_r x_r) / λ. Each
    rank sends m² numbers per factor and m per product, and returns its share of a loss.

    Args:
        part: This rank's columns.
        replicas: The ranks.
    """

    def __init__(self, part: Fisher, replicas: Replicas) -> None:
        """Take over the settings."""
        self.__dict__.update(part.__dict__)  # its tensors and settings, which have been checked
        self._replicas = replicas

    def _pages(self, used: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns, and G there [m, columns] in float64, zero where not used."""
        for begin in range(0, self.grads.shape[1], _PAGE):
            columns = slice(begin, begin + _PAGE)
            page = self.grads[:, columns].to(self.device, torch.float64)
            yield columns, page if used is None else page * used[columns]

    def _sum(self, work: Callable[[], Tensor]) -> Tensor:
        return self._replicas.gather(self._replicas.call(work)).sum(0)

    def _cholesky(self, used: Tensor | None) -> Tensor:
        def gram() -> Tensor:
            out = torch.zeros(self.shape[0], self.shape[0], dtype=torch.float64, device=self.device)
            for _, page in self._pages(used):
                out.addmm_(page, page.T)
            return out

        capacitance = self._sum(gram)
        capacitance.diagonal().add_(self.shape[0] * self.damping)
        return torch.linalg.cholesky(capacitance)

    def _product(self, x: Tensor, used: Tensor | None) -> Tensor:
        """G x over all ranks, [..., m] float64."""

        def product() -> Tensor:
            out = torch.zeros(*x.shape[:-1], self.shape[0], dtype=torch.float64, device=self.device)
            for columns, page in self._pages(used):
                out += x[..., columns].double() @ page.T
            return out

        return self._sum(product)

    def _diagonal(self, factor: Tensor, used: Tensor | None) -> Tensor:
        out = torch.empty(self.grads.shape[1], device=self.device)
        for columns, page in self._pages(used):
            rest = 1 - torch.linalg.solve_triangular(factor, page, upper=False).square().sum(0)
            out[columns] = rest.clamp_min(torch.finfo(torch.float64).eps) / self.damping
        return out

    def inverse_diagonal(self) -> Tensor:
        return self._diagonal(self._cholesky(self._active), self._active)

    def inverse_product(self, x: Tensor) -> Tensor:
        factor = self._cholesky(self._active)
        product = self._product(x, self._active)
        inner = torch.cholesky_solve(product.reshape(-1, self.shape[0]).T, factor).T.reshape(product.shape)
        out = torch.empty(x.shape, dtype=torch.float32, device=self.device)
        for columns, page in self._pages(self._active):
            out[..., columns] = (x[..., columns].double() - inner @ page) / self.damping
        return out

    def _joint(self, weights: Tensor, kept: Tensor, diagonal: bool) -> tuple[float, Tensor]:
        active = torch.ones_like(kept) if self._active is None else self._active
        used, before = kept & active, weights.clone()
        factor = self._cholesky(used)
        gone = torch.where(active & ~kept, weights, 0)
        inner = torch.cholesky_solve(self._product(gone, active)[:, None], factor)[:, 0]
        for columns, page in self._pages(used):
            weights[columns] += (inner @ page).float()
        weights.masked_fill_(~kept, 0)
        inverse = self._diagonal(factor, used) if diagonal else weights.new_empty(0)
        return self.quadratic_form(weights - before), inverse

    def independent_update(self, weights: Tensor, kept: Tensor, inverse_diagonal: Tensor) -> None:
        gone = ~kept if self._active is None else self._active & ~kept
        weights -= self.inverse_product(torch.where(gone, weights / inverse_diagonal, 0))
        weights.masked_fill_(~kept, 0)

    def quadratic_form(self, x: Tensor) -> float:
        """This rank's share of it; the first rank's has what depends on all."""
        product = self._product(x, self._active)
        data = float(product.square().sum()) / self.shape[0] if self._replicas.rank == 0 else 0.0
        return 0.5 * (self.damping * float(x.double().square().sum()) + data)


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
