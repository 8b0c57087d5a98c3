"""Fisher: the mathematical object, against dense float64 algebra.

The tolerances are those of the oracle's table: relative errors in norm, of float32 kernels on inputs whose F has a
condition number below 1e5. The shapes take the side of the gradients and that of the columns, and an odd last block.
"""

import math

import oracle
import pytest
import torch
from oracle import TOLERANCE

from mfac import Fisher, GradientBuffer

BACKENDS = ["compiled", "reference"]
SHAPES = [(6, 23, 10), (30, 23, 10), (6, 23, None), (30, 23, None), (12, 23, 11)]
DAMPING = 1e-2


def pair(m, d, block_size, share=1.0, backend="reference"):
    """A Fisher and the dense inverse of the same, with a share of the columns active."""
    grads = oracle.gradients(m, d)
    active = torch.rand(d) < share if share < 1 else None
    fisher = Fisher(grads, DAMPING, block_size, active=active, backend=backend)
    return fisher, oracle.inverse(oracle.fisher(grads, DAMPING, block_size or d, active))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverse_elements(shape, share, backend):
    """All d² elements, those across blocks and of columns that are not active among them."""
    fisher, inverse = pair(*shape, share, backend)
    i, j = (index.flatten() for index in torch.meshgrid(*[torch.arange(23)] * 2, indexing="ij"))
    elements = fisher.inverse_elements(i, j)
    assert elements.dtype == torch.float64
    assert oracle.error(elements.view(23, 23), inverse) < TOLERANCE["product"]
    assert torch.equal(elements.view(23, 23) == 0, inverse == 0)


def test_inverse_elements_few():
    """Lists, ranges, repeats and nothing at all; the same numbers as among many."""
    fisher, inverse = pair(6, 23, 10)
    elements = fisher.inverse_elements([3, 3, 12, 3], range(1, 5))
    assert oracle.error(elements, inverse[[3, 3, 12, 3], [1, 2, 3, 4]]) < 1e-10  # all in float64 on this path
    assert fisher.inverse_elements([], []).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_diagonal_and_product(shape, share, backend):
    fisher, inverse = pair(*shape, share, backend)
    diagonal = fisher.inverse_diagonal()
    torch.testing.assert_close(diagonal.double(), inverse.diagonal(), rtol=TOLERANCE["diagonal"], atol=0)
    x = torch.randn(3, 23)
    product = fisher.inverse_product(x)
    assert product.dtype == torch.float32 and product.shape == (3, 23)
    assert oracle.error(product, x.double() @ inverse) < TOLERANCE["product"]
    # One vector or several: float32 rounding of another order of summation.
    assert oracle.error(fisher.inverse_product(x[1]), product[1]) < 1e-6


