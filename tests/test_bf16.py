"""Products by bfloat16 instructions: each path against its stand-in, and the ops that use them against float64.

The paths that this machine does not have are skipped; the stand-in, which has the bits of AMX, runs everywhere.
"""

import platform
from ctypes import c_int64, c_void_p

import oracle
import pytest
import torch
from oracle import DAMPINGS, KINDS, SCALES, TOLERANCE
from standalone import Kernels

from mfac.ops import reference

PATHS = ["amx", "avx512", "stand_in"]
TERMS = {"high": 2, "medium": 1}
# Both sides; one and several tiles and blocks; a last block of one column and one of many; no multiple of a tile.
SHAPES = [(33, 100, 35), (65, 101, 50), (97, 99, 99), (64, 129, 64), (150, 701, 300), (133, 1030, 515)]


BUILDS = {"native": "-march=native", "portable": ""}  # with and without the compiler's leave to use the instructions
BOTH = pytest.mark.parametrize(
    "library", BUILDS if platform.machine() in ("x86_64", "AMD64") else ["native"], indirect=True
)


@pytest.fixture(scope="module")
def library(request, tmp_path_factory):
    return Kernels(Kernels.build(tmp_path_factory.mktemp("bf16"), BUILDS[getattr(request, "param", "native")]))


@pytest.fixture(params=PATHS)
def kernels(request, library):
    library.library.set_threads(1)
    if not library.set_products(request.param):
        pytest.skip(f"this machine has no {request.param}")
    library.path = request.param
    return library


def diagonal(kernels, grads, damping, block_size, active=None):
    out = torch.empty(grads.shape[1])
    kernels.call("inverse_diagonal", grads, damping, block_size, active, out)
    return out


