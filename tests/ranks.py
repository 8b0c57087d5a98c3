"""Runs a function in several processes of a gloo group, or a program that starts several."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

import mfac


def _child(function, rank, size, store, results, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        results.put((rank, function(*arguments), None))
    except BaseException as error:
        results.put((rank, None, (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # a rank whose peers have gone may not wait for them


def run_ranks(function, size, *arguments, fails=False):
    """Return what ``function(*arguments)`` returns on each rank; with ``fails``, (type, text) of what it raises."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        children = [
            context.Process(target=_child, args=(function, rank, size, f"{folder}/store", results, arguments))
            for rank in range(size)
        ]
        for child in children:
            child.start()
        found = dict((rank, (value, error)) for rank, value, error in (results.get(timeout=120) for _ in children))
        for child in children:
            child.join(10)
    if fails:
        assert all(found[rank][1] for rank in range(size)), found
        return [found[rank][1][:2] for rank in range(size)]
    for rank in range(size):
        assert found[rank][1] is None, f"rank {rank}: {found[rank][1][2]}"
    return [found[rank][0] for rank in range(size)]


def run_script(*command):
    """Run a program with the package that is tested; it has one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mfac.__file__).parents[1])}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
