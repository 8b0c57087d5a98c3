"""Gradients of batches: :func:`collect_gradients`, and a source of them for a model that is pruned step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfac.gradients.buffer import GradientBuffer
from mfac.model.targets import prunable_parameters


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    num_grads: int,
    *,
    params: str | Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    buffer: GradientBuffer | None = None,
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
        device: Where the gradients are kept; see :class:`GradientBuffer`.
        buffer: A buffer to go on with, in place of the three before: its oldest rows are overwritten.
        progress: Show a progress bar.

    Returns:
        The buffer, with ``num_grads`` new rows. Gradients that are not finite are replaced by those of further
        batches and counted in ``skipped``.

    Raises:
        TypeError: If ``batches`` cannot be iterated, ``loss_fn`` called, a batch is neither a pair nor a dict, or the
            loss is not a tensor.
        ValueError: If ``num_grads`` < 1 or more than ``buffer`` has rows, ``batches`` is empty or an iterator that
            ends early, the loss is not a scalar, as many gradients are not finite as were asked for, or the loss does
            not depend on one of the parameters.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(16)]
        >>> collect_gradients(model, batches, torch.nn.functional.cross_entropy, 16).shape
        (16, 8)
    """
    _check_source(batches, loss_fn)
    if buffer is None:
        chosen = prunable_parameters(model, params)
        buffer = GradientBuffer(num_grads, chosen, dtype, device)
    else:
        if not isinstance(buffer, GradientBuffer):
            raise TypeError(f"buffer: expected a GradientBuffer, got {type(buffer).__name__}")
        if params is not None:
            raise ValueError("params: expected None with a buffer, which has its own")
        chosen = prunable_parameters(model, buffer.names)
        _check_num_grads(num_grads)
        if num_grads > buffer.num_grads:
            raise ValueError(f"num_grads: expected at most the {buffer.num_grads} rows of the buffer, got {num_grads}")
    source = cycle(batches, num_grads)
    reached, losses, samples, skipped = set(), [], [], buffer.skipped
    with _evaluation(model, chosen.values()), tqdm(total=num_grads, desc="gradients", disable=not progress) as bar:
        while len(losses) < num_grads:
            batch = next(source)
            loss = _loss(model, batch, loss_fn)
            grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
            reached.update(name for name, grad in zip(chosen, grads, strict=True) if grad is not None)
            full = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen.values(), grads, strict=True)]
            if buffer.append_gradients(full):
                losses.append(float(loss.detach()))
                samples.append(_samples(batch))
                bar.update()
            elif buffer.skipped - skipped >= max(num_grads, 16):
                raise ValueError(
                    f"batches: {buffer.skipped - skipped} gradients are not finite, only {len(losses)} are; is the "
                    "model or its input NaN?"
                )
    buffer.loss, buffer.samples = sum(losses) / num_grads, sum(samples) / num_grads
    for name in chosen:
        if name not in reached:
            raise ValueError(f"params: the loss does not depend on {name!r}; leave it out of params")
    return buffer


def cycle(batches: Iterable[Any], announce: int | None = None) -> Iterator[Any]:
    """Go through the batches for ever.

    Args:
        batches: Any iterable; an iterator (which cannot be started again) may serve once.
        announce: Warn at the first restart if there were fewer batches than this, the number asked for.

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
        if not announced and count < announce:
            warnings.warn(f"batches: {count} batches for {announce} gradients; they are used again", stacklevel=3)
            announced = True


def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Run a model on a batch, moved to its device.

    Args:
        model: Any module.
        batch: (inputs, targets), or a dict of keyword arguments.

    Returns:
        The outputs, and what the loss compares them with.

    Raises:
        TypeError: If the batch is neither.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        batch = {key: _to(value, device) for key, value in batch.items()}
        return model(**batch), batch
    if isinstance(batch, Sequence) and len(batch) == 2:
        inputs, targets = (_to(value, device) for value in batch)
        return model(inputs), targets
    raise TypeError(f"batches: expected pairs (inputs, targets) or dicts, got {type(batch).__name__}")


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor], differentiable: bool = True) -> Tensor:
    loss = loss_fn(*forward(model, batch))
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn: expected a scalar, got shape {list(loss.shape)}")
    if differentiable and not loss.requires_grad:
        raise ValueError("loss_fn: expected a loss that depends on the parameters, got a constant (detached?) one")
    return loss


def _samples(batch: Any) -> int:
    """Size of the first dimension of the first tensor, 1 if there is none."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


