"""The 12 pruned 1 x 1 convolutions of MobileNetV1, batch 1, unstructured zeros, against torch's better layout.

Flops are those of the weights that are left; bytes: inputs, outputs and the weights, 6 bytes each.
"""

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import POINTWISE, compress, in_turns, sparse_weight

from mfac.sparse import compiled, reference

TARGETS = {0.9: 2.5, 0.95: 4.5}
GROUP = "sparse 1 x 1 convolutions of MobileNetV1"


@pytest.mark.benchmark(group=GROUP)
@pytest.mark.parametrize("sparsity", TARGETS)
def test_conv2d(measure, threads, sparsity):
    compiled.load()
    layers, ratios, worst, flops, size = [], [0.0, 0.0], 0.0, 0, 0
    for (n, k, h), count in POINTWISE.items():
        weight, x, bias = sparse_weight((n, k, 1, 1), sparsity), torch.randn(1, k, h, h), torch.randn(n)
        last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
        rest = (*compress(weight), bias, [n, k], [1, 1], [1, 1], [0, 0])
        times = in_turns(
            {
                "nchw": lambda x=x, w=weight, b=bias: F.conv2d(x, w, b),
                "nhwc": lambda a=last, b=bias: F.conv2d(*a, b),
                "ours": lambda x=x, a=rest: compiled.conv2d(x, *a),
            },
            0.5,
        )
        ratios[0] += count * min(times["nchw"], times["nhwc"])
        ratios[1] += count * times["ours"]
        worst = max(worst, float((compiled.conv2d(x, *rest) - reference.conv2d(x, *rest)).abs().max()))
        flops += count * 2 * int(torch.count_nonzero(weight)) * h * h
        size += count * (4 * (n + k) * h * h + 6 * int(torch.count_nonzero(weight)))
        layers += [(x, rest)] * count
    measure(
        lambda: [compiled.conv2d(x, *rest) for x, rest in layers], flops=flops, bytes=size, error=worst, rounds=20,
        by=f"compiled, {sparsity:.0%}, threads: {threads}", targets={"dense": TARGETS[sparsity]},
        ratios={"dense": ratios[0] / ratios[1]},
    )  # fmt: skip
