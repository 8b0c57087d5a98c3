"""Convolutions by sparse weights: kernel and reference against dense float64."""

import pytest
import sparse_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_oracle import BACKENDS, DTYPES, FORMATS, TOLERANCE

from mfac.sparse import compiled as ops

# (images, channels, height, width, outputs, kernel, stride, padding): 1 x 1 with tiles within and across images, many
# and few tiles, planes of one pixel; larger kernels, strides, borders wider than the plane.
SHAPES = [
    (1, 40, 14, 14, 64, 1, 1, 0), (1, 20, 56, 56, 33, 1, 1, 0), (3, 20, 7, 7, 10, 1, 1, 0), (40, 130, 1, 1, 9, 1, 1, 0),
    (1, 3, 33, 32, 32, 3, 2, 1), (2, 3, 9, 7, 6, 3, 1, 1), (1, 4, 8, 9, 5, 5, 3, 2), (2, 4, 8, 9, 5, 1, 2, 0),
    (1, 2, 2, 1, 3, 3, 1, 2), (2, 5, 6, 40, 131, 3, 1, 0), (1, 2, 9, 9, 4, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(name, shape, dtype, form):
    images, channels, height, width, n, kernel, stride, padding = shape
    weight = oracle.sparse_weight((n, channels, kernel, kernel), 0.7, dtype)
    bias, x = torch.randn(n).to(dtype), torch.randn(images, channels, height, width).to(dtype)
    for b, activation in ((bias, "relu"), (bias, "relu6"), (None, "none")):
        out = BACKENDS[name].conv2d(
            x, *oracle.compress(weight, form), b, weight.flatten(1).shape,
            [kernel] * 2, [stride] * 2, [padding] * 2, activation,
        )  # fmt: skip
        exact = oracle.conv2d(x, weight, b, stride, padding, activation)
        assert out.dtype == dtype and out.is_contiguous()
        assert oracle.error(out, exact) < TOLERANCE[dtype]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 3), st.integers(1, 9), st.tuples(st.integers(5, 20), st.integers(5, 70)), st.integers(1, 140),
    st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(FORMATS),
)  # fmt: skip
def test_any_shape(images, channels, size, n, kernel, stride, padding, form):
    weight, x = oracle.sparse_weight((n, channels, *kernel), 0.6), torch.randn(images, channels, *size)
    out = ops.conv2d(x, *oracle.compress(weight, form), None, weight.flatten(1).shape, kernel, stride, padding)
    assert oracle.error(out, oracle.conv2d(x, weight, None, stride, padding)) < TOLERANCE[torch.float32]


def test_channels_last_and_nothing():
    weight, x = oracle.sparse_weight((9, 6, 1, 1), 0.5), torch.randn(2, 6, 5, 4)
    rest = (*oracle.compress(weight, "rows"), None, weight.flatten(1).shape, [1, 1], [1, 1], [0, 0])
    assert torch.equal(ops.conv2d(x.to(memory_format=torch.channels_last), *rest), ops.conv2d(x, *rest))
    assert ops.conv2d(x[:0], *rest).shape == (0, 9, 5, 4)


@pytest.mark.parametrize("shape", [(1, 100, 14, 14, 300, 1), (4, 30, 40, 40, 64, 1), (1, 16, 30, 30, 150, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, thread_counts):
    images, channels, height, width, n, kernel = shape
    weights = oracle.compress(oracle.sparse_weight((n, channels, kernel, kernel), 0.3), "rows")
    x = torch.randn(images, channels, height, width)
    rest = (*weights, None, [n, channels * kernel**2], [kernel] * 2, [1, 1], [0, 0])
    results = [ops.conv2d(x, *rest) for _ in thread_counts()]
    assert all(torch.equal(results[0], other) for other in results[1:])
