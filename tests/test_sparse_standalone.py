"""The inference kernels compiled without torch, for every instruction set that they know, against the reference.

`make sanitize` runs this file with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import ctypes
from ctypes import c_bool, c_float, c_int64, c_void_p
from math import inf

import pytest
import sparse_oracle as oracle
import standalone
import torch
from sparse_oracle import DTYPES, FORMATS, TOLERANCE
from test_sparse_conv2d import SHAPES as CONVOLUTIONS
from test_sparse_depthwise_conv2d import SIZES
from test_sparse_linear import SHAPES as PRODUCTS
from test_standalone import BUILDS, X86, missing_instructions

SOURCE = standalone.SOURCE.with_name("sparse_standalone.cpp")


@pytest.fixture(scope="module", params=BUILDS if X86 else ["native"])
def library(request, tmp_path_factory):
    arch, width = BUILDS.get(request.param, ("-march=native", 16))
    path = standalone.Kernels.build(tmp_path_factory.mktemp("standalone"), arch, SOURCE)
    if missing := missing_instructions(request.param):
        pytest.skip(f"compiled; this processor cannot run it: no {missing}")
    out = ctypes.CDLL(str(path))
    out.run_linear.restype = c_bool
    assert out.vector_bytes() == width
    return out


def pointers(*tensors):
    return [c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def weights(weight, form):
    """The arguments of a sparse matrix; they hold no reference to the tensors, which are returned too."""
    tensors = oracle.compress(weight, form)
    shape = torch.tensor([weight.shape[0], weight[0].numel(), tensors[1].dim() == 1])
    return [c_bool(weight.dtype == torch.bfloat16), *pointers(*tensors, shape)], (tensors, shape)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_linear(library, shape, dtype, form):
    m, k, n = shape
    weight, bias, x = oracle.sparse_weight((n, k), 0.8, dtype), torch.randn(n).to(dtype), torch.randn(m, k).to(dtype)
    head, kept = weights(weight, form)
    for threads in (1, 3):
        library.set_threads(threads)
        y = torch.empty(m, n, dtype=dtype)
        rest = (*pointers(bias), c_float(0), c_float(6), *pointers(x), c_int64(m), *pointers(y))
        assert library.run_linear(*head, *rest)
        assert oracle.error(y, oracle.linear(x, weight, bias, "relu6")) < TOLERANCE[dtype]
    assert kept


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_conv2d(library, shape, dtype, form):
    images, channels, height, width, n, kernel, stride, padding = shape
    weight = oracle.sparse_weight((n, channels, kernel, kernel), 0.7, dtype)
    x = torch.randn(images, channels, height, width).to(dtype)
    exact = oracle.conv2d(x, weight, None, stride, padding)
    head, kept = weights(weight, form)
    size = torch.tensor([*x.shape, *[kernel] * 2, *[stride] * 2, *[padding] * 2])
    for threads in (1, 3):
        library.set_threads(threads)
        y = torch.empty(exact.shape, dtype=dtype)
        library.run_conv2d(*head, None, c_float(-inf), c_float(inf), *pointers(x, size, y))
        assert oracle.error(y, exact) < TOLERANCE[dtype]
    assert kept


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_depthwise_conv2d(library, size, dtype, stride):
    weight, bias, x = torch.randn(5, 1, 3, 3).to(dtype), torch.randn(5).to(dtype), torch.randn(2, 5, *size).to(dtype)
    exact = oracle.conv2d(x, weight, bias, stride, 1, "relu", groups=5)
    shape, y = torch.tensor([*x.shape, stride]), torch.empty(exact.shape, dtype=dtype)
    library.set_threads(1)
    half = c_bool(dtype == torch.bfloat16)
    library.run_depthwise_conv2d(half, *pointers(weight, bias), c_float(0), c_float(inf), *pointers(x, shape, y))
    assert oracle.error(y, exact) < TOLERANCE[dtype]