def multiply(kernels, left, right):
    """Sums [32, 32] of left [32, 32 t] and right [32 t, 32], laid out as tiles."""
    tiles = left.shape[1] // 32
    left = left.view(2, 16, tiles, 32).transpose(1, 2).contiguous()
    right = right.view(tiles, 16, 2, 2, 16).permute(3, 0, 1, 4, 2).contiguous()
    aligned = torch.empty(32 * 32 + 16)
    out = aligned[-aligned.data_ptr() % 64 // 4 :][:1024]
    kernels.library.run_multiply_tiles(
        *(c_void_p(x.data_ptr()) for x in (left, right)), c_int64(tiles), c_void_p(out.data_ptr())
    )
    return out.view(32, 32).clone()


@BOTH
@pytest.mark.parametrize("kind", ["normal", "denormal", "mixed"])
@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_products(kernels, tiles, kind):
    """AMX has the bits of the stand-in; the other order of sums differs by the rounding of 32 terms."""
    shape = (32, 32 * tiles)
    left, right = torch.randn(shape), torch.randn(shape).mT.contiguous()
    if kind != "normal":
        scale = torch.randint(-45 if kind == "denormal" else -30, -15 if kind == "denormal" else 10, shape).double()
        left = (left * 10**scale).float()
        left[torch.rand(shape) < 0.1] = -0.0
        right *= 1e-10 if kind == "mixed" else 1
    left, right = left.bfloat16(), right.bfloat16()
    out = multiply(kernels, left, right)
    path = kernels.path
    kernels.set_products("stand_in")
    same = multiply(kernels, left, right)
    kernels.set_products(path)
    if path == "amx":
        assert torch.equal(out.view(torch.int32), same.view(torch.int32))
    sizes = left.double().abs() @ right.double().abs()
    for value in (out, same):
        error = (value - left.double() @ right.double()).abs()
        assert bool((error <= 2**-20 * sizes + 32 * tiles * 2.0**-125 * (1 + right.double().abs().max())).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_diagonal(kernels, shape, kind):
    """bfloat16 gradients are exact numbers, and lose no more than those of float32, however hard they are."""
    m, d, block_size = shape
    for damping in DAMPINGS:
        for scale in SCALES:
            grads = oracle.gradients(m, d, kind, scale).bfloat16()
            dense = oracle.fisher(grads, damping, block_size)
            if not oracle.well_posed(dense):
                continue
            exact = oracle.inverse(dense).diagonal()
            out = diagonal(kernels, grads, damping, block_size)
            assert float((out / exact - 1).abs().max()) < TOLERANCE["diagonal"], (damping, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [3e-2, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-18])
def test_relative_damping(kernels, kind, relative, scale):
    """The default damping, over scales down to those at which products are denormal numbers."""
    grads = oracle.gradients(120, 1000, kind, scale).bfloat16()
    damping = relative * float(grads.double().square().mean())
    exact = reference.inverse_diagonal(grads, damping, 500)
    assert float((diagonal(kernels, grads, damping, 500) / exact - 1).abs().max()) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("precision", TERMS)
@pytest.mark.parametrize("kind", ["random", "mixed scale", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_precision(kernels, shape, kind, precision):
    m, d, block_size = shape
    grads = oracle.gradients(m, d, kind)
    damping = 1e-1 * float(grads.square().mean())
    kernels.set_products(kernels.path, TERMS[precision])
    out = diagonal(kernels, grads, damping, block_size)
    exact = reference.inverse_diagonal(grads, damping, block_size)
    assert float((out / exact - 1).abs().max()) < TOLERANCE[precision]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops(kernels, shape, dtype):
    """The ops that use the Gram matrix, with and without a mask; the same bits for any number of threads."""
    (m, d, block_size), damping = shape, 1e-2
    grads = oracle.gradients(m, d).to(dtype)
    kernels.set_products(kernels.path, 2)
    tolerance = {"diagonal": 1e-4, "update": 1e-4, "loss": 1e-4, "group": 1e-3}
    if dtype == torch.float32:
        tolerance = dict.fromkeys(tolerance, TOLERANCE["high"])
    kept, weights = torch.rand(d) < 0.4, torch.randn(d)
    groups, subsets = torch.randperm(d)[: d // 4 * 4].view(-1, 4), torch.tensor([[0, 1], [1, 3]])
    sizes = [c_int64(n) for n in (*groups.shape, *subsets.shape)]
    for mask in (None, torch.rand(d) < 0.7):
        results = []
        for threads in (1, 2, 3, 8):
            kernels.library.set_threads(threads)
            new, independent, cost = weights.clone(), weights.clone(), torch.empty(len(groups), 2)
            found = diagonal(kernels, grads, damping, block_size, mask)
            loss = kernels.call("joint_update", grads, damping, block_size, kept, new)
            kernels.call("independent_update", grads, damping, block_size, mask, kept, found, independent)
            described = groups, *sizes[:2], subsets, *sizes[2:], None, c_int64(0), None
            kernels.call("group_saliency", grads, damping, block_size, mask, weights, *described, cost)
            results.append([found, new, independent, cost, torch.tensor(loss)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        found, new, independent, cost, loss = results[0]
        exact = reference.inverse_diagonal(grads, damping, block_size, mask)
        assert float((found / exact - 1).abs().max()) < tolerance["diagonal"]
        right = weights.clone()
        right_loss = reference.joint_update(grads, right, kept, damping, block_size)
        assert oracle.error(new, right) < tolerance["update"]
        assert float(loss) == pytest.approx(float(right_loss), rel=tolerance["loss"])
        right = weights.clone()
        reference.independent_update(grads, right, kept, found, damping, block_size, mask)
        assert oracle.error(independent, right) < tolerance["update"]
        exact = reference.group_saliency(grads, weights, groups, subsets, damping, block_size, mask)
        assert float((cost - exact).abs().max()) <= tolerance["group"] * float(exact.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_held_matrices(kernels, dtype, kind, damping):
    """Sub-steps that share matrices of bfloat16 products, from the capacitance side to orders without such products."""
    m, d, block_size = 150, 700, 300
    grads, start = oracle.gradients(m, d, kind).to(dtype), torch.randn(d)
    if not oracle.well_posed(oracle.fisher(grads, damping, block_size)):
        return
    kernels.set_products(kernels.path, 1)
    exact_products = dtype == torch.bfloat16
    gram, held = torch.zeros(3, 2 + 188 * 189 // 2).double(), torch.zeros(d, dtype=torch.bool)
    weights, right, kept, found = start.clone(), start.clone(), torch.ones(d, dtype=torch.bool), torch.empty(d)
    made = set()
    for _ in range(8):
        kept = kept & (torch.rand(d) < 0.7)
        loss = kernels.call(
            "joint_step", grads, damping, block_size, kept, weights, found, gram, c_int64(gram.shape[1]), held
        )
        made |= set(gram[:, 0].tolist())
        least, exact = reference.joint_step(grads, right, kept, damping, block_size)
        tolerance = TOLERANCE["update" if exact_products else "medium"]
        assert oracle.error(weights, right) < tolerance
        assert loss == pytest.approx(float(least), rel=1e-3 if exact_products else tolerance, abs=1e-6)
        assert float((found / exact - 1).abs().max()) < TOLERANCE["diagonal" if exact_products else "medium"]
    if damping == 1.0 and kind == "random":
        assert 3 in made  # bfloat16 products


@pytest.mark.parametrize("terms", [1, 2])
def test_highest_is_float32(kernels, terms):
    """Products of bfloat16 stand in for float32 gradients only where they are asked for."""
    grads = oracle.gradients(130, 600)
    out = diagonal(kernels, grads, 1e-2, 300)
    path = kernels.path
    kernels.set_products(path, terms)
    lower = diagonal(kernels, grads, 1e-2, 300)
    kernels.set_products("none")
    assert torch.equal(out, diagonal(kernels, grads, 1e-2, 300))
    used = path in ("amx", "stand_in") or (path == "avx512" and terms == 1)
    assert torch.equal(out, lower) != used
