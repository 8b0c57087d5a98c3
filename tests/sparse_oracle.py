"""What the tests of sparse inference compare with: dense float64 products, and their tolerances."""

import torch
import torch.nn.functional as F

from mfac.sparse import compiled, reference
from mfac.sparse.formats import slice_matrix

compiled.load()

BACKENDS = {"compiled": compiled, "reference": reference}
FORMATS = ("rows", "blocks")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest output: a bfloat16 result is rounded once


def sparse_weight(shape, sparsity, dtype=torch.float32):
    """Random weights of which about so many are zero, among them whole rows."""
    weight = torch.randn(shape) * (torch.rand(shape) >= sparsity)
    weight[1 :: max(2, shape[0] // 3)] = 0
    return weight.to(dtype)


def compress(weight, form):
    """The four tensors that the ops take."""
    m = slice_matrix(weight.flatten(1), form)
    return m.values, m.columns, m.pointers, m.order


def activate(x, activation):
    return {"none": lambda t: t, "relu": torch.relu, "relu6": F.relu6}[activation](x)


def double(t):
    return None if t is None else t.double()


def linear(x, weight, bias, activation="none"):
    return activate(F.linear(x.double(), weight.double(), double(bias)), activation)


def conv2d(x, weight, bias, stride, padding, activation="none", groups=1):
    return activate(F.conv2d(x.double(), weight.double(), double(bias), stride, padding, groups=groups), activation)


def error(out, exact):
    """Largest difference, relative to the largest output."""
    if out.shape != exact.shape:
        return float("inf")
    size = float(exact.abs().max()) if exact.numel() else 1.0
    return float((out.double() - exact).abs().max()) / (size or 1.0) if exact.numel() else 0.0
