"""Images for the tutorial: the embedded digits, or folders of image files such as Imagenette."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate

from mfac.checks import check_choice, check_int
from mfac.distributed.replicas import ALONE, Replicas
from mfac.extras import install_hint
from mfac.gradients.seeds import SeedKind, derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

DATASETS = ("digits", "imagenette", "imagefolder")
IMAGE_SIZE, TRAIN_BATCH, TEST_BATCH = 224, 32, 64  # defaults
DIGITS_SIZE = 32
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of its channels
DIGITS_MEAN = DIGITS_STD = (0.5, 0.5, 0.5)  # as Digits normalises
_DIGITS_VALIDATION = 360  # of 1797
_DIGITS_SHIFT = 2  # largest shift of a training image, in pixels of 32


def _collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack images and targets, the images in channels-last layout: faster for depthwise convolutions."""
    images, targets = default_collate(samples)
    return images.contiguous(memory_format=torch.channels_last), targets


class Batches:
    """Batches of a DataLoader on a device.

    Args:
        loader: Gives (images, targets).
        device: Where the batches go.
    """

    def __init__(self, loader: DataLoader, device: torch.device | str = "cpu") -> None:
        self.loader = loader
        self.device = torch.device(device)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images, shape [n, 3, height, width], and targets, shape [n]."""
        for images, targets in self.loader:
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


def _whole_dataset(loader: DataLoader) -> Dataset:
    """Return the dataset of a loader, of all processes together."""
    return loader.dataset.dataset if isinstance(loader.dataset, Subset) else loader.dataset


@dataclass
class Data:
    """A dataset in batches; M-FAC takes its gradients from the training images in an order of their own.

    Of several processes, each has a part of the images.
    """

    train: Batches
    gradients: DataLoader
    validation: Batches
    num_classes: int
    seed: int
    rank: int = 0  # of this process

    @property
    def num_images(self) -> tuple[int, int]:
        """Images for training and for validation, of all processes together."""
        return len(_whole_dataset(self.train.loader)), len(_whole_dataset(self.validation.loader))

    def normalize(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalise the images of folders by mean and standard deviation of the three channels."""
        for loader in (self.train.loader, self.gradients, self.validation.loader):
            images = _whole_dataset(loader)
            if isinstance(images, ImageFolder):
                images.mean, images.std = mean, std

    def start_epoch(self, epoch: int) -> None:
        """Seed torch, the order of the training images and their augmentation: an epoch is the same however it began.

        Args:
            epoch: Its number.
        """
        seed = derive_seed(self.seed, SeedKind.START, epoch, self.rank)
        torch.manual_seed(seed)
        self.train.loader.generator.manual_seed(seed)
        if isinstance(self.train.loader.sampler, DistributedSampler):
            self.train.loader.sampler.set_epoch(epoch)


class Digits(Dataset):
    """scikit-learn's 8 x 8 digits, enlarged to 32 x 32 with three equal channels; a fixed split of 1437 and 360.

    Args:
        train: The training part, randomly shifted by up to 2 pixels, or the validation part.

    Raises:
        ImportError: If scikit-learn is not installed.
    """

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(install_hint("scikit-learn, which has the digits,", "demo")) from error
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        order = order[_DIGITS_VALIDATION:] if train else order[:_DIGITS_VALIDATION]
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
        self._shift = _DIGITS_SHIFT if train else 0
        self._images = F.pad(images[order], (self._shift,) * 4, value=-1.0)
        self._targets = torch.from_numpy(digits.target).long()[order]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an image, shape [3, 32, 32], and its target."""
        y, x = torch.randint(0, 2 * self._shift + 1, (2,)).tolist() if self._shift else (0, 0)
        return self._images[index, :, y : y + 32, x : x + 32].expand(3, 32, 32), self._targets[index]


class ImageFolder(Dataset):
    """Image files in one folder per class; the classes are the folders in alphabetical order.

    Args:
        root: The folder that holds the class folders.
        size: Height and width of the images given out.
        train: Crop at random and flip, or resize and crop the centre.

    Attributes:
        mean: Subtracted from the channels, whose pixels are in [0, 1]; that of ImageNet unless changed.
        std: They are then divided by it.

    Raises:
        ImportError: If pillow is not installed.
        ValueError: If the folder does not exist or holds no images.
    """

    def __init__(self, root: Path, size: int, train: bool) -> None:
        try:
            import PIL  # noqa: F401 (needed for the first image: say so at the start)
        except ImportError as error:
            raise ImportError(install_hint("pillow, which reads images,", "tutorial")) from error
        if not root.is_dir():
            raise ValueError(
                f"dataset_path: expected a folder with train/<class>/*.jpg and val/<class>/*.jpg, got no folder {root}"
            )
        self.classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        self._items = []
        for target, name in enumerate(self.classes):
            found = [path for path in sorted((root / name).rglob("*")) if path.suffix.lower() in _SUFFIXES]
            if not found:
                raise ValueError(
                    f"dataset_path: expected images {root / name}/*{', *'.join(sorted(_SUFFIXES))}, got none"
                )
            self._items += [(path, target) for path in found]
        if not self._items:
            raise ValueError(f"dataset_path: expected a folder for each class in {root}, got none")
        self._size, self._train = size, train
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return an image, shape [3, size, size], normalised by `mean` and `std`, and its class index.

        Raises:
            ValueError: If the file is no image, or a damaged one.
        """
        from PIL import Image

        path, target = self._items[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises
            raise ValueError(f"dataset_path: expected an image, got {path}, which cannot be read: {error}") from None
        image = _random_crop(image, self._size) if self._train else _centre_crop(image, self._size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None], target


def _random_crop(image: Image, size: int) -> Image:
    """Return a random crop (30 to 100 % of the area, sides 3:4 to 4:3) in the new size, mirrored half of the time."""
    from PIL.Image import Resampling, Transpose

    area, log_ratio, left, top, mirror = torch.rand(5).tolist()
    area = image.width * image.height * (0.3 + 0.7 * area)
    ratio = (4 / 3) ** (2 * log_ratio - 1)
    width = min(image.width, max(1, round((area * ratio) ** 0.5)))
    height = min(image.height, max(1, round((area / ratio) ** 0.5)))
    x, y = round(left * (image.width - width)), round(top * (image.height - height))
    image = image.resize((size, size), Resampling.BILINEAR, box=(x, y, x + width, y + height))
    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else image


def _centre_crop(image: Image, size: int) -> Image:
    """Return the central square, 7/8 of the shorter side (224 of 256), in the new size."""
    from PIL.Image import Resampling

    side = min(image.size) * 7 / 8
    x, y = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Resampling.BILINEAR, box=(x, y, x + side, y + side))