def test_methods_agree_with_dense():
    """joint_update, independent_update and quadratic_form are the formulas of F, on one block pair."""
    fisher, inverse = pair(6, 23, 10, backend="compiled")
    dense = oracle.fisher(fisher.grads, DAMPING, 10)
    weights, kept = torch.randn(23), torch.arange(23) % 3 != 0
    step = oracle.joint_step(dense, weights, kept)
    out = weights.clone()
    loss = fisher.joint_update(out, kept)
    assert oracle.error(out, weights + step) < TOLERANCE["update"]
    assert loss == pytest.approx(float(0.5 * step @ dense @ step), rel=TOLERANCE["loss"])
    assert fisher.quadratic_form(weights) == pytest.approx(
        float(0.5 * weights.double() @ dense @ weights.double()), rel=TOLERANCE["form"]
    )
    u = torch.where(kept, 0, weights.double() / inverse.diagonal())
    out = weights.clone()
    fisher.independent_update(out, kept, fisher.inverse_diagonal())
    assert oracle.error(out, torch.where(kept, weights - inverse @ u, 0)) < TOLERANCE["update"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.6, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inactive_columns_are_zero_gradients(shape, share, backend):
    """Update and form with `active` are those of F with zeros there; kept inactive weights keep their bits."""
    fisher, _ = pair(*shape, share, backend)
    active = fisher._active
    dense = oracle.fisher(fisher.grads, DAMPING, shape[2] or 23, active)
    weights, kept = torch.randn(23), torch.arange(23) % 3 != 0
    step, out = oracle.joint_step(dense, weights, kept), weights.clone()
    loss = fisher.joint_update(out, kept)
    assert oracle.error(out, weights + step) < TOLERANCE["update"]
    assert loss == pytest.approx(float(0.5 * step @ dense @ step), rel=TOLERANCE["loss"])
    assert torch.equal(out[kept & ~active], weights[kept & ~active]) and not out[~kept].any()
    x = weights.double()
    assert fisher.quadratic_form(weights) == pytest.approx(float(0.5 * x @ dense @ x), rel=TOLERANCE["form"])


def test_inactive_and_pruned_before():
    """Where inactive weights are zero and pruned, as after an earlier mask, `active` changes no bit of the update."""
    fisher, _ = pair(6, 23, 10, 0.6, "compiled")
    kept = fisher._active & (torch.arange(23) % 4 != 0)
    out = torch.randn(23) * fisher._active
    expected = out.clone()
    assert fisher.joint_update(out, kept) == Fisher(fisher.grads, DAMPING, 10).joint_update(expected, kept)
    assert torch.equal(out, expected)


def test_defaults_and_attributes():
    grads = torch.randn(4, 9)
    fisher = Fisher(grads, backend="reference")
    assert (fisher.block_size, fisher.shape, fisher.backend) == (9, (4, 9), "reference")
    assert fisher.mean_square == pytest.approx(float(grads.square().mean()), rel=1e-6)
    assert fisher.damping == pytest.approx(3e-2 * fisher.mean_square)
    assert Fisher(torch.randn(4, 9), backend="compiled").backend == "compiled"
    assert fisher.factor() is fisher.factor()


@pytest.mark.filterwarnings("error")  # torch's, about a graph that nobody asked for
def test_gradients_untouched():
    """Any layout and requires_grad are taken, and a buffer stands for its rows."""
    grads = torch.randn(23, 6, requires_grad=True).T
    expected = Fisher(grads.detach().contiguous(), DAMPING, 10).inverse_diagonal()
    before = grads.detach().clone()
    fisher = Fisher(grads, DAMPING, 10)
    assert torch.equal(fisher.inverse_diagonal(), expected) and not fisher.inverse_diagonal().requires_grad
    fisher.inverse_product(torch.ones(23))
    fisher.joint_update(torch.ones(23), torch.arange(23) > 4)
    assert torch.equal(grads.detach(), before)
    buffer = GradientBuffer(6, {"w": torch.zeros(23)})
    for row in before:
        buffer.append_gradients([row])
    assert torch.equal(Fisher(buffer, DAMPING, 10).inverse_diagonal(), expected)


def test_columns_apart_are_copied_once():
    """Gradients whose rows are contiguous, a slice among them, are never copied."""
    wide = torch.randn(6, 40)
    assert Fisher(wide[:, 3:26]).grads.data_ptr() == wide[:, 3:].data_ptr()
    assert Fisher(torch.randn(23, 6).T).grads.is_contiguous()


def test_check_of_bfloat16_casts_no_matrix():
    """It takes memory for one row in float32, not for all of them."""
    grads = torch.randn(64, 1000).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        Fisher(grads, backend="reference")
    most = max(event.cpu_memory_usage for event in profile.events())
    assert most < 2 * 4 * 1000  # torch 2.8 counts a scalar with the row


G = torch.ones(4, 6)
BAD_ROW = torch.tensor([[1.0, 2.0], [math.inf, 0.0], [0.0, 1.0], [math.nan, 0.0]])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((G[0],), ValueError, r"grads: expected \[m, d\].* got shape \[6\]"),
        ((G[:0],), ValueError, r"grads: expected \[m, d\] with m >= 1 gradients.* got shape \[0, 6\]"),
        ((G[:, :0],), ValueError, r"d >= 1 weights, got shape \[4, 0\]"),
        ((GradientBuffer(3, {"w": torch.zeros(6)}),), ValueError, r"m >= 1 gradients.* got shape \[0, 6\]"),
        ((G.double(),), TypeError, "grads: expected float32 or bfloat16, got torch.float64"),
        ((G.half(),), TypeError, "grads: expected float32 or bfloat16, got torch.float16"),
        ((G.tolist(),), TypeError, "grads: expected a tensor or GradientBuffer, got list"),
        ((BAD_ROW,), ValueError, "grads: expected finite numbers, got NaN or infinity in 2 rows, the first 1"),
        ((G, 0.0), ValueError, "damping: expected a number in .*, got 0.0"),
        ((G, -1e-5), ValueError, "damping: expected a number in .*, got -1e-05"),
        ((G, 1e-39), ValueError, r"damping: expected a number in \[1e-30, 1e\+30\], got 1e-39"),
        ((G, 1e31), ValueError, r"damping: expected a number in \[1e-30, 1e\+30\], got 1e\+31"),
        ((G, math.nan), ValueError, "damping: .* got nan"),
        ((G, math.inf), ValueError, "damping: .* got inf"),
        ((G, "1e-5"), ValueError, "damping: expected a number .*, as in '1e-2[*]mean', got '1e-5'"),
        ((G, "-1*mean"), ValueError, "damping: expected a number .*, got '-1[*]mean'"),
        ((G, "*mean"), ValueError, "damping: expected a number .*, got '[*]mean'"),
        ((G, [1e-5]), TypeError, r"damping: expected a number, got \[1e-05\]"),
        ((torch.zeros(2, 9),), ValueError, "damping: '3e-2[*]mean' is relative to the gradients, which are zero"),
        ((G, True), TypeError, "damping: expected a number, got True"),
        ((G, 1e-5, 0), ValueError, "block_size: expected an int >= 1 or None, got 0"),
        ((G, 1e-5, 50.0), TypeError, "block_size: expected an int or None, got 50.0"),
        ((G, 1e-5, True), TypeError, "block_size: expected an int or None, got True"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        Fisher(*args)


@pytest.mark.parametrize(
    ("active", "error", "message"),
    [
        (torch.ones(5, dtype=torch.bool), ValueError, r"active: expected shape \[6\] on cpu, got \[5\] on cpu"),
        (torch.ones(6), TypeError, "active: expected torch.bool, got torch.float32"),
        (torch.ones(6, dtype=torch.bool, device="meta"), ValueError, r"active: expected .* got \[6\] on meta"),
        ([True] * 6, TypeError, "active: expected a tensor, got list"),
    ],
)
def test_bad_active(active, error, message):
    with pytest.raises(error, match=message):
        Fisher(G, active=active)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(5), ValueError, r"x: expected shape \[6\] or \[k, 6\] on cpu, got \[5\] on cpu"),
        (torch.ones(1, 1, 6), ValueError, r"x: expected .* got \[1, 1, 6\]"),
        (torch.ones(6, device="meta"), ValueError, "x: expected .* on meta"),
        ([1.0] * 6, TypeError, "x: expected a tensor, got list"),
    ],
)
def test_bad_vector(x, error, message):
    with pytest.raises(error, match=message):
        Fisher(G).inverse_product(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("active", [None, torch.ones(6, dtype=torch.bool)], ids=["all", "active"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.ones(6).double()}, TypeError, "weights: expected torch.float32, got torch.float64"),
        ({"weights": torch.ones(7)}, ValueError, r"weights: expected shape \[6\] on cpu, got \[7\] on cpu"),
        ({"weights": torch.ones(6, device="meta")}, ValueError, r"weights: expected .* got \[6\] on meta"),
        ({"weights": [1.0] * 6}, TypeError, "weights: expected a tensor, got list"),
        ({"kept": torch.zeros(6)}, TypeError, "kept: expected torch.bool, got torch.float32"),
        ({"kept": torch.zeros(1, 6, dtype=torch.bool)}, ValueError, r"kept: expected .* got \[1, 6\]"),
        ({"diagonal": torch.ones(5)}, ValueError, r"inverse_diagonal: expected shape \[6\] on cpu, got \[5\]"),
        (
            {"diagonal": torch.ones(6).double()},
            TypeError,
            "inverse_diagonal: expected torch.float32, got .*64",
        ),
        ({"x": torch.ones(6).bfloat16()}, TypeError, "x: expected torch.float32, got torch.bfloat16"),
        ({"x": torch.ones(5)}, ValueError, r"x: expected shape \[6\] on cpu, got \[5\]"),
    ],
)
def test_bad_vectors(change, error, message, active, backend):
    """The same refusal on both backends, before anything is written."""
    fisher = Fisher(G, active=active, backend=backend)
    good = {"weights": torch.ones(6), "kept": torch.zeros(6, dtype=torch.bool), "diagonal": torch.ones(6)}
    given = good | {"x": torch.ones(6)} | change
    calls = [
        lambda: fisher.joint_update(given["weights"], given["kept"]),
        lambda: fisher.independent_update(given["weights"], given["kept"], given["diagonal"]),
        lambda: fisher.quadratic_form(given["x"]),
    ]
    name = next(iter(change))
    for call in {"diagonal": calls[1:2], "x": calls[2:]}.get(name, calls[:2]):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(good["weights"], torch.ones(6))