def mean_loss(
    model: nn.Module, batches: Iterator[Any], loss_fn: Callable[[Any, Any], Tensor], num_batches: int
) -> float:
    """Measure the loss in eval mode; modes and random state are as before afterwards.

    Args:
        model: Any module.
        batches: As for :func:`collect_gradients`.
        loss_fn: As there.
        num_batches: How many to draw.

    Returns:
        The mean over the batches.
    """
    with _evaluation(model, model.parameters()), torch.no_grad():
        return sum(float(_loss(model, next(batches), loss_fn, False)) for _ in range(num_batches)) / num_batches


class GradientSource:
    """Batches gone through again and again, as gradients of a model that changes meanwhile.

    A loader that shuffles draws from torch's random state, which :func:`collect_gradients` puts back: every
    collection would see the same batches. Here each has a seed of its own, which follows from torch's seed when the
    source was made.

    Args:
        batches: Iterable of batches.
        loss_fn: Loss of (outputs, targets).
        num_grads: m, rows of the Fisher.
        refresh: How many of them are renewed from the second collection on, in [1, m]; None for all.
        dtype: Of the rows.
        device: Where they are; see :class:`GradientBuffer`.
        announce: Warn if there are fewer batches than ``num_grads``.

    Attributes:
        batches: The endless iterator.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
        num_grads: int,
        refresh: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        announce: bool = False,
    ) -> None:
        """Check the arguments."""
        _check_source(batches, loss_fn)
        _check_num_grads(num_grads)
        if refresh is not None and (isinstance(refresh, bool) or not isinstance(refresh, int)):
            raise TypeError(f"refresh: expected an int or None, got {refresh!r}")
        if refresh is not None and not 1 <= refresh <= num_grads:
            raise ValueError(f"refresh: expected 1 to num_grads = {num_grads}, got {refresh}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
        self.num_grads, self.refresh, self.dtype = num_grads, refresh or num_grads, dtype
        self.device = device
        self._loss_fn = loss_fn
        self.batches = cycle(batches, num_grads if announce else None)
        self._random = torch.Generator().manual_seed(torch.initial_seed())
        self._buffer: GradientBuffer | None = None

    def collect(self, model: nn.Module, params: list[str], progress: bool = False) -> GradientBuffer:
        """Return the ring after renewing its rows: all at first, then ``refresh``.

        Args:
            model: The model as it is now.
            params: Names of its parameters.
            progress: Show a progress bar.

        Returns:
            A full buffer, the same one each time.
        """
        count = self.num_grads if self._buffer is None else self.refresh
        with self._seeded():
            self._buffer = collect_gradients(
                model, self.batches, self._loss_fn, count,
                params=params if self._buffer is None else None, dtype=self.dtype, device=self.device,
                buffer=self._buffer, progress=progress,
            )  # fmt: skip
        return self._buffer

    def loss(self, model: nn.Module, num_batches: int) -> float:
        """Return the mean loss over new batches, in eval mode."""
        with self._seeded():
            return mean_loss(model, self.batches, self._loss_fn, num_batches)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        seed = int(torch.randint(2**62, (), generator=self._random))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield

    def release(self) -> None:
        """Free the ring: all rows are new at the next collection."""
        self._buffer = None

    def get_state(self) -> Tensor:
        """Return the random state."""
        return self._random.get_state()

    def set_state(self, state: Tensor) -> None:
        """Restore the random state."""
        self._random.set_state(state.cpu())  # wherever the file was loaded to


def _check_source(batches: Iterable[Any], loss_fn: Callable[[Any, Any], Tensor]) -> None:
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {loss_fn!r}")


def _check_num_grads(num_grads: int) -> None:
    if isinstance(num_grads, bool) or not isinstance(num_grads, int) or num_grads < 1:
        raise ValueError(f"num_grads: expected an int >= 1, got {num_grads!r}")


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
