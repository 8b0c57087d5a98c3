"""Gradients for the Fisher: a ring of rows that a training loop or :func:`collect_gradients` fills."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfac.parameters import prunable_parameters


class GradientBuffer:
    """A ring of the last ``num_grads`` gradients, one row of d numbers each.

    Feed it from a training loop with :meth:`append`; rows that are not finite are skipped and counted. The order of the
    rows does not matter to the Fisher, so a full ring simply overwrites its oldest row.

    Args:
        num_grads: m, the number of rows, >= 1.
        params: Name to parameter (what :func:`mfac.prunable_parameters` returns) or to any tensor of its shape and
            device.
        dtype: torch.float32, or torch.bfloat16 for half the memory.

    Attributes:
        names: Names of the parameters, in the order of the columns.
        skipped: How many gradients were refused because they held NaN or infinity.

    Raises:
        TypeError: If ``params`` is not a mapping of tensors or ``dtype`` another type.
        ValueError: If ``num_grads`` < 1, ``params`` is empty, or the parameters are on several devices.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> buffer = GradientBuffer(8, prunable_parameters(model))
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> buffer.append(model)
        True
        >>> buffer.shape
        (1, 6)
    """

    def __init__(self, num_grads: int, params: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
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
        self.names = list(params)
        self.skipped = 0
        self._shapes = [p.shape for p in params.values()]
        self._sizes = [p.numel() for p in params.values()]
        self._rows = torch.empty(num_grads, sum(self._sizes), dtype=dtype, device=devices.pop())
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

    def append(self, model: nn.Module) -> bool:
        """Copy the ``.grad`` of the model's parameters into the next row; call it after ``backward()``.

        Args:
            model: The module whose parameters the buffer was made for (or a copy of it).

        Returns:
            True if the row was stored, False if it was skipped because it is not finite.

        Raises:
            ValueError: If a parameter is missing or has no gradient.
        """
        params = dict(model.named_parameters())
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


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    num_grads: int,
    *,
    params: str | Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> GradientBuffer:
    """Collect one gradient per batch, with the model in eval mode.

    Batches of some 32 samples give far better joint updates than single samples. The model's mode, requires_grad,
    ``.grad`` and torch's random state are as before when this returns or raises. So a loader that shuffles
    gives the same batches again at the next call, unless the random state has moved on in between; pass an iterator
    (kept between the calls) to go on where you stopped.

    Args:
        model: Any module.
        batches: Iterable of ``(inputs, targets)``, for ``loss_fn(model(inputs), targets)``, or of dicts, for
            ``loss_fn(model(**batch), batch)``; tensors are moved to the model's device. One that ends before
            ``num_grads`` batches is started again, with a warning.
        loss_fn: Returns a scalar.
        num_grads: m, the number of gradients, >= 1.
        params: Parameters to collect for; see :func:`mfac.prunable_parameters`.
        dtype: torch.float32, or torch.bfloat16 for half the memory.
        progress: Show a progress bar.

    Returns:
        A full buffer. Gradients that are not finite are replaced by those of further batches and counted in
        ``skipped``.

    Raises:
        TypeError: If ``batches`` cannot be iterated, ``loss_fn`` called, a batch is neither a pair nor a dict, or the
            loss is not a tensor.
        ValueError: If ``num_grads`` < 1, ``batches`` is empty or an iterator that ends early, the loss is not a
            scalar, as many gradients are not finite as were asked for, or the loss does not depend on one of the
            parameters.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(16)]
        >>> collect_gradients(model, batches, torch.nn.functional.cross_entropy, 16).shape
        (16, 8)
    """
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {loss_fn!r}")
    chosen = prunable_parameters(model, params)
    buffer = GradientBuffer(num_grads, chosen, dtype)
    source = cycle(batches, num_grads)
    reached = set()
    with _evaluation(model, chosen.values()), tqdm(total=num_grads, desc="gradients", disable=not progress) as bar:
        while len(buffer) < num_grads:
            grads = torch.autograd.grad(_loss(model, next(source), loss_fn), list(chosen.values()), allow_unused=True)
            reached.update(name for name, grad in zip(chosen, grads, strict=True) if grad is not None)
            full = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen.values(), grads, strict=True)]
            if buffer.append_gradients(full):
                bar.update()
            elif buffer.skipped >= max(num_grads, 16):
                raise ValueError(
                    f"batches: {buffer.skipped} gradients are not finite, only {len(buffer)} are; is the model or its "
                    "input NaN?"
                )
    for name in chosen:
        if name not in reached:
            raise ValueError(f"params: the loss does not depend on {name!r}; leave it out of params")
    return buffer


def cycle(batches: Iterable[Any], announce: int | None = None) -> Iterator[Any]:
    """Go through the batches for ever.

    Args:
        batches: Any iterable; an iterator (which cannot be started again) may serve once.
        announce: Warn at the first restart, naming this number of batches as the one asked for.

    Yields:
        The batches.

    Raises:
        ValueError: If there are none, or an iterator ends.
    """
    announced = announce is None
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0 or isinstance(batches, Iterator):
            wanted = "more" if announce is None else f"{announce} gradients or more"
            raise ValueError(
                f"batches: expected batches for {wanted}, got {count or 'none'} left; pass a list or DataLoader"
            )
        if not announced:
            warnings.warn(f"batches: {count} batches for {announce} gradients; they are used again", stacklevel=3)
            announced = True


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Tensor:
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        batch = {key: _to(value, device) for key, value in batch.items()}
        loss = loss_fn(model(**batch), batch)
    elif isinstance(batch, Sequence) and len(batch) == 2:
        inputs, targets = (_to(value, device) for value in batch)
        loss = loss_fn(model(inputs), targets)
    else:
        raise TypeError(f"batches: expected pairs (inputs, targets) or dicts, got {type(batch).__name__}")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn: expected a scalar, got shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn: expected a loss that depends on the parameters, got a constant (detached?) one")
    return loss


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _evaluation(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Eval mode with gradients for ``params``; mode, requires_grad and random state are put back on the way out."""
    modes = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for p in params}
    devices = {p.device.index for p in required if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
        try:
            model.eval()
            for p in required:
                p.requires_grad_(True)
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for p, value in required.items():
                p.requires_grad_(value)
