"""What the benchmarks of sparse inference share: MobileNetV1 by the tutorial's recipe, and times taken in turns."""

import time

import torch
from torch import nn

from mfac.sparse.formats import slice_matrix
from mfac.tutorial.models import MobileNetV1

# The 12 pruned point convolutions of MobileNetV1 at 224 x 224: (outputs, inputs, height), how often.
POINTWISE = {
    (128, 64, 56): 1, (128, 128, 56): 1, (256, 128, 28): 1, (256, 256, 28): 1, (512, 256, 14): 1, (512, 512, 14): 5,
    (1024, 512, 7): 1, (1024, 1024, 7): 1,
}  # fmt: skip
RECIPE = {0.90: "1.0 1.1 2.0", 0.95: "2.1 3.0 3.1 3.5", 0.97: "3.2 3.3 3.4 4.0 4.1"}  # recipes/mfac.md: 96.4 %
SECONDS = 3  # of taking turns


def in_turns(functions, seconds=SECONDS):
    """The shortest time of each function, in seconds, all of them called in turns: other work disturbs all alike."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def sparse_weight(shape, sparsity):
    return torch.randn(shape) * (torch.rand(shape) >= sparsity)


def compress(weight, form="rows"):
    m = slice_matrix(weight.flatten(1), form)
    return m.values, m.columns, m.pointers, m.order


def pruned_mobilenet():
    """MobileNetV1 at width 1 with the recipe's sparsities, at random, in eval mode with statistics of its own."""
    torch.manual_seed(0)
    model = MobileNetV1()
    for sparsity, names in RECIPE.items():
        for name in names.split():
            weight = model.get_submodule(f"sections.{name}.point.conv").weight
            weight.data.view(-1)[torch.randperm(weight.numel())[: round(sparsity * weight.numel())]] = 0
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, 3, 224, 224))
    assert [type(m) for m in model.modules()].count(nn.BatchNorm2d) == 27
    return model.eval()
