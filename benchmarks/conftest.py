"""Roofline of this machine, measured in the same run, and the tables at the end.

Every row states the flops and bytes that its work cannot do without (the counts of a block are below). Its floor is the
larger of flops / (rate of torch's matrix product in the type of the gradients) and bytes / (read bandwidth), both
measured just before the row, because shared machines change from minute to minute; the share printed is floor / median
time. A kernel that spends half of a product's flops by symmetry can exceed 100 %.
"""

import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

from mfac.ops import compiled as ops

RESULTS = Path(__file__).parent / "results"
M, B, D, DAMPING, DENSITY = 256, 2000, 1_000_000, 1e-5, 0.2  # gradients, block size, weights, λ, share kept
WORDS = {
    "share": ("at least {:.0%} of the floor", "{:.0%}", 1),
    "kthvalue": ("at least {:g}x torch.kthvalue and compare", "{:.1f}x", 1),
    "first": ("at most {:g}x of version 0.1.0", "{:.2f}x", -1),
    "published": ("at most {:g}x of the published step", "{:.2f}x", -1),
    "floors": ("at most {:g}x its floor", "{:.2f}x", -1),
    "reads": ("at most {:g}x the time to read it once", "{:.2f}x", -1),
    "MiB": ("at most {:.0f} MiB", "{:.0f} MiB", -1),
    "dense": ("at least {:g}x torch's dense in its best layout", "{:.2f}x", 1),
    "eager": ("at least {:g}x torch, channels_last", "{:.2f}x", 1),
    "compile": ("at least {:g}x torch.compile", "{:.2f}x", 1),
    "onnxruntime": ("at least {:g}x ONNX Runtime", "{:.2f}x", 1),
}


def widths(d, block_size):
    """Columns of each block."""
    return [min(block_size, d - begin) for begin in range(0, d, block_size)]


def factor_flops(m, columns):
    """Gram matrix (lower triangle) and Cholesky factor of blocks of so many columns."""
    return sum(m * n * min(m, n) + min(m, n) ** 3 / 3 for n in columns)


def diagonal_flops(m, columns):
    """The factor and the triangular solve, with all columns of G or with the identity."""
    return factor_flops(m, columns) + sum(m * m * n if m < n else n**3 / 3 for n in columns)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def grads():
    """G [M, D]; the scale of gradients of a trained network."""
    return random_gradients(M, D)


def random_gradients(m, d, dtype=torch.float32):
    """Normal numbers, made row by row: no second matrix beside this one."""
    generator = torch.Generator().manual_seed(0)
    out = torch.empty(m, d, dtype=dtype)
    for row in out:
        row.copy_(torch.randn(d, generator=generator).mul_(0.01))
    return out


