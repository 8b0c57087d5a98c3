"""Several processes, started by torchrun, that train one model together."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mfac.distributed.replicas import ALONE, Replicas

_FAILED = "mfac/failed"  # in the store: how many processes have ended with an error
_store: dist.Store | None = None


def count() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Return the rank of this process among them."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def _local_rank() -> int:
    """Return the rank among those of this machine."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


def find_device(name: str | None) -> torch.device:
    """Return the device of an option.

    Args:
        name: cpu, cuda or cuda:N; None: cuda if there is one. With several processes, cuda is the GPU of this one.

    Returns:
        The device.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:<index>, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, because CUDA is not available, got {name}")
    if device.type != "cuda" or count() == 1:
        return device
    if device.index is not None:
        raise ValueError(f"device: expected cpu or cuda with several processes, each on a GPU of its own, got {name}")
    if _local_rank() >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a GPU for each of the {os.environ['LOCAL_WORLD_SIZE']} processes of this machine, got "
            f"{torch.cuda.device_count()}"
        )
    device = torch.device("cuda", _local_rank())
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has; standard output is then that of rank 0 only.

    After an error the group is left as it is: the others may wait in it until this process has ended.

    Raises:
        BaseException: What ends the block.
    """
    global _store
    if count() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _store, own, size = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(backend, store=_store, rank=own, world_size=size)
    if own == 0:
        yield
    else:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    dist.barrier()  # none tears the group down while another still uses it
    gc.collect()  # objects in cycles that hold the group, as DistributedDataParallel: threads of it would outlive it
    dist.destroy_process_group()


def first_to_fail() -> bool:
    """Return whether no other process has asked this before: only the first to fail says why, the others follow it."""
    if _store is None:
        return True
    try:
        return _store.add(_FAILED, 1) == 1
    except RuntimeError:  # the process that held the store has ended
        return False


def team() -> Replicas:
    """Return the processes that are joined; this one by itself without torchrun."""
    return Replicas(dist.group.WORLD) if count() > 1 else ALONE


@contextmanager
def one_first(replicas: Replicas) -> Iterator[None]:
    """Run the block in the first process of each machine, and in the others after it.

    What it downloads or trains and keeps in a file is then there for the others.

    Args:
        replicas: From :func:`team`.

    Yields:
        Nothing.
    """
    if _local_rank():
        wait(replicas)
    yield
    if not _local_rank():
        wait(replicas)


def wait(replicas: Replicas) -> None:
    """Wait until all processes are here.

    Args:
        replicas: From :func:`team`.
    """
    replicas.together(lambda: None)


def distribute(model: nn.Module, replicas: Replicas) -> nn.Module:
    """Return a model that averages its gradients over the processes, all of which get the weights of rank 0.

    Args:
        model: The same on all, with all parameters that training may change trainable.
        replicas: From :func:`team`.

    Returns:
        The model in DistributedDataParallel; the model itself if there is one process.
    """
    if replicas.size == 1:
        return model
    # find_unused_parameters: a recipe may freeze some on the way. And without it torch arranges the gradients anew
    # after the first step: a run that goes on would add them up in another order than one that was left alone.
    return DistributedDataParallel(_Trained(model), process_group=replicas.group, find_unused_parameters=True)


class _Trained(nn.Module):
    """A model, and a parameter without use: torch warns, in C++, of find_unused_parameters where there is none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(next(model.parameters()).detach().new_zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def undistributed(model: nn.Module) -> tuple[nn.Module, Replicas]:
    """Return what :func:`distribute` was given, or the model itself.

    Args:
        model: From :func:`distribute`, or another.

    Returns:
        The model, and the processes that train it.
    """
    return (model.module.model, team()) if isinstance(model, DistributedDataParallel) else (model, ALONE)


def share_buffers(model: nn.Module, replicas: Replicas) -> None:
    """Give all processes the buffers of rank 0, such as the statistics of BatchNorm, which each has of its own batches.

    Args:
        model: The model without DistributedDataParallel, which does so before each forward pass of training.
        replicas: From :func:`team`.
    """
    if replicas.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0, group=replicas.group)
