"""A CIFAR ResNet-20, its images, its accuracy, and runs of it side by side."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm


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


def load_model(checkpoint: Path, device: str = "cpu") -> ResNet20:
    """Return the network with the weights of a state_dict, in eval mode."""
    model = ResNet20()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.to(device, memory_format=torch.channels_last).eval()


def record(model: nn.Module, training: bool, size: int) -> None:
    """Let a model on CUDA replay its kernels, without Python between them, for batches of one size in one mode.

    The mode is the model's own: modules are not asked for theirs. Autocast is recorded as it is at this call, with
    ``cache_enabled=False``. All other calls go on as before.
    """
    plain, buffers = model.forward, {name: value.clone() for name, value in model.named_buffers()}
    images = torch.zeros(size, 3, 32, 32, device=model.conv1.weight.device).contiguous(
        memory_format=torch.channels_last
    )
    torch.cuda.make_graphed_callables(model.train(training), (images,))
    replay = model.forward
    for name, value in model.named_buffers():
        value.copy_(buffers[name])
    model.forward = lambda x: (replay if model.training == training and len(x) == size else plain)(x)


def load_images(data: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images [n, 3, height, width] uint8 and targets [n] of one half of a dataset.

    Args:
        data: A tree train/<class>/<file>, val/<class>/<file>; or CIFAR-10's python version as it is distributed and as
            torchvision unpacks it: ``cifar-10-batches-py`` or the folder that holds it.
        train: The training images, or those for validation (test).
    """
    batches = data if data.name == "cifar-10-batches-py" else data / "cifar-10-batches-py"
    if batches.is_dir():
        images, targets = [], []
        for name in [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]:
            with (batches / name).open("rb") as file:
                content = pickle.load(file, encoding="bytes")
            images.append(torch.from_numpy(content[b"data"]).view(-1, 3, 32, 32))
            targets += content[b"labels"]
        return torch.cat(images), torch.tensor(targets)
    folder = data / ("train" if train else "val")
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


def endless_batches(
    images: Tensor, targets: Tensor, seed: int, size: int = 32, augment: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in an order of the seed, epoch after epoch.

    Args:
        images: [n, 3, height, width] uint8.
        targets: [n].
        seed: Of the order, and of the augmentation.
        size: Of a batch.
        augment: Shift by up to 4 pixels and mirror half of the images, as in training (He et al. 2015, section 4.2).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = images.shape[2:]
    while True:
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // size * size].split(size):
            chosen = images[batch]
            if augment:
                padded = F.pad(chosen, (4, 4, 4, 4))
                corners = torch.randint(0, 9, (size, 2), generator=generator).tolist()
                chosen = torch.stack(
                    [x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)]
                )
                mirrored = torch.rand(size, generator=generator) < 0.5
                chosen[mirrored] = chosen[mirrored].flip(3)
            yield normalize(chosen), targets[batch]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Return the top-1 accuracy in per cent, in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    pairs = zip(images.split(500), targets.split(500), strict=True)
    hits = sum(int((model(normalize(x.to(device))).argmax(1) == y.to(device)).sum()) for x, y in pairs)
    return 100 * hits / len(targets)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation; nothing of nothing."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def options_parser(text: str, sparsities: Sequence[float], methods: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser of the options of both programs.

    Args:
        text: What the program does.
        sparsities: The default.
        methods: All of them, which is the default.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--checkpoint", type=Path, required=True, help="state_dict of the dense ResNet-20")
    parser.add_argument("--sparsities", type=float, nargs="+", default=sparsities)
    parser.add_argument("--methods", nargs="*", choices=list(methods), default=list(methods))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser


def run_all(plan: list[dict], log: Path, load: Callable, arguments: tuple, jobs: int) -> list[dict]:
    """Run what the log does not have yet, and append each run's row as it ends.

    Args:
        plan: The keys of the runs: what a row must hold to be one of them.
        log: A row of JSON per run.
        load: `load(*arguments)` returns a function of a key that returns the row; once per process.
        arguments: Its arguments.
        jobs: Processes.

    Returns:
        All rows of the log.
    """

    def done() -> list[dict]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    log.parent.mkdir(parents=True, exist_ok=True)
    rows = done()
    todo = [key for key in plan if not any(key.items() <= row.items() for row in rows)]
    if todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _prepare, (load, arguments)) as pool, log.open("a") as file:
            futures = [pool.submit(_run, key) for key in todo]
            for future in tqdm(as_completed(futures), total=len(todo), desc="runs"):
                file.write(json.dumps(future.result()) + "\n")
                file.flush()
                tqdm.write(json.dumps(future.result()))
    return done()


_runner: Callable | None = None  # of this process


def _prepare(load: Callable, arguments: tuple) -> None:
    global _runner
    torch.backends.cudnn.allow_tf32 = False  # float32, as on the CPU
    torch.backends.cudnn.deterministic = True
    _runner = load(*arguments)


def _run(key: dict) -> dict:
    return _runner(key)
