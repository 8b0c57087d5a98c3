"""The networks of `mfac train`: MobileNetV1 with the layer names that recipes refer to, and those of other packages."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mfac.checks import check_instance, check_int, check_number, suggestion
from mfac.tutorial.data import IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD

# (blocks, output channels at width 1.0); the first block of a section has stride 2, except in the first section.
SECTIONS = ((1, 64), (2, 128), (2, 256), (6, 512), (2, 1024))
MAX_WIDTH = 64  # 12 billion weights
_SMALL = 64  # images up to this size pass the first convolution with stride 1


def _scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded to a multiple of 8 (vector registers stay full), at least 8."""
    return max(8, round(channels * width / 8) * 8)


class _ConvBn(nn.Module):
    """Convolution, batch normalisation, ReLU (or ReLU6); named `conv` and `bn` as recipes expect."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu6: bool = False
    ) -> None:
        super().__init__()
        self.relu6 = relu6
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        return F.relu6(x, inplace=True) if self.relu6 else torch.relu_(x)


class _Block(nn.Module):
    """A depthwise 3x3 convolution (`depth`) and a pointwise 1x1 convolution (`point`)."""

    def __init__(self, inputs: int, outputs: int, stride: int, relu6: bool) -> None:
        super().__init__()
        self.depth = _ConvBn(inputs, inputs, 3, stride, groups=inputs, relu6=relu6)
        self.point = _ConvBn(inputs, outputs, 1, relu6=relu6)

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
        relu6: Cut the activations off at 6, as the weights of timm expect.

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

    def __init__(self, num_classes: int = 1000, width: float = 1.0, stem_stride: int = 2, relu6: bool = False) -> None:
        super().__init__()
        self.relu6 = relu6
        if check_number("width", width, high=MAX_WIDTH) <= 0:
            raise ValueError(f"width: expected > 0, got {width}")
        check_int("num_classes", num_classes)
        check_int("stem_stride", stem_stride, 1, 2)
        channels = _scaled(32, width)
        self.input = _ConvBn(3, channels, 3, stem_stride, relu6=relu6)
        sections = []
        for index, (count, base) in enumerate(SECTIONS):
            outputs = _scaled(base, width)
            blocks = []
            for block in range(count):
                stride = 2 if block == 0 and index > 0 else 1
                blocks.append(_Block(channels, outputs, stride, relu6))
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


_TIMM_MOBILENET = "mobilenetv1_100"  # ReLU6; its images are normalised with mean and standard deviation 0.5
_FROM_TIMM = (
    (re.compile(r"conv_stem\."), "input.conv."),
    (re.compile(r"bn1\."), "input.bn."),
    (re.compile(r"blocks\.(\d+)\.(\d+)\.conv_dw\."), r"sections.\1.\2.depth.conv."),
    (re.compile(r"blocks\.(\d+)\.(\d+)\.bn1\."), r"sections.\1.\2.depth.bn."),
    (re.compile(r"blocks\.(\d+)\.(\d+)\.conv_pw\."), r"sections.\1.\2.point.conv."),
    (re.compile(r"blocks\.(\d+)\.(\d+)\.bn2\."), r"sections.\1.\2.point.bn."),
    (re.compile(r"classifier\."), "classifier.fc."),
)


def mobilenet_from_timm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of timm's MobileNetV1 to those of :class:`MobileNetV1` (with ``relu6=True``).

    Args:
        state: The state_dict of ``timm.create_model("mobilenetv1_100")``.

    Returns:
        The state_dict by our names.

    Raises:
        ValueError: If it is of another network.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        for pattern, ours in _FROM_TIMM:
            if pattern.match(name):
                renamed[pattern.sub(ours, name, count=1)] = value
                break
        else:
            raise ValueError(f"state: expected the names of timm's {_TIMM_MOBILENET}, got {name!r:.80}")
    return renamed


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Which network a model is: what a file must say beside the weights, so that it can be built again and used."""

    arch_key: str
    num_classes: int
    width: float | None  # multiplier of the channels, of mobilenet only
    stem_stride: int | None  # stride of the first convolution, of mobilenet only
    relu6: bool  # activations cut off at 6
    image_size: int  # height and width of the images that it was trained on
    mean: tuple[float, ...]  # subtracted from the three channels of an image, whose pixels are in [0, 1]
    std: tuple[float, ...]  # they are then divided by it


@dataclass(frozen=True)
class Built:
    """A network and its description."""

    model: nn.Module
    spec: NetworkSpec


def stem_stride(image_size: int) -> int:
    """Return the stride of MobileNet's first convolution that suits images of this height and width."""
    return 1 if image_size <= _SMALL else 2


