"""Bytes needed against bytes free."""

from pathlib import Path

import pytest
import torch

from mfac import GradientBuffer, collect_gradients
from mfac.gradients import memory

CPU, CUDA, DISK = torch.device("cpu"), torch.device("cuda", 0), Path("/data")


def kind(place):
    return "disk" if isinstance(place, Path) else place.type


@pytest.mark.parametrize(
    ("place", "free", "options"),
    [
        (CUDA, {"cuda": 223, "cpu": 0, "disk": 0}, "dtype=torch.bfloat16 (1.86e-07 GiB), num_grads=5"),
        (CUDA, {"cuda": 222, "cpu": 0, "disk": 0}, "num_grads=4"),
        (CUDA, {"cuda": 100, "cpu": 450, "disk": 0}, "the gradients on the device 'cpu', num_grads=2"),
        (CUDA, {"cuda": 100, "cpu": 440, "disk": 450}, "on 'disk', num_grads=2"),
        (CUDA, {"cuda": 20, "cpu": 450, "disk": 450}, "the gradients on the device 'cpu', on 'disk'"),
        (CPU, {"cpu": 223, "disk": 450}, "dtype=torch.bfloat16 (1.86e-07 GiB), on 'disk', num_grads=5"),
        (CPU, {"cpu": 20, "disk": 20}, "not even one gradient"),
        (DISK, {"cpu": 450, "disk": 100}, "the gradients on the device 'cpu', num_grads=2"),
    ],
)
def test_refusals_name_what_really_fits(monkeypatch, place, free, options):
    """10 gradients of 10 weights in float32 are 400 bytes; a tenth of what is free is kept in reserve."""
    monkeypatch.setattr(memory, "free_bytes", lambda place: free[kind(place)])
    with pytest.raises(MemoryError) as error:
        memory.check_memory(10, 10, torch.float32, place)
    text = str(error.value)
    assert text.startswith("grads: expected 3.73e-07 GiB for 10 gradients of 10 weights in torch.float32, got ")
    assert f"free {'in /data' if place == DISK else f'on {place}'}, 10 % of it kept in reserve" in text
    assert text.endswith(f"what fits: {options}")


@pytest.mark.parametrize("num_grads", [10**400, 10**5000], ids=["400", "5000"])
def test_counts_beyond_all_floats(num_grads):
    with pytest.raises(
        MemoryError, match=r"expected far more than .* bytes for .* gradients of 8 weights .* what fits: "
    ):
        GradientBuffer(num_grads, {"w": torch.zeros(8)})
    with pytest.raises(MemoryError, match="far more than"):
        collect_gradients(torch.nn.Linear(4, 2), [(torch.ones(1, 4),)], num_grads=num_grads)


def test_what_fits(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda place: 445)
    memory.check_memory(10, 10, torch.float32, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda place: None)
    memory.check_memory(10**9, 10**9, torch.float32, CPU)  # unknown


def test_free_bytes_here(tmp_path):
    assert 2**20 < memory.free_bytes(CPU) < 2**50
    assert 0 < memory.free_bytes(tmp_path) < 2**60
    assert memory.free_bytes(torch.device("meta")) is None
    assert not memory.fits(2**60, CPU)


def write(folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8000 * 1024),
        (
            {  # version 2: the limit of a group above counts too, file cache is reclaimable
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/b/memory.current": "500\n",
                "cgroup/a/b/memory.stat": "anon 1\ninactive_file 100\n",
                "cgroup/a/memory.max": "1000\n",
                "cgroup/a/memory.current": "600\n",
                "cgroup/a/memory.stat": "inactive_file 150\nactive_file 7\n",
            },
            550,
        ),
        (
            {  # version 1 in a container: the path is that of the host, the limits are at the root
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/0123\n0::/\n",
                "cgroup/memory/memory.limit_in_bytes": "2000\n",
                "cgroup/memory/memory.usage_in_bytes": "1500\n",
                "cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
            },
            800,
        ),
        (
            {  # no limit
                "proc/self/cgroup": "4:memory:/\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": "1500\n",
                "cgroup/memory/memory.stat": "total_inactive_file 300\n",
            },
            8000 * 1024,
        ),
        (
            {  # over the limit
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": "1000\n",
                "cgroup/memory.current": "1100\n",
                "cgroup/memory.stat": "inactive_file 0\n",
            },
            0,
        ),
    ],
)
def test_limits_of_control_groups(tmp_path, monkeypatch, files, free):
    write(tmp_path, MEMINFO | files)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    assert memory.free_bytes(CPU) == free


def test_a_folder_in_memory(tmp_path, monkeypatch):
    mounts = f"/dev/sda / ext4 rw\ntmpfs {tmp_path}/ram tmpfs rw\n/dev/sdb {tmp_path}/ram/disk ext4 rw\n"
    write(tmp_path, MEMINFO | {"proc/self/mounts": mounts, "ram/disk/x": "", "ram/shm/x": ""})
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**40}))
    assert memory.free_bytes(tmp_path / "ram/shm") == 8000 * 1024
    assert memory.free_bytes(tmp_path / "ram/disk") == memory.free_bytes(tmp_path) == 2**40


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory can be had")
def test_memory_that_cannot_be_pinned(monkeypatch):
    """Rows in ordinary memory then, with a warning; also where the power of two that torch pins does not fit."""
    with pytest.warns(UserWarning, match="device: the rows are not pinned, copies to the GPU will be slower"):
        assert memory.allocate_rows(3, 4, torch.float32, CPU, True).shape == (3, 4)
    monkeypatch.setattr(memory, "free_bytes", lambda place: 60)
    with pytest.warns(UserWarning, match="will be slower .too little free memory"):
        memory.allocate_rows(3, 4, torch.float32, CPU, True)


def test_pinned_memory_that_torch_keeps(monkeypatch):
    """It is given back to the system before a buffer is refused."""
    free = [10]
    monkeypatch.setattr(memory, "free_bytes", lambda place: free[0])
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: free.insert(0, 60), raising=False)
    with pytest.warns(UserWarning, match="will be slower .too little free memory"):
        memory.allocate_rows(3, 4, torch.float32, CPU, True)
