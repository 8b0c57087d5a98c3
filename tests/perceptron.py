"""A small model with BatchNorm, and batches for it, that the tests of mfac.prune share."""

import torch
from torch import nn


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5))


def make_batches(count=60, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 10, generator=generator)
    return [(a, a[:, :5].argmax(1)) for a in x]
