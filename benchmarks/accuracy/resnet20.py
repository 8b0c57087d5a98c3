"""A CIFAR ResNet-20, its images, and its accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Create the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet20(nn.Module):
    """He, Zhang, Ren, Sun 2015, section 4.2, with 1x1 convolutions as shortcuts."""

    def __init__(self, classes: int = 10) -> None:
        """Create the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def load_model(checkpoint: Path) -> ResNet20:
    """Return the network with the weights of a state_dict, in eval mode."""
    model = ResNet20()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.to(memory_format=torch.channels_last).eval()


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images [n, 3, height, width] uint8 and targets [n] of a tree <folder>/<class>/<file>."""
    images, targets = [], []
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for target, path in enumerate(classes):
        for file in sorted(path.iterdir()):
            images.append(np.asarray(Image.open(file).convert("RGB")))
            targets.append(target)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)


def normalize(images: Tensor) -> Tensor:
    """Return (x / 255 - 0.5) / 0.5 as float32."""
    return images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def endless_batches(images: Tensor, targets: Tensor, seed: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in an order of the seed, epoch after epoch; no augmentation."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // size * size].split(size):
            yield normalize(images[batch]), targets[batch]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return the top-1 accuracy in per cent, in eval mode."""
    model.eval()
    pairs = zip(images.split(500), targets.split(500), strict=True)
    hits = sum(int((model(normalize(x)).argmax(1) == y).sum()) for x, y in pairs)
    return 100 * hits / len(targets)
