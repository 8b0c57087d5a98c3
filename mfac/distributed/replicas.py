"""Processes that hold a copy of one model each, and what they do together."""

from __future__ import annotations

import builtins
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mfac.distributed.shards import whole

_CHUNK = 1 << 20  # numbers of a tensor whose bits are summed at a time


class Replicas:
    """The ranks of a process group, each with a copy of the model; or one process by itself.

    All methods but :meth:`matches` and :meth:`share` are collective (:meth:`phase` only in lockstep): every rank has to
    call them in the same order. An error of one rank is raised by all of them, so that none waits for a rank that has
    given up.

    Args:
        group: A process group that this process belongs to; None: this process by itself.
        lockstep: The model itself is one for all ranks (``fully_shard``), so that they run it together.

    Attributes:
        lockstep: See above.
        rank: Of this process in the group.
        size: Number of processes.
        sent: Bytes that this process has given to the others: one copy for each of them, and what a ring sends for a
            sum; errors not counted.

    Example:
        >>> Replicas(None).together(lambda: (1.0, 2.0), 2)
        [(1.0, 2.0)]
    """

    def __init__(self, group: dist.ProcessGroup | None, lockstep: bool = False) -> None:
        """Nothing is sent yet."""
        self.group, self.lockstep = group, lockstep
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.sent = 0

    def __repr__(self) -> str:
        """Return rank and size."""
        return f"Replicas(rank {self.rank} of {self.size})"

    def matches(self, other: Replicas) -> bool:
        """Return whether others are the same processes, which run the model in the same way."""
        return self._processes() == other._processes() and self.lockstep == other.lockstep

    def _processes(self) -> list[int] | None:
        return None if self.size == 1 else dist.get_process_group_ranks(self.group)

    def together(self, work: Callable[[], Any], count: int = 0) -> list[tuple[float, ...]]:
        """Do some work on every rank, and give each rank's numbers to all.

        Args:
            work: Of this rank; returns ``count`` numbers, or anything if that is 0.
            count: How many numbers.

        Returns:
            The numbers of each rank.

        Raises:
            BaseException: What ``work`` raised. If it did so on other ranks only: an error of the same type, if that
                is a built-in one, else a RuntimeError, whose text begins with the rank.
            RuntimeError: If a rank cannot be reached.
        """
        if self.size == 1:
            result = work()
            return [tuple(result) if count else ()]
        error, numbers = None, [0.0] * count
        try:
            result = work()
            numbers = list(result) if count else []
        except BaseException as raised:  # the others must hear of it
            error = raised
        status = torch.tensor([float(error is not None), *numbers], dtype=torch.float64)
        try:
            rows = [tuple(row) for row in self._gather(status).tolist()]
            if any(row[0] for row in rows):
                self._raise(error)
        except RuntimeError:
            if error is None:
                raise
        if error is not None:  # also if the others cannot be reached any more, as after Ctrl-C, which ends them all
            raise error
        return [row[1:] for row in rows]

    def call(self, work: Callable[[], Any]) -> Any:
        """Return what some work of this rank gives, on all ranks or on none.

        Args:
            work: See :meth:`together`.

        Returns:
            Its result.
        """
        results: list[Any] = []
        self.together(lambda: results.append(work()))
        return results[0]

    def phase(self, work: Callable[[], Any]) -> Any:
        """Do a part of what :meth:`together` does, of ranks that run the model together.

        They may begin its next part, which waits for the others, only when all have ended this one.

        Args:
            work: See :meth:`together`.

        Returns:
            Its result.
        """
        return self.call(work) if self.lockstep else work()

    def _raise(self, own: BaseException | None) -> None:
        """Tell this rank's error, if it has one; else raise that of the first other rank which has one."""
        raised: list[Any] = [None] * self.size
        with self._reachable():
            dist.all_gather_object(raised, own and (type(own).__name__, str(own)), self.group)
        if own is not None:
            return
        rank = next(rank for rank, found in enumerate(raised) if found)
        name, text = raised[rank]
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)) or issubclass(kind, UnicodeError):
            kind, text = RuntimeError, f"{name}: {text}"
        raise kind(f"rank {rank}: {text}")

    def sums(self, work: Callable[[], Sequence[float]], count: int) -> list[float]:
        """Add up the numbers that some work gives on every rank, in the order of the ranks.

        Args:
            work: See :meth:`together`.
            count: See there.

        Returns:
            The sums, the same bits on all ranks.
        """
        return [sum(column) for column in zip(*self.together(work, count), strict=True)]

    def share(self, count: int) -> int:
        """Return this rank's part of a number of batches; the same on all ranks if they run the model together."""
        return -(-count // self.size) if self.lockstep else len(range(self.rank, count, self.size))

    def gather(self, own: Tensor) -> Tensor:
        """Return a tensor of every rank, on the device of this rank's.

        Args:
            own: Of one shape and type on all ranks.

        Returns:
            [size, *shape of own].
        """
        return own[None] if self.size == 1 else self._gather(own, own.device)

    def check_same(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Check that tensors are the same on all ranks, bit for bit.

        Args:
            what: Start of the message.
            tensors: By name; on each rank the same names and shapes.

        Raises:
            ValueError: If one is not.
        """
        if self.size == 1:
            return
        own = torch.stack([_fingerprint(tensor).cpu() for tensor in tensors.values()])
        differing = (self._gather(own) != own).flatten(2).any(2).any(0) if tensors else torch.zeros(0)
        names = [name for name, differs in zip(tensors, differing.tolist(), strict=True) if differs]
        # A rank sees only whether the others differ from itself: all must come to the same end.
        if any(found for (found,) in self.together(lambda: (float(bool(names)),), 1)):
            where = f", of which {names[0]!r} differs between ranks" if names else ", which differ between ranks"
            raise ValueError(f"{what}{where}")

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Check that all ranks have been given the same, before they do anything together.

        Args:
            arguments: By name; on each rank the same names. Of functions, batches and the like only whether there are
                any counts.

        Raises:
            ValueError: If they differ.
        """
        if self.size == 1:
            return
        own = {name: _digest(value) for name, value in arguments.items()}
        digests = self._gather(torch.tensor([_digest(own)])).flatten().tolist()
        if len(set(digests)) == 1:
            return
        found: list[Any] = [None] * self.size
        with self._reachable():
            dist.all_gather_object(found, own, self.group)
        differs = (name for name in own if any(other.get(name) != found[0].get(name) for other in found))
        raise ValueError(
            f"{next(differs, 'arguments')}: expected the same on all {self.size} ranks of the process group, got others"
        )

    def gather_columns(self, own: Tensor, edges: Sequence[int]) -> Tensor:
        """Put the parts of a vector together.

        Args:
            own: [..., d_r], the columns ``edges[rank]`` to ``edges[rank + 1]``.
            edges: [size + 1], from 0 to d.

        Returns:
            [..., d], on the device of ``own``.
        """
        if self.size == 1:
            return own
        widths = [end - begin for begin, end in itertools.pairwise(edges)]
        padded = own.new_zeros(*own.shape[:-1], max(widths))
        padded[..., : own.shape[-1]] = own
        parts = self._gather(padded, own.device)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def add(self, own: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, on its device.

        Args:
            own: Of one shape on all ranks.

        Returns:
            The sum, the same bits on all ranks.
        """
        if self.size == 1:
            return own
        out = own.to(self._home(own), copy=True)
        self.sent += 2 * (self.size - 1) * out.nbytes // self.size
        with self._reachable():
            dist.all_reduce(out, group=self.group)
        return out.to(own.device)

    def exchange_rows(self, row: Tensor | None, senders: Sequence[int], edges: Sequence[int], like: Tensor) -> Tensor:
        """Turn rows by rank into columns by rank: a rank of ``senders`` has a row, every rank gets its columns of all.

        Of d numbers d - d_r leave each sender.

        Args:
            row: [d], of a sender; None on the others.
            senders: Ranks.
            edges: [size + 1], from 0 to d.
            like: A tensor of the rows' type and device.

        Returns:
            [len(senders), d_r], the columns ``edges[rank]`` to ``edges[rank + 1]``, in the order of the senders.
        """
        begin, end = edges[self.rank], edges[self.rank + 1]
        if self.size == 1:
            return row[None, begin:end]
        width, home = like.element_size(), self._home(like)
        out = torch.empty(len(senders) * (end - begin), dtype=like.dtype, device=home)
        sent = torch.empty(0, dtype=like.dtype, device=home) if row is None else row.to(home)
        sizes_in = [width * (b - a) * (row is not None) for a, b in itertools.pairwise(edges)]
        sizes_out = [width * (end - begin) * (rank in senders) for rank in range(self.size)]
        self.sent += sum(sizes_in) - sizes_in[self.rank]
        with self._reachable():  # as bytes: not every backend has bfloat16
            dist.all_to_all_single(
                out.view(torch.uint8), sent.contiguous().view(torch.uint8), sizes_out, sizes_in, self.group
            )
        return out.view(len(senders), end - begin).to(like.device)

    def _gather(self, own: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """[size, *shape of own]."""
        sent = own.to(self._home(own)).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        self.sent += (self.size - 1) * sent.nbytes
        with self._reachable():
            dist.all_gather(parts, sent, self.group)
        return torch.stack(parts).to(device)

    def _home(self, tensor: Tensor) -> torch.device:
        """Where a tensor has to be for a collective: NCCL takes CUDA tensors only, gloo not all of them."""
        backends = str(dist.get_backend_config(self.group))
        if "nccl" in backends and (tensor.is_cuda or "cpu:" not in backends):
            return tensor.device if tensor.is_cuda else torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process_group: expected all {self.size} ranks to take part, but one has stopped or cannot be "
                f"reached ({str(error).splitlines()[0]})"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        """Copies share the group."""
        return self

    def __reduce__(self) -> Any:
        if self.group is None:
            return Replicas, (None,)
        raise TypeError("process_group: cannot be pickled; state_dict() holds what can be saved")


ALONE = Replicas(None)


def shard_edges(d: int, unit: int, size: int) -> list[int]:
    """Cut d columns into one part per rank, as equal as whole units allow.

    Args:
        d: Columns.
        unit: Inner edges are multiples of it.
        size: Ranks.

    Returns:
        [size + 1], from 0 to d.

    Example:
        >>> shard_edges(1000, 64, 3)
        [0, 320, 640, 1000]
    """
    units = -(-d // unit)
    return [min(d, unit * (units * rank // size)) for rank in range(size)] + [d]


def _digest(value: Any) -> int:
    """63 bits that follow from what an argument says: the same in every process."""
    return int.from_bytes(hashlib.sha256(_described(value).encode()).digest()[:8], "big") >> 1


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {_fingerprint(whole(value)).tolist()}"
    if isinstance(value, Mapping):
        return repr(sorted((repr(key), _described(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return repr([_described(item) for item in value])
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
    return repr(value) if plain else "given"


def _fingerprint(tensor: Tensor) -> Tensor:
    """[2] int64, the sum of the bits of each number, and that weighted by position; in wrapping arithmetic."""
    flat = tensor.detach().reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat.view(_INTEGERS[flat.element_size()])
    out = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(flat.split(_CHUNK)):
        bits = chunk.long()
        out[0] += bits.sum()
        out[1] += (bits * torch.arange(1, len(bits) + 1, device=flat.device)).sum() * (2 * number + 1)
    return out


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
