"""Memory for the gradients: bytes needed against bytes free, and the allocation."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mfac.checks import warn

HEADROOM = 0.9  # share of the free bytes that gradients may take
GIB = 2**30
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def free_bytes(storage: torch.device | Path) -> int | None:
    """Return the memory that can be allocated now.

    Args:
        storage: A device, or a folder for a memory-mapped file.

    Returns:
        Bytes; None if unknown. For the CPU the minimum of MemAvailable and what the limits of the control groups
        leave, reclaimable file cache counting as free. For CUDA what the driver reports and whole segments that
        torch's allocator holds unused. For a folder the free disk space, or memory if it is a tmpfs.
    """
    if isinstance(storage, Path):
        space = [shutil.disk_usage(storage).free]
        space += [free_bytes(torch.device("cpu"))] if _is_tmpfs(storage) else []
        return min(x for x in space if x is not None)
    if storage.type == "cuda":
        free, _ = torch.cuda.mem_get_info(storage)
        stats = torch.cuda.memory_stats(storage)
        used = ("active_bytes.all.current", "inactive_split_bytes.all.current")
        return free + stats.get("reserved_bytes.all.current", 0) - sum(stats.get(key, 0) for key in used)
    if storage.type == "cpu":
        return min((x for x in [_available(), *_cgroup_free()] if x is not None), default=None)
    return None


def fits(nbytes: int, storage: torch.device | Path) -> bool:
    """Return whether ``nbytes`` fit in the share :data:`HEADROOM` of the free bytes; True if unknown."""
    free = free_bytes(storage)
    return free is None or nbytes <= HEADROOM * free


def check_memory(num_grads: int, d: int, dtype: torch.dtype, storage: torch.device | Path) -> None:
    """Check that a buffer fits where it is to be kept, before it is allocated.

    Args:
        num_grads: m, rows.
        d: Columns.
        dtype: Of the rows.
        storage: A device, or a folder for a memory-mapped file.

    Raises:
        MemoryError: If it takes more than the share :data:`HEADROOM` of the free bytes; the message names what fits.
    """
    need = num_grads * d * dtype.itemsize
    if fits(need, storage):
        return
    free, options = free_bytes(storage), []
    half = num_grads * d * torch.bfloat16.itemsize
    if half < need and fits(half, storage):
        options.append(f"dtype=torch.bfloat16 ({_gib(half)})")
    if storage != torch.device("cpu") and fits(need, torch.device("cpu")):
        options.append("the gradients on the device 'cpu'")
    if not isinstance(storage, Path) and fits(need, Path(tempfile.gettempdir())):
        options.append("on 'disk'")
    fewer = int(HEADROOM * free) // (d * dtype.itemsize)
    if fewer >= 1:
        options.append(f"num_grads={fewer}")
    where = f"in {storage}" if isinstance(storage, Path) else f"on {storage}"
    count = num_grads if num_grads < 2**64 else "2**64 or more"  # Python refuses to print some thousand digits
    raise MemoryError(
        f"grads: expected {_gib(need)} for {count} gradients of {d:,} weights in {dtype}, got {_gib(free)} free "
        f"{where}, {100 * (1 - HEADROOM):.0f} % of it kept in reserve; what fits: "
        f"{', '.join(options) or 'not even one gradient'}"
    )


def allocate_rows(num_grads: int, d: int, dtype: torch.dtype, storage: torch.device | Path, pinned: bool) -> Tensor:
    """Allocate the rows of a buffer, after :func:`check_memory`.

    Args:
        num_grads: m, rows.
        d: Columns.
        dtype: Of the rows.
        storage: A device, or a folder for a memory-mapped file.
        pinned: Pin host memory, if that can be had: torch pins powers of two, up to twice as much as asked for.

    Returns:
        Uninitialized [m, d].

    Raises:
        RuntimeError: If the device refuses.
    """
    nbytes = num_grads * d * dtype.itemsize
    if pinned and not fits(nbytes, storage) and hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()  # torch keeps the pinned memory of a buffer that is gone
    check_memory(num_grads, d, dtype, storage)
    with torch.inference_mode(False):  # a tensor made inside could not be written outside
        if isinstance(storage, Path):
            with tempfile.TemporaryFile(dir=storage) as file:  # without a name; the mapping outlives its descriptor
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))  # a full disk shows here, not as a SIGBUS later
                path = f"/proc/self/fd/{file.fileno()}"
                return torch.from_file(path, shared=True, size=num_grads * d, dtype=dtype, device="cpu").view(
                    num_grads, d
                )
        try:
            if pinned and not fits(1 << (nbytes - 1).bit_length(), storage):
                raise RuntimeError("too little free memory")
            return torch.empty(num_grads, d, dtype=dtype, device=storage, pin_memory=pinned)
        except RuntimeError as error:
            if not pinned:
                raise
            warn(f"device: the rows are not pinned, copies to the GPU will be slower ({error})")
            return torch.empty(num_grads, d, dtype=dtype, device=storage)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.3g} GiB" if nbytes < 2**1000 else "far more than 2**64 bytes"


def _available() -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_free() -> list[int]:
    """Limit minus usage plus reclaimable file cache, for every control group above this process that has a limit."""
    try:
        groups = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            root, names = _CGROUP, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUP / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            try:
                limit, usage = ((group / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, and in a container the path may be that of the host
                continue
            if limit != "max":
                found.append(max(0, int(limit) - int(usage) + int(stat.get(names[2], 0))))
    return found


def _is_tmpfs(folder: Path) -> bool:
    try:
        mounts = [line.split() for line in (_PROC / "self/mounts").read_text().splitlines()]
    except OSError:
        return False
    folder = folder.resolve()
    around = [(len(m[1]), i, m[2]) for i, m in enumerate(mounts) if folder.is_relative_to(m[1])]
    return max(around, default=(0, 0, ""))[2] in ("tmpfs", "ramfs")  # of the innermost, the last one mounted
