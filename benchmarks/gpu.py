"""`make gpu`: build, test and time the kernels on an NVIDIA GPU; a table last.

Tests: those of every op with the tensors on CUDA, opcheck, the library end to end, gradients in host memory; small ones
again under compute-sanitizer (memcheck, racecheck) where that runs. Times: medians by CUDA events. A row's floor is
the larger of its flops over the rate of a matrix product (for float32 that of float64, if tensor cores make it faster)
and its bytes over the bandwidth of a copy, both of this run. A step of S sub-steps needs at least a symmetric product
and a triangular solve (m² flops per weight each) for the weights that are left before each, and a last product.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

try:
    import torch
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
OPS = [f"tests/test_{name}.py" for name in (
    "block_factor", "inverse_diagonal", "inverse_product", "joint_update", "joint_step", "independent_update",
    "quadratic_form", "group_saliency", "select_smallest", "ops", "devices", "offload",
)]  # fmt: skip
RESNET50 = 25_500_000  # weights of its layers


def pytest(*arguments, before=()):
    """Return the exit status of the tests of the ops on CUDA; what they compare with is small work for the CPU."""
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "MFAC_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def run_tests():
    """Return an exit status; in parallel where pytest-xdist is installed."""
    parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    return pytest(*parallel, "-k", "not reference and not threads", *OPS)


def run_sanitizers():
    """Return an exit status; 0 where compute-sanitizer cannot run."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    probe = [sanitizer, sys.executable, "-c", "import torch; torch.ones(1, device='cuda').sum().item()"]
    if not Path(sanitizer).exists() or subprocess.run(probe, capture_output=True).returncode:
        print("compute-sanitizer is not here, or does not run: left out")
        return 0
    status = 0
    for tool in ("memcheck", "racecheck"):
        before = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        status |= pytest("-k", "opcheck and cuda", "tests/test_ops.py", before=before)
    return status


def median(function, repeats=5):
    """Return the median time in seconds, by CUDA events, after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def roofline():
    """Return bytes/s of a copy (read and written), and flops/s of products by type; float32 without TF32."""
    big = torch.empty(1 << 29, device="cuda").normal_()
    rates = {"copy": 2 * 4 * big.numel() / median(big.clone)}
    del big
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        rates[dtype] = 2 * 8192**3 / median(lambda a=a: a @ a)
    return rates


def flops_rate(rates, dtype):
    """Return the rate of products that are exact for a type."""
    return max(rates[dtype], rates[torch.float64]) if dtype == torch.float32 else rates[dtype]


def random_gradients(m, d, dtype):
    """Return normal numbers of a trained network's scale, made row by row."""
    out = torch.empty(m, d, dtype=dtype, device="cuda")
    for row in out:
        row.copy_(torch.randn(d, device="cuda").mul_(0.01))
    return out


def fisher_rows(rates):
    """Yield the rows of factor, inverse diagonal and saliency, and of the inverse product."""
    from mfac.ops import compiled as ops
    from mfac.ops import recursion, reference

    weights, damping = torch.randn(RESNET50, device="cuda"), 1e-5
    for title, m, block_size, dtype, precisions in (
        ("saliency, full Fisher, m=1024, bfloat16", 1024, RESNET50, torch.bfloat16, ("high", "medium", "highest")),
        ("saliency, B=2000, m=256, float32", 256, 2000, torch.float32, ("highest", "high")),
        ("saliency, B=512, m=256, float32", 256, 512, torch.float32, ("highest", "high")),
    ):
        grads = random_gradients(m, RESNET50, dtype)
        some = min(block_size, 500_000)  # the recursion is timed on a part, and takes as much longer as there are more
        part = grads[:, :some].float()
        published = median(lambda g=part, b=block_size: recursion.recursion_inverse_diagonal(g, damping, b), 1)
        published *= RESNET50 / some
        few = grads[:, : min(block_size, 4096)].contiguous()
        exact = reference.inverse_diagonal(few, damping, block_size)
        del part
        for precision in precisions:
            time = median(lambda g=grads, b=block_size, p=precision:
                          weights.square() / (2 * ops.inverse_diagonal(g, damping, b, None, p)), 3)  # fmt: skip
            floor = max(2 * m * m * RESNET50 / flops_rate(rates, dtype), grads.nbytes / rates["copy"])
            error = float((ops.inverse_diagonal(few, damping, block_size, None, precision) / exact - 1).abs().max())
            yield f"{title}, {precision}", time, floor, f"{published / time:.0f}x the recursion (scaled)", error
        if block_size == 2000:
            factor = ops.block_factor(grads, damping, block_size)
            x = torch.randn(RESNET50, device="cuda")
            time = median(lambda g=grads, f=factor, x=x: ops.inverse_product(g, f, x, damping, 2000))
            floor = grads.nbytes / rates["copy"]
            wanted = reference.inverse_product(grads[:, :2000], factor[:1], x[:2000], damping, 2000)
            error = float((ops.inverse_product(grads, factor, x, damping, 2000)[:2000] - wanted).norm() / wanted.norm())
            yield "inverse product, B=2000, m=256, float32", time, floor, "", error
            del factor
        del grads
        torch.cuda.empty_cache()


