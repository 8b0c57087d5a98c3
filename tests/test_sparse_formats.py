"""The compressed form: what goes in comes out, and what it takes."""

import pytest
import sparse_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_oracle import DTYPES, FORMATS

from mfac.sparse.formats import MAX_INPUTS, WINDOW_ROWS, slice_matrix


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 60), st.floats(0, 1), st.sampled_from(FORMATS), st.sampled_from(DTYPES))
def test_round_trip(n, k, sparsity, form, dtype):
    weight = (torch.randn(n, k) * (torch.rand(n, k) >= sparsity)).to(dtype)
    sliced = slice_matrix(weight, form)
    assert sliced.format == form or (form == "rows" and not len(sliced.values))
    assert torch.equal(sliced.to_dense(n, k), weight)
    assert sliced.values.dtype == dtype and sliced.columns.dtype == torch.int16
    kept = sliced.order >= 0
    assert torch.equal(sliced.order[kept].sort().values, torch.arange(n, dtype=torch.int32))
    places = torch.arange(len(sliced.order))
    assert torch.equal(sliced.order[kept] // WINDOW_ROWS, (places // WINDOW_ROWS)[kept].int())


def test_size():
    """6 bytes per weight, and few zeros beside; 18 per block of four."""
    weight = torch.randn(512, 512) * (torch.rand(512, 512) < 0.1)
    entries = int(torch.count_nonzero(weight))
    assert 6 * entries < slice_matrix(weight, "rows").nbytes < 6.5 * entries
    blocks = torch.randn(512, 512) * (torch.rand(128, 512) < 0.1).repeat_interleave(4, 0)
    assert slice_matrix(blocks, "blocks").nbytes < 4.6 * int(torch.count_nonzero(blocks)) + 3000


def test_nan_is_a_weight():
    weight = torch.tensor([[0.0, float("nan")]])
    assert slice_matrix(weight, "rows").to_dense(1, 2).isnan().tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("weight", "layout", "error", "message"),
    [
        (torch.randn(2, 2), "csr", ValueError, "layout: expected one of rows, blocks, got 'csr'"),
        (torch.randn(2, 2).double(), "rows", TypeError, "weight: expected float32 or bfloat16, got torch.float64"),
        (torch.randn(2), "rows", ValueError, r"weight: expected shape \[N, K\] with K <= 32766, got \[2\]"),
        (torch.zeros(1, MAX_INPUTS + 1), "rows", ValueError, r"K <= 32766, got \[1, 32767\]"),
        ([[1.0]], "rows", TypeError, "weight: expected a tensor, got list"),
    ],
)
def test_errors(weight, layout, error, message):
    with pytest.raises(error, match=message):
        slice_matrix(weight, layout)


def test_most_inputs():
    weight = torch.zeros(3, MAX_INPUTS)
    weight[1, -1] = 2
    from mfac.sparse import compiled

    for m in (1, 3):
        out = compiled.linear(torch.ones(m, MAX_INPUTS), *oracle.compress(weight, "rows"), None, weight.shape)
        assert out.tolist() == [[0, 2, 0]] * m
