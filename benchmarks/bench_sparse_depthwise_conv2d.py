"""Depthwise 3 x 3 convolutions of MobileNetV1 in NCHW, dense, against torch's better layout: to stay in one layout."""

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import in_turns

from mfac.sparse import compiled, reference

SHAPES = [(32, 112, 1), (128, 56, 1), (128, 56, 2), (512, 14, 1)]


@pytest.mark.benchmark(group="depthwise 3 x 3")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise_conv2d(measure, threads, shape):
    compiled.load()
    channels, size, stride = shape
    x, weight, bias = torch.randn(1, channels, size, size), torch.randn(channels, 1, 3, 3), torch.randn(channels)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    times = in_turns(
        {
            "nchw": lambda: F.conv2d(x, weight, bias, stride, 1, 1, channels),
            "nhwc": lambda: F.conv2d(*last, bias, stride, 1, 1, channels),
            "ours": lambda: compiled.depthwise_conv2d(x, weight, bias, stride),
        },
        1,
    )
    out = compiled.depthwise_conv2d(x, weight, bias, stride)
    measure(
        lambda: compiled.depthwise_conv2d(x, weight, bias, stride), flops=18 * out.numel(), rounds=20,
        bytes=4 * (x.numel() + out.numel()), by=f"{shape}, threads: {threads}", targets={"dense": 1},
        error=float((out - reference.depthwise_conv2d(x, weight, bias, stride)).abs().max()),
        ratios={"dense": min(times["nchw"], times["nhwc"]) / times["ours"]},
    )  # fmt: skip