def selection_rows(rates):
    """Yield the row of the selection."""
    from mfac.ops import compiled as ops

    n = 100_000_000
    scores = torch.rand(n, device="cuda")
    time = median(lambda: ops.select_smallest(scores, n * 9 // 10))
    other = median(lambda: scores > torch.kthvalue(scores, n * 9 // 10).values, 1)
    right = scores > torch.kthvalue(scores, n * 9 // 10).values  # but for ties at the cut
    wrong = int((ops.select_smallest(scores, n * 9 // 10) != right).sum())
    yield "selection of 9 in 10 of 10^8", time, 5 * n / rates["copy"], f"{other / time:.1f}x torch.kthvalue", wrong / n


def step_rows(rates):
    """Yield the rows of whole steps."""
    import mfac

    m = 256
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False, device="cuda") for _ in range(6)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    d = sum(p.numel() for p in model.parameters())
    grads = random_gradients(m, d, torch.float32)

    def step(sparsity=0.9, **options):
        model.load_state_dict(state)
        mfac.prune_step(model, grads, sparsity, block_size=2000, damping=1e-5, **options)

    def floor(substeps, rest):
        flops = m * m * d * (2 * sum(rest ** (k / substeps) for k in range(substeps)) + rest)
        return max(flops / flops_rate(rates, torch.float32), 2 * grads.nbytes / rates["copy"])

    for substeps in (1, 8):
        name = f"prune_step to 90 %, {d / 1e6:.1f} M weights, S={substeps}"
        yield name, median(lambda s=substeps: step(substeps=s), 3), floor(substeps, 0.1), "", 0.0
    name = "prune_step to 2:4, the same, S=1"
    yield name, median(lambda: step(0.5, substeps=1, pattern="2:4"), 3), floor(1, 0.5), "", 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the table goes")
    parser.add_argument("--only", choices=["tests", "sanitizers", "times"], help="one of the parts")
    options = parser.parse_args()
    if torch is None or not torch.cuda.is_available():
        what = "no torch" if torch is None else "no NVIDIA GPU that torch can use"
        print(f"make gpu: {what} for {sys.executable}; nothing to do (make gpu PYTHON=... names another python)")
        return 0
    try:
        from mfac.cli import doctor
        from mfac.ops import compiled as ops
    except ModuleNotFoundError as error:
        print(f"make gpu: {error.name} is missing; {sys.executable} -m pip install -e . installs it")
        return 1
    status = doctor.main()
    if status or not ops.load()["cuda"]:
        print("make gpu: the CUDA kernels are not built; see `cuda kernels` above")
        return 1
    parts = {"tests": run_tests, "sanitizers": run_sanitizers, "times": lambda: run_times(options.output)}
    for name, run in parts.items():
        if options.only in {None, name}:
            status |= run()
    return status


def run_times(folder):
    """Print the table, row by row, and write what there is of it after each. Return an exit status."""
    rates, name, status = roofline(), torch.cuda.get_device_name(), 0
    lines = [
        f"# {name}, torch {torch.__version__}", "",
        f"copy {rates['copy'] / 1e12:.2f} TB/s; products in float64 {rates[torch.float64] / 1e12:.0f}, float32 "
        f"{rates[torch.float32] / 1e12:.0f}, bfloat16 {rates[torch.bfloat16] / 1e12:.0f} TFLOP/s; d = {RESNET50:,}", "",
        "| what | seconds | share of the floor | against | error |", "|---|---:|---:|---|---:|",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for rows in (selection_rows, step_rows, fisher_rows):
        try:
            for title, time, floor, against, error in rows(rates):
                lines.append(f"| {title} | {time:.4f} | {floor / time:.0%} | {against} | {error:.1e} |")
                print(lines[-1], flush=True)
                (folder / f"{name.lower().replace(' ', '-')}.md").write_text("\n".join(lines) + "\n")
        except Exception as error:  # memory, say: the other rows stand
            lines.append(f"| {rows.__name__} | failed: {str(error).splitlines()[0]} | | | |")
            print(lines[-1], flush=True)
            status = 1
        torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    sys.exit(main())
