"""Mask of the 90 % smallest of 25 million scores. Floor: one read of the scores, one write of the mask."""

import pytest
import torch

from mfac import ops

N, K = 25_000_000, 22_500_000


def kthvalue(scores, k):
    return scores > torch.kthvalue(scores, k).values


WAYS = {"torch.kthvalue and compare": kthvalue, "compiled": lambda scores, k: ops.select_smallest(scores, k)}


@pytest.mark.benchmark(group="selection of 22.5 among 25 million")
@pytest.mark.parametrize("way", WAYS)
def test_select_smallest(measure, way):
    ops.load()
    scores = torch.randn(N).abs()
    measure(lambda: WAYS[way](scores, K), bytes=5 * N, n=N, k=K)
