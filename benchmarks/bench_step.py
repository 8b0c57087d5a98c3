"""Whole prune_steps of one sub-step from 50 to 90 % on layers of the size of known networks, and the memory that one
takes.

Floor: the flops of factor and solve over the half that is left and of the factor over the tenth that survives, and
one read of G for each of the two.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DAMPING, B, diagonal_flops, factor_flops, random_gradients, widths

import mfac

SIZES = {  # d, m, what prune_step may take of its floor
    "ResNet-20": (270_000, 256, None),
    "MobileNetV1": (3_200_000, 256, 1.5),
    "ResNet-50, m=64": (23_000_000, 64, None),
}
UPDATES = ["independent", "joint"]


@pytest.fixture(scope="module")
def step(request):
    """Model, gradients and the masks of a first step to 50 % by magnitude."""
    d, m, _ = SIZES[request.param]
    if 4 * m * d > 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        pytest.skip(f"the gradients would take {4 * m * d / 1e9:.1f} GB, more than half of the memory")
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, d // 1000, bias=False)
    masks = mfac.prune_step(model, None, 0.5, criterion="magnitude", update="none").masks
    return model, random_gradients(m, d), masks


@pytest.mark.parametrize(
    ("step", "size", "update"),
    [
        pytest.param(size, size, update, id=update, marks=pytest.mark.benchmark(group=f"prune_step, {size}"))
        for size in SIZES
        for update in UPDATES
    ],
    indirect=["step"],
)
def test_prune_step(measure, step, size, update):
    """The error is that of the sparsity."""
    (model, grads, masks), (d, m, floors) = step, SIZES[size]
    dense, half = model.weight.detach().clone(), [n // 2 for n in widths(d, B)]
    updated = [n // 10 for n in widths(d, B)] if update == "joint" else half

    def prune():
        return mfac.prune_step(
            model, grads, 0.9, masks=masks, update=update, substeps=1, damping=DAMPING, block_size=B
        )  # fmt: skip

    def restore():
        model.load_state_dict({"weight": dense})

    error = abs(prune().sparsity - 0.9)
    measure(
        prune, setup=restore, flops=diagonal_flops(m, half) + factor_flops(m, updated), bytes=2 * 4 * m * d,
        error=error, by=update, targets={"floors": floors} if floors and update == "joint" else {},
    )  # fmt: skip
    restore()


def two_ops(self, weights, kept):
    """Fisher.joint_step as an op after the other."""
    return self.joint_update(weights, kept), self.replace(active=kept).inverse_diagonal()


WAYS = {
    "published: independent, one sub-step": {
        "update": "independent",
        "substeps": 1,
        "damping": DAMPING,
        "block_size": B,
    },
    "S=8, two ops": {"substeps": 8},
    "S=8": {"substeps": 8},
    "S=4, two ops": {"substeps": 4},
    "S=4": {"substeps": 4},
    "S=1": {"substeps": 1},
}


@pytest.mark.benchmark(group="prune_step with the defaults, dense to 80 %, a million weights")
@pytest.mark.parametrize("way", WAYS)
def test_default_step(measure, grads, weights, monkeypatch, way):
    """What the sub-steps cost, sharing factors and matrices or not, against the published step."""
    m, d = grads.shape
    model, state = torch.nn.Linear(1000, d // 1000, bias=False), {"weight": weights.view(d // 1000, 1000)}
    if "two ops" in way:
        monkeypatch.setattr(mfac.Fisher, "joint_step", two_ops)
        monkeypatch.setattr(mfac.Fisher, "step_memory", lambda self: None)
    columns = widths(d, WAYS[way].get("block_size", 512))
    measure(
        lambda: mfac.prune_step(model, grads, 0.8, **WAYS[way]), setup=lambda: model.load_state_dict(state) and None,
        flops=diagonal_flops(m, columns), bytes=4 * m * d, by=way,
    )  # fmt: skip


MEMORY = """
import torch, mfac
from conftest import random_gradients
mfac.prune_step(torch.nn.Linear(100, 10), torch.randn(8, 1000), 0.5)  # code and thread pools
model, grads = torch.nn.Linear(1000, 1000, bias=False), random_gradients(256, 1_000_000)
def peak():  # of this process only: ru_maxrss would remember that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
result = mfac.prune_step(model, grads, 0.5, block_size=2000)
mfac.prune_step(model, grads, 0.9, masks=result.masks, block_size=2000)
print((peak() - before) / 1024)
"""


@pytest.mark.benchmark(group="peak memory beyond 1 GB of gradients")
def test_memory(measure, benchmark):
    """Two joint prune_steps of a million weights, 256 gradients, in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}

    def run():
        command = [sys.executable, "-c", MEMORY]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        benchmark.extra_info["MiB"] = float(done.stdout.split()[-1])

    measure(run, rounds=1, by="joint, a million weights", targets={"MiB": 64})
