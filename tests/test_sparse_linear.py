"""Products with sparse matrices: kernel and reference against dense float64."""

import pytest
import sparse_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_oracle import BACKENDS, DTYPES, FORMATS, TOLERANCE

from mfac.sparse import compiled as ops

# (samples, inputs, outputs): one of each, one left over in the last slice, window, vector and tile, more tiles than
# kManyTiles, and inputs that leave room for fewer vectors in a tile.
SHAPES = [(1, 1, 1), (1, 5, 7), (1, 200, 1000), (2, 33, 130), (17, 300, 129), (70, 64, 257), (600, 40, 12)]
SHAPES += [(1100, 3, 5)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(name, shape, dtype, form):
    m, k, n = shape
    weight, bias, x = oracle.sparse_weight((n, k), 0.8, dtype), torch.randn(n).to(dtype), torch.randn(m, k).to(dtype)
    for activation in ("none", "relu", "relu6"):
        for b in (bias, None):
            out = BACKENDS[name].linear(x, *oracle.compress(weight, form), b, weight.shape, activation)
            assert out.dtype == dtype
            assert oracle.error(out, oracle.linear(x, weight, b, activation)) < TOLERANCE[dtype]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 80), st.integers(1, 90), st.integers(1, 300), st.floats(0, 1), st.sampled_from(FORMATS))
def test_any_shape(m, k, n, sparsity, form):
    weight, x = oracle.sparse_weight((n, k), sparsity), torch.randn(m, k)
    out = ops.linear(x, *oracle.compress(weight, form), None, weight.shape)
    assert oracle.error(out, oracle.linear(x, weight, None)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", BACKENDS)
def test_leading_dimensions_strides_and_nothing(name):
    weight, x = oracle.sparse_weight((9, 6), 0.5), torch.randn(6, 4, 3).transpose(0, 2)
    out = BACKENDS[name].linear(x, *oracle.compress(weight, "rows"), None, weight.shape)
    assert oracle.error(out, oracle.linear(x, weight, None)) < TOLERANCE[torch.float32]
    rest = (*oracle.compress(weight, "rows"), None, weight.shape)
    assert BACKENDS[name].linear(torch.randn(6), *rest).shape == (9,)
    assert BACKENDS[name].linear(torch.randn(0, 6), *rest).shape == (0, 9)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
def test_no_weights_at_all(name, form):
    for m, k in ((1, 6), (3, 6), (1, 0), (3, 0)):
        weights = oracle.compress(torch.zeros(9, k), form)
        out = BACKENDS[name].linear(torch.randn(m, k), *weights, torch.ones(9), [9, k])
        assert torch.equal(out, torch.ones(m, 9))


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_what_a_zero_does_not_touch(form, m):
    """An input that no weight meets may be infinite; one that is met and NaN stays NaN under ReLU."""
    weight = torch.zeros(8, 40)
    weight[:, 3] = 1
    x = torch.ones(m, 40)
    x[:, 5:] = float("inf")
    assert torch.equal(ops.linear(x, *oracle.compress(weight, form), None, weight.shape), torch.ones(m, 8))
    x[:, 3] = float("nan")
    assert ops.linear(x, *oracle.compress(weight, form), None, weight.shape, "relu6").isnan().all()


@pytest.mark.parametrize("shape", [(1, 1000, 5000), (128, 500, 700), (600, 100, 500)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, thread_counts):
    m, k, n = shape
    weights, x = oracle.compress(oracle.sparse_weight((n, k), 0.5), "rows"), torch.randn(m, k)
    results = [ops.linear(x, *weights, None, [n, k]) for _ in thread_counts()]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_bits_for_any_batch():
    """The sum of an output does not depend on its place among the samples."""
    weights, x = oracle.compress(oracle.sparse_weight((50, 70), 0.5), "rows"), torch.randn(90, 70)
    assert torch.equal(ops.linear(x, *weights, None, [50, 70])[7:], ops.linear(x[7:], *weights, None, [50, 70]))