def build_model(
    arch_key: str,
    num_classes: int,
    *,
    width: float | None = None,
    image_size: int = IMAGE_SIZE,
    pretrained: bool = False,
    described: Mapping[str, Any] | None = None,
) -> Built:
    """Build a network by its name.

    Args:
        arch_key: ``mobilenet``, a name of torchvision.models or of timm, or ``package.module:function``, a function
            that takes ``num_classes`` (and ``pretrained``, if it is True) and returns a module.
        num_classes: Number of outputs.
        width: Multiplier of the channels, of mobilenet; None: 1.
        image_size: Height and width of the images, which decide the stride of mobilenet's first convolution.
        pretrained: With the weights of its package; for mobilenet those of timm, for images of 224 x 224.
        described: What a file, whose weights are to be loaded, says of its network: fields of :class:`NetworkSpec`.
            Stride, activation and normalisation are taken from it.

    Returns:
        The network; a classifier for another number of classes than the weights' is random.

    Raises:
        TypeError: If a function does not return a module.
        ValueError: If there is no such network, it has no width, or there are no pretrained weights for it.
        ImportError: If the package of the pretrained weights is not installed, or a function cannot be imported.
    """
    described = described or {}
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if arch_key != "mobilenet":
        stride = None
        model, mean, std = _from_package(arch_key, num_classes, pretrained)
        if width is not None:
            raise ValueError(f"width: expected none for another network than mobilenet, got {width:g} for {arch_key}")
    else:
        width = 1.0 if width is None else width
        stride = described.get("stem_stride", stem_stride(image_size))
        if pretrained:
            model, mean, std = _pretrained_mobilenet(num_classes, width, stride)
        else:
            model = MobileNetV1(num_classes, width, stride, described.get("relu6", False))
    spec = NetworkSpec(
        arch_key=arch_key,
        num_classes=num_classes,
        width=width,
        stem_stride=stride,
        relu6=getattr(model, "relu6", False),
        image_size=image_size,
        mean=tuple(described.get("mean", mean)),
        std=tuple(described.get("std", std)),
    )
    return Built(model, spec)


# A network, mean and standard deviation of its images.
_ModelAndNorm = tuple[nn.Module, tuple[float, ...], tuple[float, ...]]


def _pretrained_mobilenet(num_classes: int, width: float, stride: int) -> _ModelAndNorm:
    if width != 1 or stride != 2:
        raise ValueError(
            "pretrained: expected width 1 and images of more than 64 x 64 for pretrained weights, got width "
            f"{width:g}{'' if stride == 2 else ' and images of 64 x 64 or less'}"
        )
    source = _import("timm", "the pretrained weights").create_model(_TIMM_MOBILENET, pretrained=True)
    model = MobileNetV1(num_classes, relu6=True)
    _load_matching(model, mobilenet_from_timm(source.state_dict()))
    return model, (0.5,) * 3, (0.5,) * 3


def _from_package(arch_key: str, num_classes: int, pretrained: bool) -> _ModelAndNorm:
    """Build a network of another package."""
    if ":" in arch_key:
        return _from_function(arch_key, num_classes, pretrained), IMAGENET_MEAN, IMAGENET_STD
    missing = []
    for package, build in (("torchvision", _torchvision), ("timm", _timm)):
        try:
            module = importlib.import_module(package)
        except ImportError:
            missing.append(package)
            continue
        parts = build(module, arch_key, num_classes, pretrained)
        if parts is not None:
            return parts
    install = f" (not installed: {' and '.join(missing)})" if missing else ""
    raise ValueError(
        f"arch_key: expected mobilenet, a name of torchvision or timm{install}, or package.module:function, got "
        f"{arch_key!r:.80}{suggestion(arch_key, ['mobilenet'])}"
    )


def _from_function(arch_key: str, num_classes: int, pretrained: bool) -> nn.Module:
    """Call a function of the user's own."""
    module, _, function = arch_key.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ImportError(f"arch_key: expected a function of an installed module, got {arch_key!r}: {error}") from error
    except (TypeError, ValueError) as error:  # of a relative or empty name
        raise ValueError(f"arch_key: expected package.module:function, got {arch_key!r}") from error
    if not callable(factory):
        raise ValueError(f"arch_key: expected a function {function!r} of {module}, got none")
    arguments = {"num_classes": num_classes, **({"pretrained": True} if pretrained else {})}
    try:
        inspect.signature(factory).bind(**arguments)
    except (TypeError, ValueError) as error:  # a ValueError of a function in C
        raise ValueError(
            f"arch_key: expected a function that takes {' and '.join(arguments)}, got {arch_key!r}: {error}"
        ) from error
    return check_instance("arch_key", factory(**arguments), nn.Module, "a function that returns a torch.nn.Module")


def _import(package: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package}, which has {what}, is not installed: pip install {package}") from error


def _torchvision(package: ModuleType, name: str, num_classes: int, pretrained: bool) -> _ModelAndNorm | None:
    if name not in package.models.list_models():
        return None
    model = package.models.get_model(name, num_classes=num_classes)
    if pretrained:
        _load_matching(model, package.models.get_model(name, weights="DEFAULT").state_dict())
    return model, IMAGENET_MEAN, IMAGENET_STD


def _timm(package: ModuleType, name: str, num_classes: int, pretrained: bool) -> _ModelAndNorm | None:
    if not package.is_model(name):
        return None
    model = package.create_model(name, num_classes=num_classes, pretrained=pretrained)
    return model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def _load_matching(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load the weights whose shapes fit: all but those of a classifier for another number of classes."""
    own = model.state_dict()
    model.load_state_dict({name: state[name] if state[name].shape == own[name].shape else own[name] for name in own})
