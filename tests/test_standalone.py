"""The CPU kernels compiled without torch, for every instruction set that they know, against the reference.

`make sanitize` runs this file with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import platform
from ctypes import c_int64, c_void_p
from pathlib import Path

import oracle
import pytest
import torch
from oracle import TOLERANCE
from standalone import Kernels

from mfac.ops import reference

X86 = platform.machine() in ("x86_64", "AMD64")
BUILDS = {  # flags, bytes of a vector
    "SSE2": ("-march=x86-64", 16),
    "AVX2": ("-march=x86-64-v3", 32),
    "AVX-512": ("-march=x86-64-v4", 64),
    "AVX-512's tiles on AVX2": ("-march=x86-64-v3 -DMFAC_VECTOR_BYTES=64 -Wno-psabi", 64),
}
NEEDS = {
    "AVX2": {"avx2", "fma"},
    "AVX-512's tiles on AVX2": {"avx2", "fma"},
    "AVX-512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"},
}
SHAPES = [(1, 5, 3), (50, 301, 100), (65, 101, 50), (99, 97, 97), (260, 301, 300), (140, 131, 131), (5, 40_000, 40_000)]


def missing_instructions(build):
    """What this processor lacks to run a build."""
    available = set(Path("/proc/cpuinfo").read_text().split()) if X86 else set()
    return ", ".join(sorted(NEEDS.get(build, set()) - available))


@pytest.fixture(scope="module", params=BUILDS if X86 else ["native"])
def kernels(request, tmp_path_factory):
    arch, width = BUILDS.get(request.param, ("-march=native", 16))
    library = Kernels.build(tmp_path_factory.mktemp("standalone"), arch)
    if missing := missing_instructions(request.param):
        pytest.skip(f"compiled; this processor cannot run it: no {missing}")
    out = Kernels(library)
    out.set_products("none")  # test_bf16.py has them
    assert out.library.vector_bytes() == width
    return out


@pytest.mark.parametrize("kind", ["random", "collinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_op(kernels, shape, dtype, kind):
    (m, d, block_size), damping = shape, 1e-3
    grads = oracle.gradients(m, d, kind).to(dtype)
    active, kept, weights = torch.rand(d) < 0.7, torch.rand(d) < 0.4, torch.randn(d)
    for threads, mask in ((1, None), (3, active)):
        kernels.library.set_threads(threads)
        arguments = (grads, damping, block_size)
        right = reference.block_factor(*arguments, mask)
        factor = torch.empty_like(right)
        kernels.call("block_factor", *arguments, mask, factor)
        assert oracle.error(factor @ factor.mT, right @ right.mT) < TOLERANCE["factor"]

        exact, diagonal = reference.inverse_diagonal(*arguments, mask), torch.empty(d)
        kernels.call("inverse_diagonal", *arguments, mask, diagonal)
        assert float((diagonal / exact - 1).abs().max()) < TOLERANCE["diagonal"]

        x, product = torch.randn(3, d), torch.empty(3, d)
        kernels.call("inverse_product", *arguments, mask, factor, x, c_int64(3), product)
        exact = reference.inverse_product(grads, right, x, damping, block_size, mask)
        assert oracle.error(product, exact) < TOLERANCE["product"]

        new, exact = weights.clone(), weights.clone()
        kernels.call("independent_update", *arguments, mask, kept, diagonal, new)
        reference.independent_update(grads, exact, kept, diagonal, damping, block_size, mask)
        assert oracle.error(new, exact) < TOLERANCE["update"]

        new, exact = weights.clone(), weights.clone()
        loss = kernels.call("joint_update", *arguments, kept, new)
        assert loss == pytest.approx(
            float(reference.joint_update(grads, exact, kept, damping, block_size)), rel=TOLERANCE["loss"]
        )
        assert oracle.error(new, exact) < TOLERANCE["update"]

        s = min(m, block_size)
        gram, held = torch.zeros(-(-d // block_size), 2 + s * (s + 1) // 2).double(), torch.zeros(d, dtype=torch.bool)
        new, exact = weights.clone(), weights.clone()
        for now in (torch.rand(d) < 0.8, kept, kept & active):
            now &= torch.rand(d) < 0.9
            for carried in ((gram, c_int64(gram.shape[1]), held), (None, c_int64(0), None)):
                copy, right = new.clone(), exact.clone()
                loss = kernels.call("joint_step", *arguments, now, copy, diagonal, *carried)
                least, inverse = reference.joint_step(grads, right, now, damping, block_size)
                assert loss == pytest.approx(float(least), rel=1e-3, abs=1e-6)
                assert oracle.error(copy, right) < TOLERANCE["update"]
                assert float((diagonal / inverse - 1).abs().max()) < TOLERANCE["diagonal"]
            new, exact = copy, right

        groups, subsets = torch.full((-(-d // 6), 6), -1), torch.tensor([[0, 1, 2], [1, 3, 5]])
        groups.view(-1)[:d] = torch.randperm(d)
        cost, sizes = torch.empty(len(groups), 2), [c_int64(n) for n in (*groups.shape, *subsets.shape)]
        kernels.call(
            "group_saliency", *arguments, mask, weights, groups, *sizes[:2], subsets, *sizes[2:],
            None, c_int64(0), None, cost,
        )  # fmt: skip
        exact = reference.group_saliency(grads, weights, groups, subsets, damping, block_size, mask)
        assert float((cost - exact).abs().max()) <= TOLERANCE["group"] * float(exact.max())

        form = kernels.call("quadratic_form", *arguments, weights)
        right = float(reference.quadratic_form(grads, weights, damping, block_size))
        assert form == pytest.approx(right, rel=TOLERANCE["form"])


@pytest.mark.parametrize("n", [0, 1, 31, 1000, 200_003])
@pytest.mark.parametrize("distinct", [3, None])
def test_selection(kernels, n, distinct):
    scores = torch.randn(n) if distinct is None else torch.randint(distinct, (n,)).float()
    for k in {0, n // 3, n}:
        kept, weights = torch.empty(n, dtype=torch.bool), torch.ones(n)
        arrays = [(c_int64 * 1)(value) for value in (n, k)]
        pointers = [c_void_p(x.data_ptr()) for x in (kept, weights)]
        assert kernels.library.run_select_smallest(c_void_p(scores.data_ptr()), *arrays, c_int64(1), *pointers) == -1
        assert torch.equal(kept, reference.select_smallest(scores, k))
        assert torch.equal(weights, kept.float())
        kept.logical_not_()
        pointers[1] = c_void_p(None)  # no weights
        assert kernels.library.run_select_smallest(c_void_p(scores.data_ptr()), *arrays, c_int64(1), *pointers) == -1
        assert torch.equal(kept, weights.bool())
