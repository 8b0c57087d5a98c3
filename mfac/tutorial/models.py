"""The tutorial's network: MobileNetV1, with the layer names that existing recipes refer to."""

from __future__ import annotations

import torch
from torch import nn

from mfac.checks import check_int, check_number

# (blocks, output channels at width 1.0); the first block of a section has stride 2, except in the first section.
SECTIONS = ((1, 64), (2, 128), (2, 256), (6, 512), (2, 1024))
_MAX_WIDTH = 64  # 12 billion weights


def _scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded to a multiple of 8 (vector registers stay full), at least 8."""
    return max(8, round(channels * width / 8) * 8)


class _ConvBn(nn.Module):
    """Convolution, batch normalisation, ReLU; named `conv` and `bn` as recipes expect."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.bn(self.conv(x)))


class _Block(nn.Module):
    """A depthwise 3x3 convolution (`depth`) and a pointwise 1x1 convolution (`point`)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depth = _ConvBn(inputs, inputs, 3, stride, groups=inputs)
        self.point = _ConvBn(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(self.depth(x))


class _Classifier(nn.Module):
    """Global average pooling and the linear layer `fc`."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean(dim=(2, 3)))


class MobileNetV1(nn.Module):
    """Build MobileNetV1 (Howard et al., 2017, arXiv 1704.04861).

    The layers are named `input.conv`, `input.bn`, `sections.<s>.<b>.depth.{conv,bn}`,
    `sections.<s>.<b>.point.{conv,bn}` and `classifier.fc`, for the five sections of `SECTIONS`.

    Args:
        num_classes: Number of outputs.
        width: Multiplier of all channel counts; each is rounded to a multiple of 8.
        stem_stride: Stride of the first convolution: 2 as published (224 x 224 images), 1 for images of about 32 x 32.

    Raises:
        TypeError: If `width` is not a number, or one of the others not an int.
        ValueError: If `width` is not in (0, 64], `num_classes` is below 1 or `stem_stride` is neither 1 nor 2.

    Example:
        >>> model = MobileNetV1(num_classes=10, width=0.25).eval()
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> model.get_parameter("sections.3.0.point.conv.weight").shape
        torch.Size([128, 64, 1, 1])
    """

    def __init__(self, num_classes: int = 1000, width: float = 1.0, stem_stride: int = 2) -> None:
        super().__init__()
        if check_number("width", width, high=_MAX_WIDTH) <= 0:
            raise ValueError(f"width: expected > 0, got {width}")
        check_int("num_classes", num_classes)
        check_int("stem_stride", stem_stride, 1, 2)
        channels = _scaled(32, width)
        self.input = _ConvBn(3, channels, 3, stem_stride)
        sections = []
        for index, (count, base) in enumerate(SECTIONS):
            outputs = _scaled(base, width)
            blocks = []
            for block in range(count):
                stride = 2 if block == 0 and index > 0 else 1
                blocks.append(_Block(channels, outputs, stride))
                channels = outputs
            sections.append(nn.Sequential(*blocks))
        self.sections = nn.Sequential(*sections)
        self.classifier = _Classifier(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, shape [n, num_classes], of images of shape [n, 3, height, width]."""
        return self.classifier(self.sections(self.input(x)))
