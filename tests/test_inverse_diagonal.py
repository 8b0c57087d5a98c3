"""Diagonal of the inverse Fisher."""

import oracle
import pytest
import torch
from oracle import BACKENDS, DAMPINGS, KINDS, SCALES, SHAPES, TOLERANCE

from mfac.ops import compiled as ops
from mfac.ops import recursion, reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_dense(shape, kind, backend):
    m, d, block_size = shape
    for damping in DAMPINGS:
        for scale in SCALES:
            grads = oracle.gradients(m, d, kind, scale)
            dense = oracle.fisher(grads, damping, block_size)
            if not oracle.well_posed(dense):
                continue
            exact = oracle.inverse(dense).diagonal()
            out = BACKENDS[backend].inverse_diagonal(grads, damping, block_size)
            assert out.dtype == torch.float32
            assert float(((out - exact) / exact).abs().max()) < TOLERANCE["diagonal"], (damping, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 100, 33), (65, 101, 50)], ids=str)
def test_active(shape, backend):
    """Inactive columns are those of zero gradients."""
    m, d, block_size = shape
    grads, active = oracle.gradients(m, d), torch.arange(d) % 3 != 0
    active[:block_size] = False  # a whole block
    exact = oracle.inverse(oracle.fisher(grads, 1e-3, block_size, active)).diagonal()
    out = BACKENDS[backend].inverse_diagonal(grads, 1e-3, block_size, active)
    assert float(((out - exact) / exact).abs().max()) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 100, 33), (65, 101, 50)], ids=str)
def test_recursion(shape, backend):
    """The published algorithm gives the same numbers."""
    m, d, block_size = shape
    grads = oracle.gradients(m, d)
    exact = recursion.recursion_inverse_diagonal(grads.double(), 1e-3, block_size)
    out = BACKENDS[backend].inverse_diagonal(grads, 1e-3, block_size)
    assert float(((out - exact) / exact).abs().max()) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e6, 1e18])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_where_float64_fails(kind, scale, backend):
    """1/F_ii <= [F⁻¹]_ii <= 1/λ for any finite input, however ill-conditioned: never zero, negative or NaN."""
    for m, d, block_size in [(20, 60, 60), (64, 40, 13)]:
        grads = oracle.gradients(m, d, kind, scale)
        for damping in (1e-8, 1e-2):
            out = BACKENDS[backend].inverse_diagonal(grads, damping, block_size).double()
            lower = 1 / (damping + grads.double().square().mean(0))
            assert (out >= lower * (1 - 1e-6)).all() and (out <= 1 / damping * (1 + 1e-6)).all()


@pytest.mark.parametrize("shape", [(64, 500, 130), (130, 260, 64)], ids=str)
def test_bfloat16(shape):
    """bfloat16 gradients are exact numbers: what comes out is as good as of those numbers in float32."""
    m, d, block_size = shape
    half = oracle.gradients(m, d).bfloat16()
    exact = oracle.inverse(oracle.fisher(half.float(), 1e-3, block_size)).diagonal()
    for grads in (half, half.float()):
        out = ops.inverse_diagonal(grads, 1e-3, block_size)
        assert float((out / exact - 1).abs().max()) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Rows apart, columns apart: the values count, not the strides; the gradients are not written."""
    base = oracle.gradients(16, 200)
    expected = BACKENDS[backend].inverse_diagonal(base[:, 50:150].contiguous(), 1e-3, 40)
    copy = base.clone()
    assert torch.equal(BACKENDS[backend].inverse_diagonal(base[:, 50:150], 1e-3, 40), expected)
    assert torch.equal(BACKENDS[backend].inverse_diagonal(base[:, 50:150].T.contiguous().T, 1e-3, 40), expected)
    assert torch.equal(base, copy)


def test_one_gradient_in_closed_form():
    """m = 1: [F⁻¹]_ii = (1 - g_i² / (λ + ‖g‖²)) / λ, also where one weight takes nearly all of the gradient."""
    grads = torch.tensor([[1e-3, 1.0, 0.0]])
    out = ops.inverse_diagonal(grads, 1e-6, 3).double()
    square = grads[0].double().square()
    rest = (1e-6 + square.sum() - square) / (1e-6 + square.sum())  # 1 - g_i²/(λ + ‖g‖²) without the cancellation
    assert float((out * 1e-6 / rest - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("separation", [1e-1, 1e-2, 1e-3, 1e-4])
def test_two_gradients_that_nearly_agree(separation):
    """The smallest pivot says little about the smallest eigenvalue here, and one weight takes the whole difference."""
    for seed in range(20):
        v = oracle.gradients(1, 256, seed=seed)
        grads = torch.cat([v, v])
        grads[1, 0] += separation * v.norm()
        for damping in (1e-6, 1e-3):
            exact = oracle.inverse(oracle.fisher(grads, damping, 256)).diagonal()
            out = ops.inverse_diagonal(grads, damping, 256)
            assert float(((out - exact) / exact).abs().max()) < TOLERANCE["diagonal"], (seed, damping)


def test_not_finite():
    """The op itself trusts its caller to have checked; it does not hang or make numbers up."""
    for kernels in BACKENDS.values():
        with pytest.raises(RuntimeError, match="Cholesky factor"):
            kernels.inverse_diagonal(torch.full((3, 9), torch.nan), 1e-3, 9)


@pytest.mark.parametrize(
    ("rows", "columns"), [(3, 9), (9, 3), (520, 600)]
)  # the last beyond one block of threads on CUDA
def test_not_finite_says_where(rows, columns):
    grads = oracle.gradients(rows, 4 * columns)
    grads[rows // 2, 2 * columns + 1] = torch.inf
    text = rf"grads: expected rows whose block 2 \(m={rows} gradients, damping 0\.001\) has a Cholesky factor, got NaN"
    with pytest.raises(RuntimeError, match=text):
        BACKENDS["compiled"].inverse_diagonal(grads, 1e-3, columns)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_wide_block(damping):
    """One block of more columns than are packed at a time on CUDA."""
    grads = torch.randn(250, 62_000)
    out = BACKENDS["compiled"].inverse_diagonal(grads, damping, 62_000)
    error = (out / reference.inverse_diagonal(grads, damping, 62_000) - 1).abs().max()
    assert float(error) < TOLERANCE["diagonal"]
