"""Top-k mask selection: bit-exact, so no tolerances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BACKENDS, emulated


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


def adversary(n):
    """Scores that mislead the sample: they fall off steeply, and the same again and again."""
    return torch.cat([torch.full((n // 2,), -torch.inf), torch.logspace(0, -38, 997).repeat(n)[: n - n // 2]])


MANY = 300_003 if emulated() else 1_000_003  # more than the least that is sampled
SCORES = {
    "normal": lambda: torch.randn(MANY),
    "all equal": lambda: torch.ones(MANY),
    "two values": lambda: torch.randint(2, (MANY,)).float(),
    "a thousand values": lambda: torch.randint(1000, (MANY,)).float() / 1000,
    "half pruned before": lambda: torch.where(torch.rand(MANY) < 0.5, -torch.inf, torch.rand(MANY)),
    "sorted": lambda: torch.arange(MANY).float(),
    "one outlier": lambda: torch.zeros(MANY).index_fill(0, torch.tensor([277_777]), 1.0),
    "adversary": lambda: adversary(MANY),
}


@pytest.mark.parametrize("kind", SCORES)
def test_many(kind, thread_counts):
    """More scores than one task or the sample takes; ties across the tasks go to the lower index; any thread count."""
    scores = SCORES[kind]()
    n = len(scores)
    order = torch.sort(scores + 0.0, stable=True).indices
    for k in (0, 1, 2, n // 3, n // 2, n // 2 + 1, n - 1, n):
        wanted = torch.ones(n, dtype=torch.bool).index_fill(0, order[:k], False)
        for threads in thread_counts():
            assert torch.equal(BACKENDS["compiled"].select_smallest(scores, k), wanted), (k, threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_and_weights(backend):
    """Each segment is ranked on its own; the weights of what is pruned become zero, of the rest stay."""
    sizes, k = [5, 0, 200_000, 1, 77], [2, 0, 150_000, 1, 0]
    scores, weights = torch.randint(50, (sum(sizes),)).float(), torch.randn(sum(sizes))
    wanted = torch.cat([expected(part, count) for part, count in zip(scores.split(sizes), k, strict=True)])
    zeroed = weights.clone()
    assert torch.equal(BACKENDS[backend].select_smallest(scores, k, sizes, zeroed), wanted)
    assert torch.equal(zeroed, torch.where(wanted, weights, 0))
    apart = weights.repeat_interleave(2)[::2]  # not contiguous
    BACKENDS[backend].select_smallest(scores, k, sizes, apart)
    assert torch.equal(apart, zeroed)


def test_non_contiguous():
    scores = torch.randn(500)[::3]
    assert torch.equal(BACKENDS["compiled"].select_smallest(scores, 50), expected(scores, 50))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [4, 150_000])
def test_nan_is_refused(backend, at):
    """Wherever it is, and then no segment has been written."""
    scores, weights = torch.ones(200_000), torch.ones(200_000)
    scores[[at, 199_999]] = torch.nan
    with pytest.raises(ValueError, match=f"scores: expected no NaN, got one at index {at}"):
        BACKENDS[backend].select_smallest(scores, [3, 3], [100_000, 100_000], weights)
    assert bool((weights == 1).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [-1, 11])
def test_k_out_of_range(k, backend):
    with pytest.raises(ValueError, match=f"k: expected 0 to 10, got {k}"):
        BACKENDS[backend].select_smallest(torch.ones(10), k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_do_not_fit(backend):
    with pytest.raises(ValueError, match=r"sizes: expected numbers >= 0 that sum to 10, got \[4, 5\]"):
        BACKENDS[backend].select_smallest(torch.ones(10), [1, 1], [4, 5])
    with pytest.raises(ValueError, match="sizes: expected numbers >= 0 that sum to 10"):
        BACKENDS[backend].select_smallest(torch.ones(10), [1, 1, 1], [2**63 - 1, 2**63 - 1, 12])
    with pytest.raises(ValueError, match=r"weights: expected shape \[10\], got \[9\]"):
        BACKENDS[backend].select_smallest(torch.ones(10), 1, None, torch.ones(9))
    with pytest.raises(TypeError, match="weights: expected float32, got"):
        BACKENDS[backend].select_smallest(torch.ones(10), 1, None, torch.ones(10).double())
    with pytest.raises(ValueError, match="k: expected one number for each of the 2 segments"):
        BACKENDS[backend].select_smallest(torch.ones(10), [1], [5, 5])
