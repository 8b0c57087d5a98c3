"""Collecting gradients and a step on 1, 2 and 4 processes of one machine: what communication costs.

They share this machine's cores, so more processes are no faster here; each has one thread. The time is that of the
slowest rank, without the start of the processes. `sent` is what one rank sends, by mfac.cost.
"""

import multiprocessing
import tempfile
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mfac

M, WIDTH, LAYERS = 32, 512, 4  # gradients, of layers of WIDTH x WIDTH


def _rank(rank, size, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=300), rank=rank, world_size=size)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = DistributedDataParallel(model) if size > 1 else model
    generator = torch.Generator().manual_seed(rank)
    batches = [(torch.randn(32, WIDTH, generator=generator), torch.randn(32, WIDTH, generator=generator))] * M
    grads = None
    while (what := pipe.recv()) is not None:
        if what == "collect":
            grads = mfac.collect_gradients(wrapped, batches, nn.functional.mse_loss, M, buffer=grads, progress=False)
        else:
            model.load_state_dict(state)
            mfac.prune_step(wrapped, grads, 0.8)
        pipe.send("done")


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    """A function that makes all ranks do something, and their number."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, children = zip(*(context.Pipe() for _ in range(request.param)), strict=True)
        processes = [
            context.Process(target=_rank, args=(rank, request.param, f"{folder}/store", pipe), daemon=True)
            for rank, pipe in enumerate(children)
        ]
        for process in processes:
            process.start()

        def do(what):
            for pipe in pipes:
                pipe.send(what)
            return [pipe.recv() for pipe in pipes if what is not None]

        do("collect")
        do("step")
        yield do, request.param
        do(None)
        for process in processes:
            process.join(30)


@pytest.mark.benchmark(group="several processes, 1 M weights, 32 gradients")
@pytest.mark.parametrize("what", ["collect", "step"])
def test_ranks(benchmark, ranks, what):
    do, size = ranks
    expected = mfac.cost(LAYERS * WIDTH**2, M, size, substeps=4)
    sent = expected.sent_collecting if what == "collect" else expected.sent_stepping
    benchmark.extra_info.update(what=what, ranks=size, sent_MB=round(sent / 1e6, 1))
    benchmark.pedantic(do, args=(what,), rounds=5, warmup_rounds=1)
