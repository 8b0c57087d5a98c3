"""Gradients of a loss that leave the ``.grad`` of every parameter as it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mfac.distributed.shards import is_sharded, no_accumulation
from mfac.interrupts import write_whole

Gradients = tuple[Tensor, Sequence[Tensor | None]]


class Differentiator:
    """Computes the gradients of one batch after another, with torch.autograd.grad where that is possible.

    Reentrant activation checkpointing and custom functions whose backward itself calls ``backward()`` write to
    ``.grad``, which torch.autograd.grad refuses or does not see. If it refuses, or the first batch does not reach all
    parameters, that batch is repeated with ``loss.backward()``, which is used from then on if it reaches more.

    Args:
        model: The ``.grad`` of its parameters is as before after each batch; hooks that run after accumulation (fused
            optimizers) do not run.
        params: Parameters to differentiate with respect to.
        replicated: Whether other processes hold copies of the model: there DistributedDataParallel's hooks would
            average what ``loss.backward()`` computes, so it is not used.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> loss, grads = Differentiator(model, [model.bias])(lambda: 3 * model(torch.ones(1, 2)).sum())
        >>> grads[0].tolist(), model.bias.grad
        ([3.0], None)
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], replicated: bool = False) -> None:
        self._params, self._every = params, list(model.parameters())
        self._devices = sorted({p.device.index for p in self._every if p.device.type == "cuda"})
        self._first, self._replicated = True, replicated
        self._model, self._sharded = model, any(is_sharded(p) for p in params)
        self._by_backward = self._sharded  # whose parts are gathered and reduced by hooks

    def __call__(self, loss_of_batch: Callable[[], Tensor]) -> Gradients:
        """Compute the loss of a batch and its gradients.

        Args:
            loss_of_batch: Runs the model; called again if the batch is repeated.

        Returns:
            The loss, and a gradient per parameter: None for those that are not reached.

        Raises:
            RuntimeError: If torch cannot differentiate the loss.
            ValueError: If it takes ``loss.backward()`` to do so, in a replicated model.
        """
        if self._by_backward:
            return self._backward(loss_of_batch)
        first, self._first = self._first, False
        states = self._random_states() if first else None
        with _kept_grads(self._every):
            loss = loss_of_batch()
            try:
                grads = torch.autograd.grad(loss, self._params, allow_unused=True)
            except RuntimeError as error:
                if "heckpoint" not in str(error) or ".grad()" not in str(error):  # of torch, DeepSpeed, FairScale
                    raise
                grads = None
            elsewhere = any(p.grad is not None for p in self._params)
        missed = grads is None or _count(grads) < len(grads)
        if self._replicated and (grads is None or elsewhere or (first and missed and _nested(loss))):
            raise ValueError(
                "model: expected activation checkpointing with use_reentrant=False on several processes, got reentrant "
                "checkpointing or another backward pass within that of the loss, whose gradients "
                "DistributedDataParallel would average"
            )
        if grads is not None and (self._replicated or not first):
            return loss, grads
        if not missed and not elsewhere:
            return loss, grads
        if states is not None:
            self._set_random_states(states)
        try:
            repeated = self._backward(loss_of_batch)
        except RuntimeError:  # such as too little memory for the gradients of all parameters
            if grads is None or elsewhere:
                raise
            return loss, grads
        self._by_backward = grads is None or elsewhere or _count(repeated[1]) > _count(grads)
        return repeated if self._by_backward else (loss, grads)

    def _backward(self, loss_of_batch: Callable[[], Tensor]) -> Gradients:
        if self._sharded:
            with no_accumulation(self._model):
                return self._backward_here(loss_of_batch)
        return self._backward_here(loss_of_batch)

    def _backward_here(self, loss_of_batch: Callable[[], Tensor]) -> Gradients:
        loss = loss_of_batch()
        with _kept_grads([*self._every, *_leaves(loss)]):
            loss.backward()
            return loss, [p.grad for p in self._params]

    def _random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _set_random_states(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _kept_grads(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within it ``.grad`` is None at first and no hooks run after accumulation; both are restored on exit."""
    saved: list[tuple[Any, Tensor | None, Any]] = [(t, t.grad, t._post_accumulate_grad_hooks) for t in tensors]

    def restore() -> None:
        for tensor, grad, hooks in saved:
            tensor.grad = grad
            if hooks is not None:
                tensor._post_accumulate_grad_hooks = hooks

    try:
        for tensor, _, hooks in saved:
            tensor.grad = None
            if hooks is not None:
                tensor._post_accumulate_grad_hooks = OrderedDict()  # None would leave them in place
        yield
    finally:
        write_whole(restore)


def _count(grads: Sequence[Tensor | None]) -> int:
    return sum(grad is not None for grad in grads)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves of a graph, to which backward() would write: also inputs, and parameters of the loss itself."""
    for node in _nodes(loss):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and variable.is_leaf:
            yield variable


def _nested(loss: Tensor) -> bool:
    """Whether a graph holds reentrant checkpointing, by torch, DeepSpeed or FairScale."""
    return any("CheckpointFunction" in node.name() for node in _nodes(loss))


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The nodes of a graph."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(following for following, _ in node.next_functions)
