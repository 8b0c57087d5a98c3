"""A source of gradients for a model that is pruned step by step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfac.checks import check_choice, check_int
from mfac.distributed.replicas import ALONE, Replicas
from mfac.gradients.arguments import check_dtype
from mfac.gradients.batches import MODES, Forward, check_functions, model_device, move_batch
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.collect import append_batches, batch_losses, make_buffer
from mfac.gradients.seeds import SeedKind, derive_seed
from mfac.gradients.stream import BatchStream
from mfac.model.targets import prunable_parameters


class GradientSource:
    """A buffer of gradients of a model that changes, renewed from an endless stream of batches.

    All randomness is derived from torch's seed when the source is made (``torch.initial_seed()``): torch's random
    state does not change, and every collection sees new batches of a loader that shuffles. A saved position is exact,
    also in the middle of a pass; :class:`BatchStream` describes lists, DataLoaders and iterators. No worker processes
    of a DataLoader are alive between two calls.

    Copies and pickles hold position and buffer; ``copy.deepcopy`` shares ``batches``, ``loss_fn`` and ``forward``.

    Args:
        batches: Iterable of batches, as for :func:`mfac.collect_gradients`; there is a warning if they are fewer than
            ``num_grads``.
        loss_fn: Loss of (outputs, targets), or None.
        num_grads: m, rows of the Fisher.
        refresh: How many of them are renewed from the second collection on, in [1, m]; None for all.
        dtype: Of the rows.
        device: Where they are; see :class:`GradientBuffer`.
        mode: ``"eval"``, or ``"train"``: modules are in training mode while gradients are collected.
        forward: Function of (model, batch) that returns (outputs, targets), or the loss if ``loss_fn`` is None.
        replicas: Processes that each compute gradients of batches of their own, ``num_grads`` in all.
        unit: Columns of the buffer that stay on one rank; see :class:`~mfac.gradients.sharded.ShardedBuffer`.

    Attributes:
        batches: The endless iterator, a :class:`BatchStream`.
        seconds: That a gradient took in the last collection; None before the first.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range, or ``mode`` none of the two.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(8)]
        >>> source = GradientSource(data, nn.functional.mse_loss, num_grads=6, refresh=2)
        >>> source.collect(model, ["weight"]).shape
        (6, 8)
        >>> source.state_dict()["taken"]
        6
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor] | None,
        *,
        num_grads: int,
        refresh: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        mode: str = "eval",
        forward: Forward | None = None,
        replicas: Replicas = ALONE,
        unit: int = 1,
    ) -> None:
        """Check the arguments."""
        check_functions(loss_fn, forward)
        self._replicas, self._unit = replicas, unit
        self.batches = BatchStream(batches, _shared_seed(replicas), rank=replicas.rank)
        self.resize(num_grads, num_grads if refresh is None else refresh)
        self.dtype, self.device = check_dtype("dtype", dtype), device
        self._loss_fn, self._forward, self._mode = loss_fn, forward, check_choice("mode", mode, MODES)
        self.seconds: float | None = None

    def resize(self, num_grads: int, refresh: int) -> None:
        """Change the number of rows; all rows are new at the next collection.

        Args:
            num_grads: m.
            refresh: How many of them are renewed from the second collection on.
        """
        self.num_grads = check_int("num_grads", num_grads)
        self.refresh = check_int("refresh", refresh, 1, self.num_grads)
        self._buffer: GradientBuffer | None = None
        self.batches.announce = -(-self.num_grads // self._replicas.size)

    def collect(
        self, model: nn.Module, params: Iterable[str], progress: bool = False, count: int | None = None
    ) -> GradientBuffer:
        """Return the buffer after renewing its rows: all at first, then ``count``.

        Args:
            model: The model as it is now.
            params: Names of its parameters.
            progress: Show a progress bar.
            count: Rows to renew, at most ``num_grads``; None: ``refresh``.

        Returns:
            A full buffer, the same one each time.

        Raises:
            ValueError: If the buffer is for other parameters.
        """
        chosen = prunable_parameters(model, params)
        count = self.refresh if count is None else count
        if self._buffer is None:
            self._buffer = make_buffer(self.num_grads, chosen, self.dtype, self.device, self._replicas, self._unit)
        if self._buffer.names != list(chosen):
            raise ValueError(f"params: expected those of the buffer, {self._buffer.names}, got {list(chosen)}")
        if len(self._buffer) < self.num_grads:  # new, or a collection was interrupted
            count = self.num_grads
        began = time.perf_counter()
        try:
            append_batches(
                self._buffer, model, self.batches, self._loss_fn, count, chosen,
                progress=progress, seed=self._seed(SeedKind.COLLECT), mode=self._mode, forward=self._forward,
            )  # fmt: skip
        finally:
            self.batches.close()
        self.seconds = (time.perf_counter() - began) / count
        return self._buffer

    def loss(self, model: nn.Module, num_batches: int) -> float:
        """Return the mean loss over new batches, in the mode in which gradients are collected.

        Args:
            model: The model as it is now.
            num_batches: How many.

        Returns:
            The mean.
        """
        settings = {"seed": self._seed(SeedKind.MEASURE), "mode": self._mode, "forward": self._forward}
        settings["replicas"] = self._replicas
        own, skipped = self._share(num_batches)

        def measured() -> tuple[float]:
            total = sum(batch_losses(model, self.batches, self._loss_fn, own, **settings))
            for _ in range(skipped):
                next(self.batches)
            return (total,)

        try:
            (total,) = self._replicas.sums(measured, 1)
            return total / max(num_batches, own * self._replicas.size * self._replicas.lockstep)
        finally:
            self.batches.close()

    def hold(self, model: nn.Module, num_batches: int) -> Callable[[], float]:
        """Return a function that measures the mean loss over the same new batches at each call.

        Args:
            model: It is measured as it is at each call.
            num_batches: How many; copies of them are kept where the model is, as long as the function is.

        Returns:
            The function: NaN if no batch has a finite loss; those that have none at the first call do not count.
        """
        held: list[Any] = []
        own, skipped = self._share(num_batches)

        def draw() -> None:
            held.extend(move_batch(next(self.batches), model_device(model), copies=True) for _ in range(own))
            for _ in range(skipped):
                next(self.batches)

        try:
            self._replicas.together(draw)
        finally:
            self.batches.close()
        settings = {"seed": self._seed(SeedKind.MEASURE), "mode": self._mode, "forward": self._forward}
        settings["replicas"] = self._replicas
        judges: list[int] | None = None  # those of finite loss at first, as gradients that are not finite are left out

        def losses_here() -> tuple[float, float]:
            nonlocal judges
            copies = (move_batch(batch, model_device(model), copies=True) for batch in held)  # models may write to them
            losses = batch_losses(model, copies, self._loss_fn, own, **settings)
            judges = judges or [i for i, loss in enumerate(losses) if math.isfinite(loss)]
            return sum(losses[i] for i in judges), len(judges)

        def measure() -> float:
            total, count = self._replicas.sums(losses_here, 2)
            return total / count if count else math.nan

        return measure

    def _share(self, count: int) -> tuple[int, int]:
        """This rank's part of a number of batches, and how many it draws beside them."""
        # All ranks draw the same number, so that the position of one holds for all when it is saved.
        own = self._replicas.share(count)
        return own, -(-count // self._replicas.size) - own

    def _seed(self, kind: SeedKind) -> int:
        state = self.batches.state_dict()
        return derive_seed(self.batches.root, kind, state["passes"], state["taken"])

    def release(self) -> None:
        """Free the buffer: all rows are new at the next collection."""
        self._buffer = None

    def state_dict(self) -> dict[str, int]:
        """Return seed and position."""
        return self.batches.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a position; all rows are new at the next collection.

        Args:
            state: From :meth:`state_dict` of a source over the same kind of batches.

        Raises:
            TypeError: If a value is not an int.
            ValueError: If one is missing or negative.
        """
        self.batches.load_state_dict(state)
        self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientSource:
        """Copy position and buffer; batches and functions are shared."""
        new = copy.copy(self)
        new.batches, new._buffer = copy.deepcopy(self.batches, memo), copy.deepcopy(self._buffer, memo)
        return new


def _shared_seed(replicas: Replicas) -> int:
    """Return torch's seed, of several ranks that of the first: programs may seed each rank differently."""
    seed = torch.initial_seed() % 2**64
    high, low = replicas.together(lambda: divmod(seed, 2**32), 2)[0]
    return (int(high) << 32) + int(low)
