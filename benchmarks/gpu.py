"""`make gpu`: build, the tests that have a CUDA variant, and timings on the GPU, with a short table last.

There are no CUDA kernels in this version: on CUDA the reference path serves, and this shows what it gives.
"""

import statistics
import subprocess
import sys
from pathlib import Path

try:
    import torch
except ImportError:
    torch = None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def _median(function, repeats=5):
    """Median time in seconds, by CUDA events, after one warm-up."""
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


def main():
    if torch is None or not torch.cuda.is_available():
        what = "no torch" if torch is None else "no NVIDIA GPU that torch can use"
        print(f"make gpu: {what} for {sys.executable}; nothing to do (make gpu PYTHON=... names another python)")
        return 0
    from mfac import doctor, reference

    status = doctor.main()
    status |= subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "cuda", "tests"], cwd=ROOT).returncode

    m, block_size, d = 256, 2000, 200_000
    grads, scores = torch.randn(m, d, device="cuda") * 0.01, torch.rand(25_000_000, device="cuda")
    square, big = torch.randn(8192, 8192, device="cuda"), torch.randn(1 << 29, device="cuda")
    rows = {
        "float32 matrix product, TFLOP/s": 2 * 8192**3 / _median(lambda: square @ square) / 1e12,
        "copy, TB/s": 2 * 4 * big.numel() / _median(big.clone) / 1e12,
        "textbook recursion, s": _median(lambda: reference.recursion_inverse_diagonal(grads, 1e-5, block_size), 3),
        "reference inverse diagonal (float64), s": _median(lambda: reference.inverse_diagonal(grads, 1e-5, block_size)),
        "reference selection of 22.5 in 25 million, s": _median(lambda: reference.select_smallest(scores, 22_500_000)),
    }
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; m={m}, B={block_size}, d={d:,}")
    for name, value in rows.items():
        print(f"{name:<48} {value:10.4f}")
    return status


if __name__ == "__main__":
    sys.exit(main())
