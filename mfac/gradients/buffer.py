"""Gradients for the Fisher: a ring buffer that a training loop or :func:`mfac.collect_gradients` fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfac.checks import check_instance, check_int
from mfac.distributed.shards import whole
from mfac.gradients.arguments import check_dtype, check_grads_device, check_real, check_scale, check_state
from mfac.gradients.memory import allocate_rows
from mfac.gradients.rows import all_finite, converted, row_norm
from mfac.interrupts import write_whole
from mfac.model.names import NameTable, named_parameters, shorten


class GradientBuffer:
    """A ring buffer of the last ``num_grads`` gradients, one row of d numbers each.

    Feed it from a training loop with :meth:`append`; rows that are not finite are skipped and counted. The order of the
    rows does not matter to the Fisher, so a full buffer simply overwrites its oldest row. A parameter that has no
    gradient in a batch counts as zeros in that row. Copies and pickles hold the rows; :meth:`state_dict` gives them to
    ``torch.save``.

    Args:
        num_grads: m, the number of rows, >= 1.
        params: Name to parameter (what :func:`mfac.prunable_parameters` returns) or to any tensor of its shape and
            device.
        dtype: torch.float32, or torch.bfloat16 for half the memory; also by its name, ``"bfloat16"``.
        device: Where the rows are; default where the parameters are. ``"cpu"`` for parameters on a GPU that has no room
            for the rows: pinned memory, from which :class:`Fisher` takes them page by page. ``"disk"`` or
            ``"disk:<folder>"`` for a memory-mapped file in the folder for temporary files or another one; it is
            unlinked, so nothing is left behind when the process ends, even if it is killed.

    Attributes:
        names: Names of the parameters, in the order of the columns; canonical ones from the first use with a model on.
        storage: Where the rows are kept: a device, or the folder of the memory-mapped file.
        skipped: How many gradients were refused because they held NaN or infinity.
        reached: Names of the parameters that have had a gradient (not None) since the buffer was made or cleared.
        version: Increases with every change of the rows.
        loss: Mean loss of the batches of the last :func:`mfac.collect_gradients`; NaN before.
        samples: Mean samples of those batches (size of the first dimension); NaN before.

    Raises:
        TypeError: If ``params`` is not a mapping of tensors of real floating-point numbers, ``num_grads`` no int, or
            ``dtype`` another type.
        ValueError: If ``num_grads`` < 1, ``params`` is empty, the parameters are on several devices, or ``device`` is
            none of the above.
        MemoryError: If the rows do not fit; the message says what would.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> buffer = GradientBuffer(8, {"weight": model.weight})
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> buffer.append(model)
        True
        >>> buffer.shape, round(buffer.mean_square, 6)
        ((1, 6), 1.0)
    """

    def __init__(
        self,
        num_grads: int,
        params: Mapping[str, Tensor],
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the rows."""
        num_grads = check_int("num_grads", num_grads)
        check_instance("params", params, Mapping, "a mapping of names to parameters")
        if not params:
            raise ValueError("params: expected at least one parameter, got none")
        for name, p in params.items():
            check_instance(f"params[{name!r}]", p, Tensor, "a tensor")
            check_real(f"params[{name!r}]", p)
        dtype = check_dtype("dtype", dtype)
        devices = {p.device for p in params.values()}
        if len(devices) > 1:
            raise ValueError(f"params: expected on one device, got {', '.join(sorted(map(str, devices)))}")
        home = devices.pop()
        self.storage = check_grads_device("device", device, home)
        self.names = list(params)
        self._shapes = [p.shape for p in params.values()]
        self._sizes = [p.numel() for p in params.values()]
        self._pinned = home.type == "cuda" and self.storage == torch.device("cpu")
        self._rows = allocate_rows(num_grads, self._width(), dtype, self.storage, self._pinned)
        with torch.inference_mode(False):
            self._norms = torch.zeros(num_grads, dtype=torch.float64, device=self._rows.device)
        self.version = 0
        self.clear()

    def _width(self) -> int:
        """Columns that are kept here."""
        return sum(self._sizes)

    @property
    def tensor(self) -> Tensor:
        """The rows filled so far, [m, d], a view; not to be written."""
        return self._rows[: self._filled]

    @property
    def num_grads(self) -> int:
        """Rows that the buffer holds when full."""
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows filled so far, d)."""
        return self._filled, sum(self._sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are; the CPU for a memory-mapped file."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Memory of the whole buffer, in bytes."""
        return self._rows.numel() * self._rows.element_size()

    @property
    def mean_square(self) -> float:
        """Mean of the squares of all gradients, from norms that are kept row by row; NaN without rows."""
        if not self._filled:
            return math.nan
        return float(self._norms[: self._filled].square().sum() / (self._filled * sum(self._sizes)))

    def mean(self, newest: int | None = None) -> Tensor:
        """Return the mean of the newest rows.

        Args:
            newest: How many; None: all.

        Returns:
            [d] float32, where the rows are.

        Raises:
            ValueError: If there are fewer.
        """
        count = check_int("newest", self._filled if newest is None else newest, 1, self._filled)
        total = torch.zeros(self._rows.shape[1], device=self.device)
        for back in range(1, count + 1):
            total += self._rows[(self._next - back) % self.num_grads]
        return total / count

    @property
    def unreached(self) -> list[str]:
        """Names of the parameters that have never had a gradient, in the order of the columns."""
        return [name for name in self.names if name not in self.reached]

    def __len__(self) -> int:
        """Return the rows filled so far."""
        return self._filled

    def __repr__(self) -> str:
        """Return shape, type and memory."""
        return (
            f"{type(self).__name__}({self._filled} of {self.num_grads} gradients, d={self.shape[1]}, {self.dtype}, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.skipped} skipped)"
        )

    def clear(self) -> None:
        """Forget all rows, the count of skipped ones and which parameters have had a gradient."""
        self._next = self._filled = self.skipped = 0
        self.reached: set[str] = set()
        self.loss = self.samples = math.nan
        self.version += 1

    def append(self, model: nn.Module, scale: float | Tensor | torch.amp.GradScaler = 1.0) -> bool:
        """Copy the ``.grad`` of the model's parameters into the next row; call it after ``backward()``.

        Args:
            model: The module whose parameters the buffer was made for (or a copy of it).
            scale: Divide the gradients by this number > 0: a float, a 0-d tensor, or a GradScaler, whose current
                scale is used.

        Returns:
            True if the row was stored, False if it was skipped because it is not finite.

        Raises:
            TypeError: If ``scale`` is not a number.
            ValueError: If a parameter is missing, none of them has a gradient, or ``scale`` is not finite or not > 0.

        Example:
            With a GradScaler, before ``scaler.unscale_(optimizer)`` and ``scaler.step(optimizer)``:

            >>> model = torch.nn.Linear(3, 2)
            >>> buffer = GradientBuffer(8, {"weight": model.weight})
            >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            >>> scaler.scale(model(torch.ones(1, 3)).sum()).backward()
            >>> buffer.append(model, scale=scaler)
            True
            >>> buffer.tensor[0, 0].item()
            1.0

            With the losses of k = 4 micro-batches summed (not with their mean, which needs no scale):

            >>> model.zero_grad()
            >>> for _ in range(4):
            ...     model(torch.ones(1, 3)).sum().backward()
            >>> buffer.append(model, scale=4)
            True
            >>> buffer.tensor[1, 0].item()
            1.0
        """
        scale = check_scale(scale)
        params = named_parameters(model)
        if not params.keys() >= set(self.names):
            self.use_names_of(model)
        grads = [params[name].grad for name in self.names]
        if all(grad is None for grad in grads):
            raise ValueError(
                f"model: expected a gradient for {shorten(self.names)}, got None; call backward() before append()"
            )
        return self.append_gradients(grads, scale)

    def use_names_of(self, model: nn.Module) -> None:
        """Take over the canonical names of a model, if the buffer was made with names of a wrapped one.

        Args:
            model: The module whose parameters the buffer was made for.

        Raises:
            ValueError: If it has no parameter of a name; nothing is changed.

        Example:
            >>> model = torch.nn.DataParallel(torch.nn.Linear(3, 2, bias=False))
            >>> buffer = GradientBuffer(8, dict(model.named_parameters()))
            >>> buffer.names
            ['module.weight']
            >>> buffer.use_names_of(model)
            >>> buffer.names
            ['weight']
        """
        table, names = NameTable.of_model(model), []
        for name in self.names:
            found = table.find(name, "buffer")
            if not found:
                raise ValueError(f"model: expected a parameter {name!r}, got none of that name")
            names += found
        if len(set(names)) < len(names):
            raise ValueError(f"buffer: expected one entry per parameter, got {shorten(self.names)}")
        self.reached = {new for old, new in zip(self.names, names, strict=True) if old in self.reached}
        self.names = names

    def append_gradients(
        self, grads: Sequence[Tensor | None], scale: float | Tensor | torch.amp.GradScaler = 1.0
    ) -> bool:
        """Copy one gradient, given as a tensor per parameter in the order of ``names``, into the next row.

        Args:
            grads: Tensors of the parameters' shapes; None counts as zeros.
            scale: Divide them by this number, as for :meth:`append`.

        Returns:
            True if the row was stored, False if it was skipped because it is not finite.

        Raises:
            TypeError: If one is neither a tensor nor None, or complex, or ``scale`` is not a number.
            ValueError: If the number of tensors or a shape is wrong, or ``scale`` is not finite or not > 0.
            KeyboardInterrupt: If it comes in between; the row is complete or untouched.
        """
        parts = self._checked(grads, check_scale(scale))
        if parts is None:
            self.skipped += 1
            return False
        write_whole(partial(self._store, self._next, parts))  # half of a copy would mix two gradients
        return True

    def append_round(
        self,
        compute: Callable[[], tuple[Sequence[Tensor | None], float, float]],
        wanted: int,
        skip: Callable[[], Any] = lambda: None,
    ) -> list[tuple[float, float]]:
        """Append the gradient of a batch; of several processes, that of one batch of each.

        Args:
            compute: Returns a gradient as for :meth:`append_gradients`, and two numbers that come with it.
            wanted: At most so many rows, at least 1.
            skip: Called on a rank whose gradient is not wanted, in place of ``compute``.

        Returns:
            The two numbers of each row that was stored.
        """
        grads, *numbers = compute()
        return [tuple(numbers)] if self.append_gradients(grads) else []

    def agree(self) -> None:
        """Share with other processes which parameters have had a gradient; nothing to do in one process."""

    def _checked(self, grads: Sequence[Tensor | None], scale: float = 1.0) -> list[Tensor | None] | None:
        """Return a gradient as it is stored, or None if it is not finite."""
        if len(grads) != len(self.names):
            raise ValueError(f"grads: expected {len(self.names)} tensors, got {len(grads)}")
        for name, shape, grad in zip(self.names, self._shapes, grads, strict=True):
            if grad is None:
                continue
            check_instance("grads", grad, Tensor, f"a tensor for {name!r}")
            if grad.is_complex():  # of whose numbers a row would hold the real parts only
                check_real(f"grads[{name!r}]", grad)
            if grad.shape != shape:
                raise ValueError(f"grads: expected shape {list(shape)} for {name!r}, got {list(grad.shape)}")
        grads = [None if grad is None else whole(grad) for grad in grads]
        self.reached.update(name for name, grad in zip(self.names, grads, strict=True) if grad is not None)
        parts = [None if grad is None else converted(grad, scale, self.dtype) for grad in grads]
        return parts if all_finite([part for part in parts if part is not None]) else None

    def _store(self, index: int, parts: Sequence[Tensor | None]) -> None:
        row = self._rows[index]
        for target, part in zip(row.split(self._sizes), parts, strict=True):
            if part is None:
                target.zero_()
            else:
                target.copy_(part.reshape(-1))
        self._count(index, row_norm(row))

    def _count(self, index: int, norm: Tensor | float) -> None:
        """Take note of a row that was written."""
        self._norms[index] = norm
        self._next, self._filled = (index + 1) % self.num_grads, max(self._filled, index + 1)
        self.version += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the whole content; ``rows`` share the memory of a full buffer, as a module's state does."""
        return {
            "names": list(self.names),
            "shapes": [list(shape) for shape in self._shapes],
            "num_grads": self.num_grads,
            "rows": self._content(),
            "next": self._next,
            "skipped": self.skipped,
            "reached": sorted(self.reached),
            "loss": self.loss,
            "samples": self.samples,
        }

    def _content(self) -> Tensor:
        """The rows as they are saved: a file holds the whole memory of a view, also rows that were never written."""
        return self.tensor if self._filled == self.num_grads else self.tensor.clone()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the content of another buffer for the same parameters.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            TypeError: If it is not a mapping, or a value is of the wrong type.
            ValueError: If a key is missing, names, shapes, ``num_grads``, type or shape of the rows are others, or a
                value is out of range; nothing is changed.
        """
        state = check_state(state, self.names, self._shapes, self.num_grads, self.dtype)
        rows = state["rows"]
        self._filled = len(rows)
        self.tensor.copy_(rows)
        for index, row in enumerate(self.tensor):
            self._norms[index] = row_norm(row)
        self.names, self._next, self.skipped, self.reached = (
            state[key] for key in ("names", "next", "skipped", "reached")
        )
        self.loss, self.samples = state["loss"], state["samples"]
        self.version += 1

    def __getstate__(self) -> dict[str, Any]:
        # The rows are allocated anew where this one is: a copied tensor would be neither pinned nor a file.
        return {**self.__dict__, "_rows": self._content(), "_num_grads": self.num_grads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        rows, num_grads = state.pop("_rows"), state.pop("_num_grads")
        self.__dict__.update(state)
        self.names, self.reached = list(self.names), set(self.reached)
        with torch.inference_mode(False):
            self._norms = self._norms.clone()
        self._rows = allocate_rows(num_grads, rows.shape[1], rows.dtype, self.storage, self._pinned)
        self.tensor.copy_(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientBuffer:
        """Copy the rows once, into memory of the same kind."""
        new = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__())
        return new
