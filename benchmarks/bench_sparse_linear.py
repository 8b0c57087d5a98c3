"""A Linear 1024 -> 4096 with 90 % zeros, and with half of its 4 x 1 blocks zero, against torch's dense one.

Flops are those of the weights that are left; bytes: inputs, outputs and the weights, 6 bytes each, 4.5 in blocks.
"""

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import compress, in_turns, sparse_weight

from mfac.sparse import compiled, reference

K, N = 1024, 4096
TARGETS = {(1, "rows"): 4, (128, "rows"): 1.5, (128, "blocks"): 1}


@pytest.mark.benchmark(group="sparse Linear 1024 -> 4096")
@pytest.mark.parametrize(("batch", "form"), TARGETS)
def test_linear(measure, threads, batch, form):
    compiled.load()
    rows = form == "rows"
    weight = sparse_weight((N, K), 0.9) if rows else torch.randn(N, K)
    if not rows:
        weight *= (torch.rand(N // 4, K) < 0.5).repeat_interleave(4, 0)
    x, bias = torch.randn(batch, K), torch.randn(N)
    rest, entries = (*compress(weight, form), bias, [N, K]), int(torch.count_nonzero(weight))
    times = in_turns({"dense": lambda: F.linear(x, weight, bias), "ours": lambda: compiled.linear(x, *rest)})
    measure(
        lambda: compiled.linear(x, *rest), flops=2 * entries * batch, rounds=20,
        bytes=4 * batch * (K + N) + (6 if rows else 4.5) * entries,
        error=float((compiled.linear(x, *rest) - reference.linear(x, *rest)).abs().max()),
        by=f"{form}, batch {batch}, threads: {threads}", targets={"dense": TARGETS[batch, form]},
        ratios={"dense": times["dense"] / times["ours"]},
    )  # fmt: skip