def load_data(
    dataset: str = "digits",
    dataset_path: str | Path | None = None,
    *,
    image_size: int = IMAGE_SIZE,
    train_batch_size: int = TRAIN_BATCH,
    test_batch_size: int = TEST_BATCH,
    workers: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    replicas: Replicas = ALONE,
) -> Data:
    """Load a dataset.

    Args:
        dataset: `digits` (embedded), `imagenette` or `imagefolder` (image files under `dataset_path`).
        dataset_path: Folder with `train/<class>/` and `val/<class>/`; unused for the digits.
        image_size: Height and width of the images of a folder; digits are 32 x 32.
        train_batch_size: Images per training step of a process, and per gradient for M-FAC.
        test_batch_size: Images per validation batch.
        workers: Processes that read images; the digits are in memory and need none.
        device: Where the batches go.
        seed: Seed of the order of the training images and of their augmentation; see :meth:`Data.start_epoch`.
        replicas: Processes that train together: this one gets its part of the training images, another one in each
            epoch, and of the validation images.

    Returns:
        The dataset. The last, incomplete batch of an epoch is dropped in training.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If the dataset is not known, a number is too small, or the folder is not laid out as expected or has
            too few images.
        ImportError: If scikit-learn, for the digits, or pillow, for image files, is not installed.
    """
    check_choice("dataset", dataset, DATASETS)
    check_int("image_size", image_size)
    check_int("train_batch_size", train_batch_size)
    check_int("test_batch_size", test_batch_size)
    check_int("loader_num_workers", workers, 0)
    if dataset == "digits":
        train, validation = Digits(True), Digits(False)
        num_classes, workers, image_size = 10, 0, DIGITS_SIZE
    else:
        if dataset_path is None:
            raise ValueError(
                f"dataset_path: expected a folder with train/<class>/ and val/<class>/ for the dataset {dataset}, got "
                "None"
            )
        train = ImageFolder(Path(dataset_path) / "train", image_size, train=True)
        validation = ImageFolder(Path(dataset_path) / "val", image_size, train=False)
        if train.classes != validation.classes:
            raise ValueError(
                f"dataset_path: expected the same classes in train and val, got {train.classes} and "
                f"{validation.classes} in {dataset_path}"
            )
        num_classes = len(train.classes)
    if len(train) // replicas.size < train_batch_size:
        own = "" if replicas.size == 1 else f" of each of {replicas.size} processes"
        raise ValueError(
            f"train_batch_size: expected at most the number of training images{own}, {len(train) // replicas.size}, "
            f"got {train_batch_size}"
        )
    if replicas.size > 1:
        validation = Subset(validation, range(replicas.rank, len(validation), replicas.size))

    def loader(images: Dataset, size: int, order: int | None) -> DataLoader:
        sampler = None
        if order is not None and replicas.size > 1:
            sampler = DistributedSampler(images, replicas.size, replicas.rank, seed=order, drop_last=True)
        return DataLoader(
            images,
            size,
            shuffle=order is not None and sampler is None,
            sampler=sampler,
            drop_last=order is not None,
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(seed),
        )

    return Data(
        Batches(loader(train, train_batch_size, seed), device),
        loader(train, train_batch_size, derive_seed(seed, SeedKind.COLLECT)),
        Batches(loader(validation, test_batch_size, None), device),
        num_classes,
        seed=seed,
        rank=replicas.rank,
    )
