"""Depthwise 3 x 3 convolutions: kernel and reference against dense float64."""

import pytest
import sparse_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_oracle import BACKENDS, DTYPES, TOLERANCE

from mfac.sparse import compiled as ops

SIZES = [(1, 1), (1, 40), (40, 1), (2, 2), (7, 7), (14, 14), (15, 16), (16, 17), (9, 33), (33, 9), (56, 56), (65, 130)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(name, size, dtype, stride):
    weight, x = torch.randn(5, 1, 3, 3).to(dtype), torch.randn(2, 5, *size).to(dtype)
    bias = torch.randn(5).to(dtype)
    for b, activation in ((bias, "relu"), (bias, "relu6"), (None, "none")):
        out = BACKENDS[name].depthwise_conv2d(x, weight, b, stride, activation)
        exact = oracle.conv2d(x, weight, b, stride, 1, activation, groups=5)
        assert out.dtype == dtype and out.is_contiguous()
        assert oracle.error(out, exact) < TOLERANCE[dtype]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 80), st.integers(1, 80), st.integers(1, 2))
def test_any_size(channels, height, width, stride):
    weight, x = torch.randn(channels, 1, 3, 3), torch.randn(1, channels, height, width)
    out = ops.depthwise_conv2d(x, weight, None, stride)
    assert oracle.error(out, oracle.conv2d(x, weight, None, stride, 1, groups=channels)) < TOLERANCE[torch.float32]


def test_the_border_is_zero_whatever_lies_there():
    """Planes lie side by side: what is beyond a row's end is another row's."""
    x = torch.full((1, 3, 20, 20), float("inf"))
    x[:, 1] = 1
    out = ops.depthwise_conv2d(x, torch.ones(3, 1, 3, 3), None, 1)
    assert float(out[0, 1].max()) == 9 and float(out[0, 1, 0, 0]) == 4
    assert float(ops.depthwise_conv2d(x, torch.ones(3, 1, 3, 3), None, 2)[0, 1, 0, 0]) == 4


def test_same_bits_for_any_number_of_threads(thread_counts):
    x, weight = torch.randn(2, 70, 50, 50), torch.randn(70, 1, 3, 3)
    results = [ops.depthwise_conv2d(x, weight, None, 1) for _ in thread_counts()]
    assert all(torch.equal(results[0], other) for other in results[1:])
