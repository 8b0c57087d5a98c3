"""Runs a function in several processes of a gloo group, or a program that starts several."""

import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

import mfac


def _child(function, rank, size, store, results, arguments):
    torch.set_num_threads(1)
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"  # no rank may end while others still connect to it
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        found = function(*arguments), None
    except BaseException as error:
        found = None, (type(error).__name__, str(error), traceback.format_exc())
    results.put((rank, pickle.dumps(found)))  # as bytes: a tensor would live in this process's shared memory
    results.close()
    results.join_thread()
    os._exit(0)  # without a goodbye, as a process that is killed


def run_ranks(function, size, *arguments, fails=()):
    """Return what ``function(*arguments)`` returns on each rank; of the ranks in ``fails``, (type, text) of the error.

    A rank that ends without a word (os._exit) gives None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mfac"])
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        children = [
            context.Process(target=_child, args=(function, rank, size, f"{folder}/store", results, arguments))
            for rank in range(size)
        ]
        for child in children:
            child.start()
        found = {}
        deadline = time.monotonic() + 120
        while len(found) < size and (any(child.is_alive() for child in children) or not results.empty()):
            assert time.monotonic() < deadline, f"ranks {sorted(set(range(size)) - set(found))} hang"
            try:
                rank, content = results.get(timeout=0.1)
                found[rank] = pickle.loads(content)
            except queue.Empty:
                pass
        for child in children:
            child.join(10)
    values = []
    for rank in range(size):
        value, error = found.get(rank, (None, None))
        assert (error is not None) == (rank in fails), f"rank {rank}: {error[2] if error else value}"
        values.append(error[:2] if error else value)
    return values


def run_script(*command):
    """Run a program with the package that is tested; it has one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mfac.__file__).parents[1])}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
