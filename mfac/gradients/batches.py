"""Protocol of a batch: moving it, running the model, the loss, and the context of an evaluation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from mfac.checks import check_function, check_instance
from mfac.distributed.shards import reshard
from mfac.interrupts import write_whole

MODES = ("eval", "train")
Forward = Callable[[nn.Module, Any], Any]


def check_functions(loss_fn: Callable[[Any, Any], Tensor] | None, forward: Forward | None) -> None:
    """Check the functions that turn a batch into a loss.

    Args:
        loss_fn: Loss of (outputs, targets), or None if the outputs have it.
        forward: Function of (model, batch), or None.

    Raises:
        TypeError: If one is neither None nor a function.
    """
    if isinstance(loss_fn, type):
        raise TypeError(f"loss_fn: expected a function or None, got the class {loss_fn.__name__}; make an object of it")
    check_function("loss_fn", loss_fn)
    check_function("forward", forward)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def move_batch(batch: Any, device: torch.device, copies: bool = False) -> Any:
    """Move all tensors of a batch, which stays as it is.

    Args:
        batch: A tree of lists, tuples, dicts, other mappings and dataclasses with tensors, and whatever else has a
            method ``to``, at any depth. The rest is passed through.
        device: Where to.
        copies: Copy tensors that are there already, so that what the loader does with its own does not matter.

    Returns:
        The same tree. Tensors made under ``torch.inference_mode`` are copied, for autograd cannot save them.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            moved = leaf.detach().to(device, copy=True) if copies else leaf.to(device)
            return moved.clone() if moved.is_inference() else moved
        if isinstance(leaf, MutableMapping):  # UserDict and its subclasses, whose own `to` may change them in place
            new = copy.copy(leaf)
            for key, value in leaf.items():
                new[key] = move_batch(value, device, copies)
            return new
        if hasattr(leaf, "to"):
            return (copy.deepcopy(leaf) if copies else leaf).to(device)
        if isinstance(leaf, Mapping):
            return type(leaf)({key: move_batch(value, device, copies) for key, value in leaf.items()})
        new = leaf
        for name, value in _fields(leaf).items():
            moved = move_batch(value, device, copies)
            if moved is not value:
                new = copy.copy(leaf) if new is leaf else new
                object.__setattr__(new, name, moved)  # also of a frozen one
        return new

    return tree_map(move, batch, is_leaf=lambda node: hasattr(node, "to"))


def num_samples(batch: Any) -> int:
    """Return the size of the first dimension of the first tensor of a batch, 1 if there is none."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors at any depth that :func:`move_batch` moves itself."""
    for leaf in tree_leaves(batch, is_leaf=lambda node: hasattr(node, "to")):
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            inner = leaf if isinstance(leaf, Mapping) else _fields(leaf)
            for value in inner.values():
                yield from _tensors(value)


def _fields(leaf: Any) -> dict[str, Any]:
    """The fields of a dataclass by name; none of anything else."""
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return {}
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)}


def run_model(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run a model on a batch.

    Args:
        model: Any module.
        batch: On the model's device.
        forward: Function of (model, batch) in place of the default rule.

    Returns:
        What ``forward`` returns. By default the pair of the outputs and what the loss compares them with:
        ``model(inputs), targets`` for a pair, ``model(**batch), batch`` for a mapping.

    Raises:
        TypeError: If the batch is neither a pair nor a mapping and there is no ``forward``.
    """
    torch.clear_autocast_cache()  # within a block it would go on with the weights as they were before they were written
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch), batch
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return model(batch[0]), batch[1]
    got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (list, tuple)) else type(batch).__name__
    raise TypeError(f"batches: expected pairs (inputs, targets) or dicts without forward=, got {got}")


def batch_loss(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    forward: Forward | None = None,
) -> Tensor:
    """Return the loss of a model on a batch.

    Args:
        model: Any module.
        batch: On the model's device.
        loss_fn: Loss of (outputs, targets). None if the outputs have it, as ``outputs.loss`` or ``outputs["loss"]``.
        forward: Function of (model, batch) that returns (outputs, targets), or with ``loss_fn=None`` the loss itself
            or outputs that have it. Without it see :func:`run_model`.

    Returns:
        A tensor of one element.

    Raises:
        TypeError: If the loss is not a tensor, there is none, or ``forward`` does not return a pair for ``loss_fn``.
        ValueError: If it is not a scalar.
    """
    result = run_model(model, batch, forward)
    if loss_fn is not None:
        if not isinstance(result, Sequence) or len(result) != 2:
            raise TypeError(f"forward: expected a pair (outputs, targets) for loss_fn, got {type(result).__name__}")
        loss = loss_fn(*result)
        source = "loss_fn"
    elif forward is not None and isinstance(result, Tensor):
        loss, source = result, "forward"
    else:
        outputs = result if forward is not None else result[0]
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None:
            raise TypeError(
                f"loss_fn: expected a function, got None and outputs without .loss ({type(outputs).__name__})"
            )
        source = "outputs.loss"
    check_instance(source, loss, Tensor, "a tensor")
    if loss.numel() != 1:
        raise ValueError(f"{source}: expected a scalar, got shape {list(loss.shape)}")
    return loss


@contextmanager
def evaluation(
    model: nn.Module,
    params: Iterable[nn.Parameter] = (),
    mode: str = "eval",
    seed: int | None = None,
    *,
    keep: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Enable gradients and set the mode of a model; restore everything on exit.

    Works under ``torch.no_grad`` and ``torch.inference_mode``. Modes, requires_grad, buffers (bit for bit) and torch's
    random state (CPU and the CUDA devices of the model) are restored.

    Args:
        model: Any module.
        params: Parameters that need gradients; those of the others stay as they are.
        mode: ``"eval"``, or ``"train"``: every module in training mode, BatchNorm with the statistics of the batch.
        seed: Of torch's generators inside; None: they go on from their state.
        keep: Modules whose own buffers keep what is written to them.

    Yields:
        Nothing.
    """
    params, keep = list(params), set(keep)
    modes = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for p in (*model.parameters(), *params)}  # train() of a model may change any
    devices = {x.device.index for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=sorted(devices), device_type="cuda"),
    ):
        owned = [(module, name, b) for module in modes if module not in keep for name, b in module._buffers.items()]
        buffers = [(*owner, owner[2].detach().clone() if _is_writable(owner[2]) else None) for owner in owned]

        def restore() -> None:
            for module, training in modes.items():
                own = getattr(module.train, "__func__", None) is not nn.Module.train  # it may do more than set the mode
                if own and module.training != training:
                    module.train(training)
            for module, training in modes.items():
                module.training = training
            for p, value in required.items():
                if p.requires_grad != value:
                    p.requires_grad_(value)
            for module, name, b, value in buffers:
                if value is not None:
                    with torch.no_grad(), torch.inference_mode(b.is_inference()):
                        b.copy_(value)
                module._buffers[name] = b

        try:
            if seed is not None:
                for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                    generator.manual_seed(seed)
            model.train(mode == "train")
            for p in params:
                p.requires_grad_(True)
            yield
        finally:
            write_whole(restore)
            reshard(model)


def _is_writable(b: Tensor | None) -> bool:
    """Whether a buffer has values that can be written in place: not so if it is expanded or not initialized."""
    if b is None or is_lazy(b):
        return False
    return b.layout != torch.strided or all(b.stride(i) or b.shape[i] <= 1 for i in range(b.dim()))
