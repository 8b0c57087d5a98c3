"""Roofline of this machine, measured in the same run, and the table at the end.

Every row states the flops and bytes that its work cannot do without. The floor is the larger of flops / (matrix product
rate) and bytes / (read bandwidth); the share printed is floor / median time. The rate is that of torch's own float32
matrix product, so a kernel that spends half of a product's flops by symmetry can exceed 100 %.
"""

import platform
import time
from pathlib import Path

import pytest
import torch

from mfac import ops

RESULTS = Path(__file__).parent / "results"
M, B, D, DAMPING, DENSITY = 256, 2000, 200_000, 1e-5, 0.2  # gradients, block size, weights, λ, share kept


@pytest.fixture(scope="session")
def grads():
    """G [M, D]; the scale of gradients of a trained network."""
    ops.load()
    return torch.randn(M, D, generator=torch.Generator().manual_seed(0)) * 0.01


def _best(function, repeats=5):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture(scope="session")
def weights(grads):
    return torch.randn(grads.shape[1], generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def kept(grads):
    return torch.rand(grads.shape[1], generator=torch.Generator().manual_seed(2)) < DENSITY


@pytest.fixture(scope="session")
def roofline(request):
    """float32 matrix product rate [flop/s] and read bandwidth [byte/s]."""
    ops.load()
    a, big = torch.randn(2048, 2048), torch.randn(1 << 26)
    rates = {"flops": 2 * 2048**3 / _best(lambda: a @ a), "bytes": big.numel() * 4 / _best(big.sum)}
    request.config.mfac_roofline = rates
    return rates


@pytest.fixture
def measure(benchmark, roofline):
    """Time a function: measure(f, flops=..., bytes=..., error=..., rounds=...)."""

    def run(function, *, flops=0, bytes=0, error=None, rounds=3, setup=None, **sizes):
        benchmark.extra_info.update(sizes, flops=flops, bytes=bytes, error=error)
        benchmark.extra_info["floor"] = max(flops / roofline["flops"], bytes / roofline["bytes"])
        return benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=1)

    return run


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _table(config, benchmarks):
    rates = config.mfac_roofline
    flags = torch.backends.cpu.get_cpu_capability()
    yield f"{_cpu()}, {torch.get_num_threads()} threads, {flags}, torch {torch.__version__}"
    yield ""
    yield f"m={M}, B={B}, d={D:,} where not said otherwise; λ={DAMPING:g}"
    yield ""
    yield f"this run: float32 product {rates['flops'] / 1e9:.0f} GFLOP/s, reading {rates['bytes'] / 1e9:.1f} GB/s"
    yield ""
    yield "| work | by | median | GFLOP/s | GB/s | of floor | against slowest | error |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    slowest = {}
    for b in benchmarks:
        slowest[b.group] = max(slowest.get(b.group, 0), b.stats.median)
    for b in sorted(benchmarks, key=lambda b: (b.group, -b.stats.median)):
        info, median = b.extra_info, b.stats.median
        error = "" if info["error"] is None else f"{info['error']:.0e}"
        yield (
            f"| {b.group} | {b.param or b.name} | {median:.4f} s | {info['flops'] / median / 1e9:.1f} "
            f"| {info['bytes'] / median / 1e9:.2f} | {info['floor'] / median:.0%} | {slowest[b.group] / median:.1f}x "
            f"| {error} |"
        )


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if not session or not session.benchmarks or not hasattr(config, "mfac_roofline"):
        return
    lines = list(_table(config, session.benchmarks))
    terminalreporter.section("mfac")
    for line in lines:
        terminalreporter.write_line(line)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("".join(c if c.isalnum() else "-" for c in _cpu().lower()) + ".md")
    path.write_text("# make bench\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"written to {path.relative_to(RESULTS.parents[1])}")