@pytest.fixture(scope="session")
def weights():
    return torch.randn(D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def kept():
    return torch.rand(D, generator=torch.Generator().manual_seed(2)) < DENSITY


def _median(function, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _product_rate(dtype):
    """Flop/s of a matrix product; of a smaller one where the machine has no instructions for the type."""
    for n in (256, 2048):
        a = torch.randn(n, n).to(dtype)
        a @ a
        rate = 2 * n**3 / _median(lambda a=a: a @ a)
        if rate < 1e10:
            break
    return rate


class Roofline:
    """Rates of this machine: latest, and all that were measured in this run."""

    def __init__(self):
        ops.load()
        self.big = torch.randn(1 << 26)
        self.seen = {torch.float32: [], torch.bfloat16: [_product_rate(torch.bfloat16)], "bytes": []}

    def floor(self, flops, bytes, dtype):
        """Measure again, and return the least seconds that so many flops and bytes can take."""
        self.seen[torch.float32].append(_product_rate(torch.float32))
        self.seen["bytes"].append(self.big.numel() * 4 / _median(self.big.sum))
        rate = max(self.seen[torch.float32][-1], self.seen[dtype][-1])
        return max(flops / rate, bytes / self.seen["bytes"][-1])

    def __str__(self):
        single, half, read = (statistics.median(rates) for rates in self.seen.values())
        return (
            f"this run, medians: matrix product {single / 1e9:.0f} GFLOP/s in float32, {half / 1e9:.3g} in bfloat16; "
            f"reading {read / 1e9:.1f} GB/s"
        )


@pytest.fixture(scope="session")
def roofline(request):
    request.config.mfac_roofline = Roofline()
    return request.config.mfac_roofline


@pytest.fixture
def measure(benchmark, roofline):
    """Time a function: measure(f, flops=..., bytes=..., error=..., targets={word of WORDS: number}, ...)."""

    def run(
        function, *, flops=0, bytes=0, dtype=torch.float32, error=None, rounds=3, setup=None, targets=None, by=None,
        ratios=None,
    ):  # fmt: skip
        floor = roofline.floor(flops, bytes, dtype)
        benchmark.extra_info.update(flops=flops, bytes=bytes, error=error, floor=floor, targets=targets or {}, by=by)
        benchmark.extra_info["ratios"] = ratios or {}  # by the targets' words, of times taken in turns
        benchmark.extra_info["read_s"] = bytes / roofline.seen["bytes"][-1]
        return benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=int(rounds > 1))

    return run


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _by(benchmark):
    return benchmark.extra_info["by"] or benchmark.param


def _targets(benchmarks):
    """A row for each target: what was asked, what came, and whether that is enough."""
    yield "| target | asked | measured | |"
    yield "|---|---|---:|---|"
    for b in benchmarks:
        info, median = b.extra_info, b.stats.median
        others = {_by(x): x.stats.median for x in benchmarks if x.group == b.group}
        measured = {
            "share": info["floor"] / median,
            "kthvalue": others.get("torch.kthvalue and compare", 0) / median,
            "first": median / others.get("as in 0.1.0: 8 sub-steps", median),
            "published": median / others.get("published: independent, one sub-step", median),
            "floors": median / info["floor"] if info["floor"] else 0,
            "reads": median / info["read_s"] if info["read_s"] else 0,
            "MiB": info.get("MiB", 0),
            **info["ratios"],
        }
        for word, number in info["targets"].items():
            if word not in measured:
                continue  # what it is compared with is not installed
            asked, got, sign = WORDS[word]
            met = "met" if sign * measured[word] >= sign * number else "missed"
            yield f"| {b.group}, {_by(b)} | {asked.format(number)} | {got.format(measured[word])} | {met} |"


def _table(config, benchmarks):
    flags = torch.backends.cpu.get_cpu_capability()
    yield f"{_cpu()}, {torch.get_num_threads()} threads, {flags}, torch {torch.__version__}"
    yield ""
    yield f"m={M}, B={B}, d={D:,} where not said otherwise; λ={DAMPING:g}"
    yield ""
    yield str(config.mfac_roofline)
    yield ""
    yield from _targets(benchmarks)
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
            f"| {b.group} | {_by(b)} | {median:.4f} s | {info['flops'] / median / 1e9:.1f} "
            f"| {info['bytes'] / median / 1e9:.2f} | {info['floor'] / median:.0%} | {slowest[b.group] / median:.1f}x "
            f"| {error} |"
        )


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if not session or not session.benchmarks or not hasattr(config, "mfac_roofline"):
        return
    rows = [b for b in session.benchmarks if "floor" in b.extra_info]  # others measure what has no floor
    lines = list(_table(config, rows))
    terminalreporter.section("mfac")
    for line in lines:
        terminalreporter.write_line(line)
    if not config.option.keyword and not any(".py" in argument for argument in config.args):  # the whole suite
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / ("".join(c if c.isalnum() else "-" for c in _cpu().lower()) + ".md")
        path.write_text("# make bench\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"written to {path.relative_to(RESULTS.parents[1])}")
