"""The damped empirical Fisher of a set of gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfac import ops
from mfac.gradients import GradientBuffer


class Fisher:
    """F = λ I + (1/m) Gᵀ G, full or block-diagonal, never formed.

    Inverse and products go through the smaller of two Cholesky factors, of mλ I + G Gᵀ (m gradients) or of mλ I + GᵀG
    (B columns), so that the cost is 2 d m min(m, B) flops where the recursion of M-FAC (Frantar, Kurtic, Alistarh,
    NeurIPS 2021) needs as many memory-bound ones.

    Args:
        grads: G [m, d], float32 or bfloat16, one gradient per row; or a :class:`GradientBuffer`. Never written.
        damping: λ > 0. Not its inverse, and not relative to anything.
        block_size: B, columns per block; ``None`` for the full matrix.
        active: [d] bool; columns that are not active count as if their gradients were zero (weights pruned before).
        backend: ``"auto"``, ``"compiled"`` or ``"reference"``.

    Raises:
        TypeError: If ``grads`` is not such a tensor or buffer, ``active`` not a tensor, or a number is not one.
        ValueError: If ``grads`` has no rows or is not finite, ``damping`` or ``block_size`` is out of range, or
            ``active`` does not match.

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
        damping: float = 1e-5,
        block_size: int | None = 2000,
        *,
        active: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """Check the arguments; nothing is computed yet."""
        grads = grads.tensor if isinstance(grads, GradientBuffer) else grads
        check_gradients(grads)
        d = grads.shape[1]
        check_fisher_settings(damping, block_size)
        if active is not None and not isinstance(active, Tensor):
            raise TypeError(f"active: expected a bool tensor, got {type(active).__name__}")
        if active is not None and (active.shape != (d,) or active.dtype != torch.bool or active.device != grads.device):
            raise ValueError(
                f"active: expected bool of shape [{d}] on {grads.device}, got {active.dtype} of shape "
                f"{list(active.shape)} on {active.device}"
            )
        self.grads = grads.detach()
        self.damping = float(damping)
        self.block_size = min(block_size or d, d)
        self._active = active
        self._kernels = ops.select_backend(backend, grads.device)
        self._factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        m, d = self.grads.shape
        return m, d

    @property
    def backend(self) -> str:
        """``"compiled"`` or ``"reference"``: what computes."""
        return "compiled" if self._kernels is ops else "reference"

    def factor(self) -> Tensor:
        """Return the Cholesky factors [blocks, s, s] float64, s = min(m, B); computed at first use and kept."""
        if self._factor is None:
            self._factor = self._kernels.block_factor(self.grads, self.damping, self.block_size, self._active)
        return self._factor

    def inverse_diagonal(self) -> Tensor:
        """Return diag(F⁻¹), [d] float32, positive."""
        return self._kernels.inverse_diagonal(self.grads, self.damping, self.block_size, self._active)

    def inverse_product(self, x: Tensor) -> Tensor:
        """Return F⁻¹ x.

        Args:
            x: [d] or [k, d].

        Returns:
            float32, shaped like x.

        Raises:
            TypeError: If x is not a tensor.
            ValueError: If the shape or the device of x does not match.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        d = self.grads.shape[1]
        if x.dim() not in (1, 2) or x.shape[-1] != d or x.device != self.grads.device:
            raise ValueError(
                f"x: expected shape [{d}] or [k, {d}] on {self.grads.device}, got {list(x.shape)} on {x.device}"
            )
        return self._kernels.inverse_product(
            self.grads, self.factor(), x.float(), self.damping, self.block_size, self._active
        )

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
        device, (m, d) = self.grads.device, self.shape
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
            if m <= int(active.sum()):
                z = torch.linalg.solve_triangular(factor, self.grads[:, wanted].double(), upper=False).T * used
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

        Args:
            weights: [d] float32, the only tensor written.
            kept: [d] bool.

        Returns:
            The predicted loss increase ½ δᵀFδ.
        """
        return float(self._kernels.joint_update(self.grads, weights, kept, self.damping, self.block_size))

    def independent_update(self, weights: Tensor, kept: Tensor, inverse_diagonal: Tensor) -> None:
        """Prune in place as M-FAC publishes it: the sum of single-weight updates.

        Args:
            weights: [d] float32, the only tensor written.
            kept: [d] bool.
            inverse_diagonal: [d], from :meth:`inverse_diagonal`.
        """
        self._kernels.independent_update(
            self.grads, weights, kept, inverse_diagonal, self.damping, self.block_size, self._active
        )

    def quadratic_form(self, x: Tensor) -> float:
        """Return ½ xᵀFx, the loss increase predicted for a step x [d] float32."""
        return float(self._kernels.quadratic_form(self.grads, x, self.damping, self.block_size))


def check_gradients(grads: Tensor) -> None:
    """Check that ``grads`` is a finite [m, d] matrix.

    Args:
        grads: What the user gave.

    Raises:
        TypeError: If it is not a tensor of float32 or bfloat16.
        ValueError: If the shape is wrong or a row is not finite.
    """
    if not isinstance(grads, Tensor):
        raise TypeError(f"grads: expected a tensor or GradientBuffer, got {type(grads).__name__}")
    if grads.dim() != 2 or 0 in grads.shape:
        raise ValueError(
            f"grads: expected [m, d] with m >= 1 gradients and d >= 1 weights, got shape {list(grads.shape)}"
        )
    if grads.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"grads: expected float32 or bfloat16, got {grads.dtype}")
    # NaN and infinity survive a sum, which runs at memory speed; only a suspect row is looked at number by number.
    suspects = torch.nonzero(~torch.isfinite(grads.sum(1, dtype=torch.float32))).flatten().tolist()
    bad = [row for row in suspects if not torch.isfinite(grads[row]).all()]
    if bad:
        raise ValueError(f"grads: expected finite numbers, got NaN or infinity in {len(bad)} rows, the first {bad[0]}")


def check_fisher_settings(damping: float, block_size: int | None) -> None:
    """Check damping and block size.

    Args:
        damping: λ, finite and > 0.
        block_size: B >= 1, or None.

    Raises:
        TypeError: If one is not a number of its kind.
        ValueError: If one is out of range.
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"damping: expected a number, got {damping!r}")
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping: expected a finite number > 0, got {damping!r}")
    if block_size is not None:
        if isinstance(block_size, bool) or not isinstance(block_size, int):
            raise TypeError(f"block_size: expected an int or None, got {block_size!r}")
        if block_size < 1:
            raise ValueError(f"block_size: expected >= 1 or None, got {block_size}")
