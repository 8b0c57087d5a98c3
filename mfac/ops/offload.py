"""The ops for gradients in host memory, too many for the GPU: page by page, copied while the last is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

PAGE_BYTES = 2 << 30  # on the GPU there are two of them


class PagedOps:
    """The functions of :mod:`mfac.ops.compiled` for ``grads`` on the CPU and all other tensors on a device.

    F is block-diagonal, so that a page of whole blocks is a problem of its own: every op is run for each page, and the
    results are put together or added up. Rows go over by a stream of their own, from pinned memory at the speed of the
    bus (an unpinned tensor is staged by the driver, at about half of it), while the page before is worked on. What it
    takes on the device is two pages, at least one block each, and what the op itself needs.

    Args:
        kernels: :mod:`mfac.ops.compiled` or :mod:`mfac.ops.reference`, for the device.
        device: Where the work is done.
        page_bytes: Gradients on the device at a time, twice.
    """

    def __init__(self, kernels: ModuleType, device: torch.device, page_bytes: int = PAGE_BYTES) -> None:
        """Keep the arguments."""
        self.kernels, self.device, self.page_bytes = kernels, device, page_bytes

    def _pages(self, grads: Tensor, block_size: int) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield each page on the device, its columns and its blocks. A page is valid until the next iteration."""
        m, d = grads.shape
        blocks = max(1, self.page_bytes // (m * grads.element_size() * block_size))
        step = min(blocks * block_size, d)
        bounds = [slice(a, min(a + step, d)) for a in range(0, d, step)]
        buffers = [torch.empty(m * step, dtype=grads.dtype, device=self.device) for _ in bounds[:2]]
        cuda = self.device.type == "cuda"
        copier = torch.cuda.Stream(self.device) if cuda else None
        copied, done = ([torch.cuda.Event() if cuda else None for _ in buffers] for _ in range(2))

        def copy(index: int) -> Tensor:
            columns, slot = bounds[index], index % 2
            page = buffers[slot][: m * (columns.stop - columns.start)].view(m, -1)
            with torch.cuda.stream(copier):  # None: no stream
                if cuda:  # the work on what the buffer held; at first there was none
                    copier.wait_event(done[slot])
                for target, row in zip(page, grads, strict=True):  # a row's piece is one piece of memory, a page is not
                    target.copy_(row[columns], non_blocking=cuda)
                if cuda:
                    copied[slot].record(copier)
            return page

        if cuda:
            copier.wait_stream(torch.cuda.current_stream(self.device))  # the buffers' memory may be in use until then
        following = copy(0) if bounds else None
        for index, columns in enumerate(bounds):
            page = following
            following = copy(index + 1) if index + 1 < len(bounds) else None
            if cuda:
                torch.cuda.current_stream(self.device).wait_event(copied[index % 2])
            yield page, columns, slice(columns.start // block_size, -(-columns.stop // block_size))
            if cuda:
                done[index % 2].record(torch.cuda.current_stream(self.device))

    def block_factor(self, grads, damping, block_size, active=None):
        """See :func:`mfac.ops.compiled.block_factor`. The factors of all blocks are on the device together."""
        s = min(grads.shape[0], block_size, grads.shape[1])
        out = torch.zeros(-(-grads.shape[1] // block_size), s, s, dtype=torch.float64, device=self.device)
        for page, columns, blocks in self._pages(grads, block_size):
            part = self.kernels.block_factor(page, damping, block_size, _slice(active, columns))
            out[blocks, : part.shape[1], : part.shape[2]] = part
        return out

    def inverse_diagonal(self, grads, damping, block_size, active=None, precision="highest"):
        """See :func:`mfac.ops.compiled.inverse_diagonal`."""
        parts = [
            self.kernels.inverse_diagonal(page, damping, block_size, _slice(active, columns), precision)
            for page, columns, _ in self._pages(grads, block_size)
        ]
        return torch.cat(parts)

    def inverse_product(self, grads, factor, x, damping, block_size, active=None):
        """See :func:`mfac.ops.compiled.inverse_product`."""
        parts = []
        for page, columns, blocks in self._pages(grads, block_size):
            s = min(page.shape[0], block_size, page.shape[1])
            arguments = page, factor[blocks, :s, :s], x[..., columns].contiguous(), damping, block_size
            parts.append(self.kernels.inverse_product(*arguments, _slice(active, columns)))
        return torch.cat(parts, -1)

    def joint_update(self, grads, weights, kept, damping, block_size, precision="highest"):
        """See :func:`mfac.ops.compiled.joint_update`."""
        return self.joint_step(grads, weights, kept, damping, block_size, precision, diagonal=False)[0]

    def joint_step(
        self, grads, weights, kept, damping, block_size, precision="highest", gram=None, held=None, diagonal=True
    ):
        """See :func:`mfac.ops.compiled.joint_step`."""
        loss, parts = 0.0, []
        for page, columns, blocks in self._pages(grads, block_size):
            room = (None, None) if gram is None else (gram[blocks], held[columns])
            part = self.kernels.joint_step(
                page, weights[columns], kept[columns], damping, block_size, precision, *room, diagonal
            )
            loss, parts = loss + part[0], [*parts, part[1]]
        return loss, torch.cat(parts)

    def independent_update(
        self, grads, weights, kept, inverse_diagonal, damping, block_size, active=None, precision="highest"
    ):
        """See :func:`mfac.ops.compiled.independent_update`."""
        for page, columns, _ in self._pages(grads, block_size):
            self.kernels.independent_update(
                page, weights[columns], kept[columns], inverse_diagonal[columns], damping, block_size,
                _slice(active, columns), precision,
            )  # fmt: skip

    def quadratic_form(self, grads, x, damping, block_size):
        """See :func:`mfac.ops.compiled.quadratic_form`."""
        pages = self._pages(grads, block_size)
        return sum(self.kernels.quadratic_form(page, x[columns], damping, block_size) for page, columns, _ in pages)

    def group_saliency(
        self, grads, weights, groups, subsets, damping, block_size, active=None, precision="highest", gram=None,
        held=None,
    ):  # fmt: skip
        """See :func:`mfac.ops.compiled.group_saliency`. Groups that straddle blocks are sums of parts."""
        out = torch.zeros(len(groups), len(subsets), device=self.device)
        for page, columns, blocks in self._pages(grads, block_size):
            room = (None, None) if gram is None else (gram[blocks], held[columns])
            inside = (columns.start <= groups) & (groups < columns.stop)
            rows = torch.nonzero(inside.any(1)).flatten()
            here = torch.where(inside[rows], groups[rows] - columns.start, -1)
            arguments = page, weights[columns], here, subsets, damping, block_size, _slice(active, columns), precision
            out[rows] += self.kernels.group_saliency(*arguments, *room)
        return out

    def select_smallest(self, scores, k, sizes=None, weights=None):
        """See :func:`mfac.ops.compiled.select_smallest`."""
        return self.kernels.select_smallest(scores, k, sizes, weights)


def _slice(mask: Tensor | None, columns: slice) -> Tensor | None:
    """Return a piece of a mask that may be absent."""
    return None if mask is None else mask[columns]
