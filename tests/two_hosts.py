"""Two hosts on one machine: network namespaces joined by a virtual cable. As root: python tests/two_hosts.py

Prunes a model under DistributedDataParallel and fully_shard with one process per host, over TCP; compares the masks with
those of one process; then kills one host, upon which the other must say so. pytest does not run it: it needs root.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from test_distributed import by_prune_step, make_batches, make_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mfac

HOSTS, ADDRESS = ("mfac-a", "mfac-b"), "10.77.0.{}"
LIMIT = 60  # seconds


def host(rank, way, path):
    """What one host does."""
    model, batches = make_model(), make_batches()
    if rank is not None:
        dist.init_process_group(
            "gloo", f"tcp://{ADDRESS.format(1)}:29577", timedelta(seconds=LIMIT), rank=rank, world_size=2
        )
        model = fully_shard(model) if way == "fully_shard" else DistributedDataParallel(model)
        batches = batches if way == "fully_shard" else batches[rank::2]  # the mean of equal batches is that of one
    if way == "killed":
        done = iter(range(1000))

        def forward(model, batch):
            if rank == 1 and next(done) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return model(batch[0]), batch[1]

        mfac.collect_gradients(model, batches, torch.nn.functional.cross_entropy, 12, forward=forward, progress=False)
    else:
        path.write_bytes(
            pickle.dumps({name: mask.numpy() for name, mask in by_prune_step(model, batches).masks.items()})
        )


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def start(rank, way, path):
    command = ["ip", "netns", "exec", HOSTS[rank], sys.executable, __file__, str(rank), way, str(path)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"cable{rank}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def main():
    for name in HOSTS:
        ip("netns", "add", name)
    try:
        ip("link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable1", "netns", HOSTS[1])
        for rank, name in enumerate(HOSTS):
            ip("-n", name, "addr", "add", f"{ADDRESS.format(rank + 1)}/24", "dev", f"cable{rank}")
            ip("-n", name, "link", "set", f"cable{rank}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        with tempfile.TemporaryDirectory() as folder:
            alone = Path(folder, "alone")
            host(None, "alone", alone)
            wanted = pickle.loads(alone.read_bytes())
            for way in ("DistributedDataParallel", "fully_shard"):
                paths = [Path(folder, f"{way}-{rank}") for rank in range(2)]
                hosts = [start(rank, way, path) for rank, path in enumerate(paths)]
                errors = [process.communicate(timeout=2 * LIMIT)[1] for process in hosts]
                assert not any(process.returncode for process in hosts), "\n".join(errors)
                for path in paths:
                    found = pickle.loads(path.read_bytes())
                    assert all((found[name] == mask).all() for name, mask in wanted.items()), way
                print(f"{way}: both hosts have the masks of one process")
            began = time.monotonic()
            hosts = [start(rank, "killed", Path(folder, "none")) for rank in range(2)]
            errors = [process.communicate(timeout=2 * LIMIT)[1] for process in hosts]
            assert "process_group: expected all 2 ranks to take part, but one has stopped" in errors[0], errors[0]
            print(f"killed: the other host says so, {time.monotonic() - began:.0f} s after both were started")
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        host(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        main()
