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


def one_after_the_other(monkeypatch):
    """Sub-steps as version 0.1.0 made them: an update and a diagonal, each with a factor of its own, nothing kept."""

    def joint_step(self, weights, kept):
        return self.joint_update(weights, kept), self.replace(active=kept).inverse_diagonal()

    monkeypatch.setattr(mfac.Fisher, "joint_step", joint_step)
    monkeypatch.setattr(mfac.Fisher, "step_memory", lambda self: None)


WAYS = {
    "published: independent, one sub-step": {
        "update": "independent", "substeps": 1, "damping": DAMPING, "block_size": B
    },
    "as in 0.1.0: 8 sub-steps": {"substeps": 8},
    "8 sub-steps": {"substeps": 8},
    "default": {},
}  # fmt: skip
STEPS = {  # sparsity before and after, and what the default may take
    "dense to 80 %": (0.0, 0.8, {"first": 0.35, "published": 1.0}),
    "the 8th of 16 steps to 90 %": (1 - 0.1 ** (7 / 16), 1 - 0.1 ** (8 / 16), {"first": 0.25}),
}


@pytest.mark.parametrize(
    ("step", "way"),
    [
        pytest.param(step, way, id=way, marks=pytest.mark.benchmark(group=f"prune_step of a million weights, {step}"))
        for step in STEPS
        for way in WAYS
    ],
)
def test_default_step(measure, grads, weights, monkeypatch, step, way):
    """The default step against the published one and that of version 0.1.0."""
    (m, d), (before, after, targets) = grads.shape, STEPS[step]
    model, state = torch.nn.Linear(1000, d // 1000, bias=False), {"weight": weights.view(d // 1000, 1000)}
    model.load_state_dict(state)
    masks = mfac.prune_step(model, None, before, criterion="magnitude").masks if before else None
    if "0.1.0" in way:
        one_after_the_other(monkeypatch)
    columns = [round(n * (1 - before)) for n in widths(d, WAYS[way].get("block_size", 512))]
    measure(
        lambda: mfac.prune_step(model, grads, after, masks=masks, **WAYS[way]),
        setup=lambda: model.load_state_dict(state) and None, flops=diagonal_flops(m, columns), bytes=4 * m * d, by=way,
        targets=targets if way == "default" else {},
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

    share = 2 * 256 / 2000  # of the gradients, 2 m / B: the small matrices are kept over the sub-steps
    measure(run, rounds=1, by="joint, a million weights", targets={"MiB": share * 1000})
