"""Gradients for the Fisher: a ring of rows that a training loop or :func:`mfac.collect_gradients` fills."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mfac.model.names import named_parameters


class GradientBuffer:
    """A ring of the last ``num_grads`` gradients, one row of d numbers each.

    Feed it from a training loop with :meth:`append`; rows that are not finite are skipped and counted. The order of the
    rows does not matter to the Fisher, so a full ring simply overwrites its oldest row.

    Args:
        num_grads: m, the number of rows, >= 1.
        params: Name to parameter (what :func:`mfac.prunable_parameters` returns) or to any tensor of its shape and
            device.
        dtype: torch.float32, or torch.bfloat16 for half the memory.
        device: Where the rows are; default where the parameters are. ``"cpu"`` for parameters on a GPU that has no room
            for the rows: pinned memory, from which :class:`Fisher` takes them page by page.

    Attributes:
        names: Names of the parameters, in the order of the columns.
        skipped: How many gradients were refused because they held NaN or infinity.
        loss: Mean loss of the batches of the last :func:`mfac.collect_gradients`; NaN before.
        samples: Mean samples of those batches (size of the first dimension); NaN before.

    Raises:
        TypeError: If ``params`` is not a mapping of tensors or ``dtype`` another type.
        ValueError: If ``num_grads`` < 1, ``params`` is empty, or the parameters are on several devices.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> buffer = GradientBuffer(8, {"weight": model.weight})
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> buffer.append(model)
        True
        >>> buffer.shape
        (1, 6)
    """

    def __init__(
        self,
        num_grads: int,
        params: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate the rows."""
        if isinstance(num_grads, bool) or not isinstance(num_grads, int) or num_grads < 1:
            raise ValueError(f"num_grads: expected an int >= 1, got {num_grads!r}")
        if not isinstance(params, Mapping):
            raise TypeError(f"params: expected name -> parameter, got {type(params).__name__}")
        if not params:
            raise ValueError("params: expected at least one parameter, got none")
        for name, p in params.items():
            if not isinstance(p, Tensor):
                raise TypeError(f"params[{name!r}]: expected a tensor, got {type(p).__name__}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        devices = {p.device for p in params.values()}
        if len(devices) > 1:
            raise ValueError(f"params: expected on one device, got {', '.join(sorted(map(str, devices)))}")
        home = devices.pop()
        device = check_grads_device("device", device, home)
        self.names = list(params)
        self.skipped = 0
        self.loss = self.samples = float("nan")
        self._shapes = [p.shape for p in params.values()]
        self._sizes = [p.numel() for p in params.values()]
        self._rows = _allocate(num_grads, sum(self._sizes), dtype, device, device != home and torch.cuda.is_available())
        self._next = 0
        self._filled = 0

    @property
    def tensor(self) -> Tensor:
        """The rows filled so far, [m, d], a view."""
        return self._rows[: self._filled]

    @property
    def num_grads(self) -> int:
        """Rows that the ring holds when full."""
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows filled so far, d)."""
        return self._filled, self._rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Memory of the whole ring, in bytes."""
        return self._rows.numel() * self._rows.element_size()

    def __len__(self) -> int:
        """Return the rows filled so far."""
        return self._filled

    def __repr__(self) -> str:
        """Return shape, type and memory."""
        return (
            f"GradientBuffer({self._filled} of {self.num_grads} gradients, d={self._rows.shape[1]}, {self.dtype}, "
            f"{self.nbytes / 2**20:.1f} MiB, {self.skipped} skipped)"
        )

    def clear(self) -> None:
        """Forget all rows and the count of skipped ones."""
        self._next = self._filled = self.skipped = 0
        self.loss = self.samples = float("nan")

    def append(self, model: nn.Module) -> bool:
        """Copy the ``.grad`` of the model's parameters into the next row; call it after ``backward()``.

        Args:
            model: The module whose parameters the buffer was made for (or a copy of it).

        Returns:
            True if the row was stored, False if it was skipped because it is not finite.

        Raises:
            ValueError: If a parameter is missing or has no gradient.
        """
        params = named_parameters(model)
        grads = []
        for name in self.names:
            if name not in params:
                raise ValueError(f"model: expected a parameter {name!r}, got none of that name")
            if params[name].grad is None:
                raise ValueError(f"model: expected a gradient for {name!r}, got None; call backward() before append()")
            grads.append(params[name].grad)
        return self.append_gradients(grads)

    def append_gradients(self, grads: Sequence[Tensor]) -> bool:
        """Copy one gradient, given as a tensor per parameter in the order of ``names``, into the next row.

        Args:
            grads: Tensors of the parameters' shapes.

        Returns:
            True if the row was stored, False if it was skipped because it is not finite.

        Raises:
            TypeError: If one is not a tensor.
            ValueError: If the number of tensors or a shape is wrong.
        """
        if len(grads) != len(self.names):
            raise ValueError(f"grads: expected {len(self.names)} tensors, got {len(grads)}")
        for name, shape, grad in zip(self.names, self._shapes, grads, strict=True):
            if not isinstance(grad, Tensor):
                raise TypeError(f"grads: expected a tensor for {name!r}, got {type(grad).__name__}")
            if grad.shape != shape:
                raise ValueError(f"grads: expected shape {list(shape)} for {name!r}, got {list(grad.shape)}")
        if not all(torch.isfinite(grad.to(self.dtype)).all() for grad in grads):  # as stored: float64 may overflow
            self.skipped += 1
            return False
        row = self._rows[self._next]
        for part, grad in zip(row.split(self._sizes), grads, strict=True):
            part.copy_(grad.detach().reshape(-1))
        self._next = (self._next + 1) % self.num_grads
        self._filled = min(self._filled + 1, self.num_grads)
        return True


def check_grads_device(name: str, device: torch.device | str | None, home: torch.device) -> torch.device:
    """Check where gradients are to be kept.

    Args:
        name: Of the argument, for the error.
        device: What the user gave.
        home: Where the parameters are.

    Returns:
        The device, with its index.

    Raises:
        ValueError: If it is neither the parameters' device nor the CPU.
    """
    try:
        found = home if device is None else torch.device(device)
    except (RuntimeError, TypeError):  # no name of a device
        found = None
    if found is not None and found.type == "cpu":
        return found
    if found is not None and found.type == home.type and found.index in (None, home.index):
        return home
    wanted = "'cpu', where the model is" if home.type == "cpu" else f"'{home}', where the model is, or 'cpu'"
    raise ValueError(f"{name}: expected {wanted}, got {device!r}")


def _allocate(m: int, d: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    """Memory for [m, d]; pinned if that can be had: torch pins powers of two, up to twice as much as asked for."""
    try:
        return torch.empty(m, d, dtype=dtype, device=device, pin_memory=pinned)
    except RuntimeError as error:
        if not pinned:
            raise
        warnings.warn(f"device: the rows cannot be pinned, copies to the GPU will be slower ({error})", stacklevel=4)
        return torch.empty(m, d, dtype=dtype, device=device)