@pytest.mark.parametrize(
    ("i", "j", "message"),
    [
        ([0, 1], [0], r"i, j: expected two lists of one length, got shapes \[2\] and \[1\]"),
        ([0], [6], r"i, j: expected indices in \[0, 6\), got 0 to 6"),
        ([-1], [0], r"i, j: expected indices in \[0, 6\), got -1 to 0"),
        ([[0]], [[0]], "i, j: expected two lists"),
    ],
)
def test_bad_indices(i, j, message):
    with pytest.raises(ValueError, match=message):
        Fisher(G).inverse_elements(i, j)


def test_bad_backend():
    with pytest.raises(ValueError, match="backend: expected one of auto, compiled, reference, got 'gpu'"):
        Fisher(G, backend="gpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("active", [False, True])
def test_a_product_whose_factors_are_too_many_to_keep(monkeypatch, backend, active):
    """The same bits, in pages of whole blocks."""
    grads, x = oracle.gradients(6, 103), torch.randn(3, 103)
    mask = torch.arange(103) % 3 > 0 if active else None
    whole = Fisher(grads, 1e-3, 10, active=mask, backend=backend)
    monkeypatch.setattr("mfac.fisher._MAX_FACTOR_BYTES", 3 * 8 * 36)  # three blocks
    paged = Fisher(grads, 1e-3, 10, active=mask, backend=backend)
    expected = [whole.factor() is not None and whole.inverse_product(v) for v in (x, x[0])]
    assert all(torch.equal(paged.inverse_product(v), e) for v, e in zip((x, x[0]), expected, strict=True))
    assert paged._factor is None
