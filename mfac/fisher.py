"""The damped empirical Fisher of a set of gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mfac.checks import check_choice, check_instance
from mfac.gradients.buffer import GradientBuffer
from mfac.ops.arguments import DAMPING_RANGE, check_block_size, check_damping, check_gradients
from mfac.ops.backend import backend_name, select_backend
from mfac.ops.memory import StepMemory, allocate
from mfac.ops.offload import PagedOps
from mfac.ops.reference import check_groups

PRECISIONS = ("highest", "high", "medium")
DEFAULT_DAMPING = "3e-2*mean"  # with this block size the most accuracy over sparsities and recomputations
DEFAULT_BLOCK_SIZE = 512
_MAX_FACTOR_BYTES = 256 << 20  # of factors that are kept unasked


class Fisher:
    """F = λ I + (1/m) Gᵀ G, full or block-diagonal, never formed.

    Inverse and products go through the smaller of two Cholesky factors, of mλ I + G Gᵀ (m gradients) or of mλ I + GᵀG
    (B columns), so that the cost is 2 d m min(m, B) flops where the recursion of M-FAC (Frantar, Kurtic, Alistarh,
    NeurIPS 2021) needs as many memory-bound ones.

    Args:
        grads: G [m, d], float32 or bfloat16, one gradient per row; or a :class:`GradientBuffer`. Never written. Not
            copied either, unless its rows are not contiguous (stride(1) != 1, as in a transpose): then once, here.
        damping: λ in [1e-30, 1e30], not its inverse; or ``"<number>*mean"``: that number times ``mean_square``.
        block_size: B, columns per block; ``None`` for the full matrix.
        active: [d] bool; columns that are not active count as if their gradients were zero (weights pruned before),
            in every method (in :meth:`group_saliency` they cost nothing).
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.
        precision: ``"highest"``, ``"high"`` or ``"medium"``: what the large matrix products may give up for speed on a
            GPU, or on a CPU with AMX; see :mod:`mfac.ops`.
        device: Where the work is done and all vectors are; default where the gradients are. For gradients on the CPU
            it may be a GPU: they go there page by page (:mod:`mfac.ops.offload`).

    Attributes:
        backend: ``"compiled"`` or ``"reference"``: what computes.
        mean_square: Mean of the squares of all gradients, which is the mean diagonal of (1/m) GᵀG.

    Raises:
        TypeError: If ``grads`` is not such a tensor or buffer, ``active`` not a bool tensor, or a number is not one.
        ValueError: If ``grads`` has no rows or is not finite, ``damping`` or ``block_size`` is out of range, or
            ``active`` is of another shape or device.

    Example:
        >>> fisher = Fisher(torch.randn(32, 100), damping=1e-3, block_size=50)
        >>> fisher.inverse_diagonal().shape
        torch.Size([100])
        >>> x = torch.randn(100)
        >>> row = fisher.inverse_elements([7] * 50, range(50))
        >>> bool(torch.isclose(fisher.inverse_product(x)[7], (row @ x[:50].double()).float(), rtol=1e-3))
        True
    """

    def __init__(
        self,
        grads: Tensor | GradientBuffer,
        damping: float | str = DEFAULT_DAMPING,
        block_size: int | None = DEFAULT_BLOCK_SIZE,
        *,
        active: Tensor | None = None,
        backend: str = "auto",
        precision: str = "highest",
        device: torch.device | str | None = None,
    ) -> None:
        """Check the arguments; nothing is computed yet."""
        if isinstance(grads, GradientBuffer) and len(grads):  # its rows were checked as they came
            self.mean_square, grads = grads.mean_square, grads.tensor
        else:
            grads = grads.tensor if isinstance(grads, GradientBuffer) else grads
            self.mean_square = check_gradients(grads)
        self.grads = grads.detach() if grads.stride(1) == 1 else grads.detach().contiguous()
        try:  # the device of a tensor has its index
            self.device = grads.device if device is None else torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for a name or a device that is not there
            raise ValueError(f"device: expected an available device, got {device!r} ({error})") from error
        if grads.device not in (self.device, torch.device("cpu")):
            raise ValueError(f"grads: expected on {self.device} or the CPU, got {grads.device}")
        self.precision = check_choice("precision", precision, PRECISIONS)
        self._set(active, damping, block_size)
        kernels = select_backend(backend, self.device)
        self.backend = backend_name(kernels)
        self.kernels = kernels if grads.device == self.device else PagedOps(kernels, self.device)

    def replace(self, **changes: Tensor | float | int | StepMemory | None) -> Fisher:
        """Return a Fisher of the same gradients, which are shared and not checked again.

        Args:
            changes: ``active``, ``damping`` or ``block_size``; or ``memory``, from :meth:`step_memory` of this Fisher:
                what :meth:`joint_update`, :meth:`joint_step` and :meth:`group_saliency` leave there saves time when
                they are called again, on this Fisher or one with fewer active columns.

        Returns:
            A new object.

        Raises:
            TypeError: If one is of the wrong type.
            ValueError: If one is out of range, or of the wrong shape or device.
        """
        other = copy.copy(self)
        other._set(**{"active": self._active, "damping": self.damping, "block_size": self.block_size, **changes})
        return other

    def rows(self, begin: int, end: int) -> Fisher:
        """Return the Fisher of some of the gradients, with all settings as they are.

        Args:
            begin: The first row.
            end: The row after the last.

        Returns:
            A new object; λ stays the number that it is.
        """
        other = copy.copy(self)
        other.grads, other._factor, other._memory = self.grads[begin:end], None, None
        other.mean_square = check_gradients(other.grads)
        return other

    def project(self, x: Tensor) -> Tensor:
        """Return the product of every gradient with a vector.

        Args:
            x: [d] float32.

        Returns:
            G x, [m] float32.
        """
        return torch.stack([row.to(x) @ x for row in self.grads])

    def accepts(self, block_size: int) -> bool:
        """Return whether the Fisher can have blocks of a size.

        Args:
            block_size: B.

        Returns:
            True.
        """
        return True

    def _set(
        self, active: Tensor | None, damping: float | str, block_size: int | None, memory: StepMemory | None = None
    ) -> None:
        factor, block_size = check_damping("damping", damping), check_block_size("block_size", block_size)
        if isinstance(damping, str):
            if not self.mean_square > 0:
                raise ValueError(f"damping: {damping!r} is relative to the gradients, which are zero; give a number")
            damping = min(max(factor * self.mean_square, DAMPING_RANGE[0]), DAMPING_RANGE[1])
        if active is not None:
            self._check_vector("active", active, torch.bool)
        self.damping = float(damping)
        self.block_size = min(block_size or self.grads.shape[1], self.grads.shape[1])
        self._active, self._memory = active, memory
        self._factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        m, d = self.grads.shape
        return m, d

    def factor(self) -> Tensor:
        """Return the Cholesky factors [blocks, s, s] float64, s = min(m, B); computed at first use and kept."""
        if self._factor is None:
            self._factor = self.kernels.block_factor(self.grads, self.damping, self.block_size, self._active)
        return self._factor

    def inverse_diagonal(self) -> Tensor:
        """Return diag(F⁻¹), [d] float32, positive."""
        return self.kernels.inverse_diagonal(self.grads, self.damping, self.block_size, self._active, self.precision)

    def inverse_product(self, x: Tensor) -> Tensor:
        """Return F⁻¹ x; without :meth:`factor` before it, in pages whose factors take up to 256 MiB and are not kept.

        Args:
            x: [d] or [k, d].

        Returns:
            float32, shaped like x.

        Raises:
            TypeError: If x is not a tensor.
            ValueError: If the shape or the device of x does not match.
        """
        check_instance("x", x, Tensor, "a tensor")
        m, d = self.shape
        if x.dim() not in (1, 2) or x.shape[-1] != d or x.device != self.device:
            raise ValueError(f"x: expected shape [{d}] or [k, {d}] on {self.device}, got {list(x.shape)} on {x.device}")
        x, settings = x.float(), (self.damping, self.block_size)
        page = max(1, _MAX_FACTOR_BYTES // (8 * min(m, self.block_size) ** 2)) * self.block_size
        if self._factor is not None or page >= d:
            return self.kernels.inverse_product(self.grads, self.factor(), x, *settings, self._active)
        out = torch.empty_like(x)
        for begin in range(0, d, page):  # of whole blocks, whose factors are not kept
            columns = slice(begin, min(begin + page, d))
            grads, active = self.grads[:, columns], None if self._active is None else self._active[columns]
            factor = self.kernels.block_factor(grads, *settings, active)
            out[..., columns] = self.kernels.inverse_product(grads, factor, x[..., columns], *settings, active)
        return out

    def inverse_elements(self, i: Tensor | list[int] | range, j: Tensor | list[int] | range) -> Tensor:
        """Return elements [F⁻¹]_{i_k j_k} = (δ_ij - (L⁻¹g_i)·(L⁻¹g_j)) / λ; zero across blocks.

        Costs min(m, B)² flops per distinct index.

        Args:
            i: n row indices.
            j: n column indices.

        Returns:
            [n] float64.

        Raises:
            ValueError: If the lengths differ or an index is not in [0, d).
        """
        device, (m, d) = self.device, self.shape
        i, j = (torch.as_tensor(index, dtype=torch.long, device=device) for index in (i, j))
        if i.shape != j.shape or i.dim() != 1:
            raise ValueError(f"i, j: expected two lists of one length, got shapes {list(i.shape)} and {list(j.shape)}")
        if len(i) and not (0 <= min(i.min(), j.min()) and max(i.max(), j.max()) < d):
            raise ValueError(f"i, j: expected indices in [0, {d}), got {int(min(i.min(), j.min()))} to "
                             f"{int(max(i.max(), j.max()))}")  # fmt: skip
        out = torch.zeros(len(i), dtype=torch.float64, device=device)
        same = i // self.block_size == j // self.block_size
        for block in torch.unique(i[same] // self.block_size).tolist():
            start = block * self.block_size
            columns = torch.arange(start, min(start + self.block_size, d), device=device)
            active = torch.ones_like(columns, dtype=torch.bool) if self._active is None else self._active[columns]
            n = min(m, int(active.sum()))
            factor = self.factor()[block, :n, :n]
            where = torch.nonzero(same & (i // self.block_size == block)).flatten()
            wanted, inverse = torch.unique(torch.cat([i[where], j[where]]), return_inverse=True)
            left, right = inverse.split(len(where))
            used = active[wanted - start][:, None]
            if m < int(active.sum()):
                g = self.grads[:, wanted.to(self.grads.device)].to(device).double()
                z = torch.linalg.solve_triangular(factor, g, upper=False).T * used
                dot = (z[left] * z[right]).sum(1)
                out[where] = ((i[where] == j[where]).double() - dot) / self.damping
            else:
                position = active.cumsum(0) - 1
                unit = torch.zeros(n, len(wanted), dtype=torch.float64, device=device)
                inside = torch.nonzero(used[:, 0]).flatten()
                unit[position[wanted[inside] - start], inside] = 1
                z = torch.linalg.solve_triangular(factor, unit, upper=False).T
                outside = (~used[left, 0] & (i[where] == j[where])).double() / self.damping
                out[where] = m * (z[left] * z[right]).sum(1) + outside
        return out

    def joint_update(self, weights: Tensor, kept: Tensor) -> float:
        """Prune in place all weights that are not kept and move the others to the minimum of ½ δᵀFδ.

        A weight that is not active is alone in its part of F: kept, it stays as it is; pruned, it costs ½ λ w².

        Args:
            weights: [d] float32, written.
            kept: [d] bool.

        Returns:
            The predicted loss increase ½ δᵀFδ.

        Raises:
            TypeError: If one is not a tensor of its type.
            ValueError: If a shape or device does not match; nothing is written then.
        """
        return self._joint(weights, kept, False)[0]

    def joint_step(self, weights: Tensor, kept: Tensor) -> tuple[float, Tensor]:
        """:meth:`joint_update`, and the inverse diagonal of what is then left, from one factor.

        Args:
            weights: [d] float32, written.
            kept: [d] bool.

        Returns:
            The predicted loss increase ½ δᵀFδ, and diag(F⁻¹) [d] float32 with the active columns that are kept.

        Raises:
            TypeError: If one is not a tensor of its type.
            ValueError: If a shape or device does not match; nothing is written then.
        """
        return self._joint(weights, kept, True)

    def _joint(self, weights: Tensor, kept: Tensor, diagonal: bool) -> tuple[float, Tensor]:
        self._check_vector("weights", weights, torch.float32)
        self._check_vector("kept", kept, torch.bool)
        new, alone, keep, active = weights, None, kept, self._active
        if active is not None:
            new, keep = torch.where(active, weights, 0), kept & active
            alone = torch.where(active | kept, 0, weights)  # inactive weights that go
        settings = self.grads, new, keep, self.damping, self.block_size, self.precision
        loss, inverse = self.kernels.joint_step(*settings, *(self._memory or (None, None)), diagonal)
        if active is None:
            return float(loss), inverse
        weights.copy_(torch.where(kept & ~active, weights, new))
        return float(loss) + 0.5 * self.damping * float(alone.double().square().sum()), inverse

    def step_memory(self) -> StepMemory | None:
        """Return room, at most 1 GiB, for the matrices that one step leaves for the next (:meth:`replace`); or None."""
        on_cpu = self.backend == "compiled" and self.device.type == "cpu"
        return allocate(self.grads, self.block_size) if on_cpu else None

    def independent_update(self, weights: Tensor, kept: Tensor, inverse_diagonal: Tensor) -> None:
        """Prune in place as M-FAC publishes it: the sum of single-weight updates.

        Args:
            weights: [d] float32, the only tensor written.
            kept: [d] bool.
            inverse_diagonal: [d] float32, from :meth:`inverse_diagonal`.

        Raises:
            TypeError: If one is not a tensor of its type.
            ValueError: If a shape or device does not match; nothing is written then.
        """
        self._check_vector("weights", weights, torch.float32)
        self._check_vector("kept", kept, torch.bool)
        self._check_vector("inverse_diagonal", inverse_diagonal, torch.float32)
        self.kernels.independent_update(
            self.grads, weights, kept, inverse_diagonal, self.damping, self.block_size, self._active, self.precision
        )

    def group_saliency(self, weights: Tensor, groups: Tensor, subsets: Tensor) -> Tensor:
        """Return ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q for subsets Q of groups of weights: the cost of pruning Q together.

        Args:
            weights: [d] float32.
            groups: [n, P] int64, positions in [0, d), or -1 for none.
            subsets: [k, s] int64, places in [0, P).

        Returns:
            [n, k] float32.

        Raises:
            TypeError: If one is not a tensor of its type.
            ValueError: If a shape, device or position is wrong.
        """
        self._check_vector("weights", weights, torch.float32)
        check_groups(groups, subsets, self.grads.shape[1], self.device)
        return self.kernels.group_saliency(
            self.grads, weights, groups, subsets, self.damping, self.block_size, self._active, self.precision,
            *(self._memory or (None, None)),
        )  # fmt: skip

    def quadratic_form(self, x: Tensor) -> float:
        """Return ½ xᵀFx, the loss increase predicted for a step x.

        Args:
            x: [d] float32.

        Returns:
            ½ (λ ‖x‖² + Σ_blocks ‖G x‖² / m).

        Raises:
            TypeError: If x is not a float32 tensor.
            ValueError: If its shape or device does not match.
        """
        self._check_vector("x", x, torch.float32)
        if self._active is None:
            return float(self.kernels.quadratic_form(self.grads, x, self.damping, self.block_size))
        inside, outside = torch.where(self._active, x, 0), torch.where(self._active, 0, x)
        data = float(self.kernels.quadratic_form(self.grads, inside, self.damping, self.block_size))
        return data + 0.5 * self.damping * float(outside.double().square().sum())

    def _check_vector(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        d, device = self.grads.shape[1], self.device
        check_instance(name, x, Tensor, "a tensor")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
        if x.shape != (d,) or x.device != device:
            raise ValueError(f"{name}: expected shape [{d}] on {device}, got {list(x.shape)} on {x.device}")
