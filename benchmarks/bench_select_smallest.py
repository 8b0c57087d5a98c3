"""Mask of the 90 % smallest of 25 million scores. Floor: one read of the scores."""

import pytest
import torch

from mfac.ops import compiled as ops

N, K = 25_000_000, 22_500_000


def kthvalue(scores, k):
    return scores > torch.kthvalue(scores, k).values


WAYS = {"torch.kthvalue and compare": kthvalue, "compiled": ops.select_smallest}


@pytest.fixture(scope="module")
def scores():
    return torch.randn(N, generator=torch.Generator().manual_seed(0)).abs()


@pytest.mark.benchmark(group="selection of 22.5 among 25 million")
@pytest.mark.parametrize("way", WAYS)
def test_select_smallest(measure, scores, way):
    """The error is the number of weights too many or too few (ties, for kthvalue)."""
    targets = {"kthvalue": 10, "reads": 6} if way == "compiled" else {}
    error = abs(int((~WAYS[way](scores, K)).sum()) - K)
    measure(lambda: WAYS[way](scores, K), bytes=4 * N, error=error, targets=targets)
