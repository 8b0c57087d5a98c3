"""Top-k mask selection: bit-exact, so no tolerances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS


def expected(scores, k):
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[torch.sort(scores + 0.0, stable=True).indices[:k]] = False  # -0 + 0 = +0
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), max_size=60), st.data())
@settings(max_examples=150, deadline=None)
def test_any_floats(backend, values, data):
    """Ties, zeros of both signs, infinities, subnormals, all equal, k = 0, k = n."""
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(BACKENDS[backend].select_smallest(scores, k), expected(scores, k))


@pytest.mark.parametrize("distinct", [1, 2, 1000, None])
def test_many(distinct):
    """More scores than one task takes; ties across the tasks go to the lower index, for any number of threads."""
    n, before = 1_000_003, torch.get_num_threads()
    scores = torch.randn(n) if distinct is None else torch.randint(distinct, (n,)).float() / distinct
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for k in (0, 1, n // 3, n - 1, n):
                assert torch.equal(BACKENDS["compiled"].select_smallest(scores, k), expected(scores, k))
    finally:
        torch.set_num_threads(before)


def test_non_contiguous():
    scores = torch.randn(500)[::3]
    assert torch.equal(BACKENDS["compiled"].select_smallest(scores, 50), expected(scores, 50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_refused(backend):
    scores = torch.ones(10)
    scores[[4, 7]] = torch.nan
    with pytest.raises(ValueError, match="scores: expected no NaN, got one at index 4"):
        BACKENDS[backend].select_smallest(scores, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [-1, 11])
def test_k_out_of_range(k, backend):
    with pytest.raises(ValueError, match=f"k: expected 0 to 10, got {k}"):
        BACKENDS[backend].select_smallest(torch.ones(10), k)
