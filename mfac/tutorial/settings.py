"""The options of the program: fields are flags, docstrings their help."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mfac.checks import check_positive
from mfac.tutorial.data import DIGITS_SIZE, IMAGE_SIZE, TEST_BATCH, TRAIN_BATCH

DIGITS_WIDTH = 0.35
NETWORK = ("arch_key", "width")  # options without which weights do not fit

T = TypeVar("T", bound="ModelSettings")


@dataclass(kw_only=True)
class ModelSettings:
    """The options about a model and its data; the first four are, if not given, those of the file of weights.

    Args:
        arch_key: Network: mobilenet, a name of torchvision or timm, or package.module:function (default: that of the
            file of weights unless that is a function, else mobilenet).
        width: Multiplier of mobilenet's channels (default: that of the file of weights, else 0.35 for digits and 1.0
            for other images).
        image_size: Height and width to which images are resized (default: that of the file of weights, else 224; digits
            are 32).
        dataset: digits (bundled with scikit-learn), or images in folders: imagenette or imagefolder (default:
            imagefolder with dataset_path, else that of the file of weights, else digits).
        dataset_path: Folder with train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg.
        download: Fetch imagenette into dataset_path (default: the cache folder) if it is not there.
        test_batch_size: Images per validation batch.
        loader_num_workers: Processes that read images.
        device: cpu, cuda or cuda:N (default: cuda if available); under torchrun cuda is a GPU for each process.
    """

    arch_key: str | None = None
    width: float | None = None
    image_size: int | None = None
    dataset: str | None = None
    dataset_path: str | None = None
    download: bool = False
    test_batch_size: int = TEST_BATCH
    loader_num_workers: int = 0
    device: str | None = None


@dataclass(kw_only=True)
class RunSettings(ModelSettings):
    """The options of `mfac compare`: of all its runs.

    Args:
        recipe_args: Values for variables of the recipe: K=V,... or JSON.
        pretrained: Initial weights: True, False or a file with a state_dict. True: those of the network's package (for
            mobilenet timm's, of ImageNet) or, on the digits, a dense model that is trained once and cached (default
            there); False: random (default otherwise).
        train_batch_size: Images per step, and per gradient of M-FAC; under torchrun of each process.
        init_lr: Learning rate until the recipe sets one.
        max_train_steps: Largest number of steps per epoch; -1: all.
        amp: Train under autocast to bfloat16.
        save_dir: Folder for the results of all runs.
        save_best_after: First epoch that can become model.pt (default: the first that begins at the final sparsity).
        logs_dir: Folder for a CSV file of loss, accuracy and sparsity, and for TensorBoard if it is installed.
    """

    recipe_args: str | None = None
    pretrained: str | None = None
    train_batch_size: int = TRAIN_BATCH
    init_lr: float = 4e-4
    max_train_steps: int = -1
    amp: bool = False
    save_dir: str = "runs"
    save_best_after: int | None = None
    logs_dir: str | None = None

    @property
    def initial_weights(self) -> str:
        """``"True"``, ``"False"`` or a path."""
        given = self.pretrained or str(self.dataset == "digits")
        return given.capitalize() if given.lower() in ("true", "false") else given


@dataclass(kw_only=True)
class TrainSettings(RunSettings):
    """The options of `mfac train`.

    Args:
        recipe_path: Recipe: .yaml, .yml, or .md with front matter (FILE.md#2 for the second of its fenced recipes).
        one_shot: Prune to the final sparsity at once, without training.
        checkpoint_path: Go on from this checkpoint.pt, masks included; with --one-shot: prune its model.
        model_tag: Subfolder for this run, a plain name (default: that of the recipe's file).
        seed: Seed of the order of images and of random weights.
        resume: Go on with the run of this tag where it stopped.
        overwrite: Replace the run of this tag.
        export: Write the best model for use elsewhere too, as `mfac export` does, into the subfolder exported.
    """

    recipe_path: str
    one_shot: bool = False
    checkpoint_path: str | None = None
    model_tag: str | None = None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    export: bool = False


def resolve(settings: T, described: Mapping[str, Any], path: str, fixed: Collection[str] = NETWORK) -> T:
    """Return the options with network, images and their size filled in.

    What is not given is as the file of weights says or, if that says nothing, the default.

    Args:
        settings: The options.
        described: What the file says of its network, possibly nothing: the fields of
            :class:`mfac.tutorial.models.NetworkSpec`, and its dataset.
        path: The file, for the error.
        fixed: The options that must be as the file says.

    Returns:
        The options, none of the four open, but for the width of another network than mobilenet.

    Raises:
        TypeError: If the width is not a number.
        ValueError: If an option differs from what the file says, or does not go with the dataset, or only the file
            says to call a function.
    """
    function = described.get("arch_key")
    if settings.arch_key is None and function is not None and ":" in function:
        raise ValueError(
            f"arch_key: expected --arch-key {function} to be given, because a file must not make the program run code"
        )
    dataset = settings.dataset
    default = "digits" if described.get("image_size", DIGITS_SIZE) == DIGITS_SIZE else "imagefolder"
    of_file = described.get("dataset", default)
    if dataset is None and settings.dataset_path is not None and of_file == "digits":
        dataset = "imagefolder"
    digits = (dataset or of_file) == "digits"
    if digits and settings.dataset_path is not None:
        raise ValueError(f"dataset_path: expected none for the digits, got {settings.dataset_path}")
    if digits and settings.image_size not in (None, DIGITS_SIZE):
        raise ValueError(f"image_size: expected {DIGITS_SIZE} for the digits, got {settings.image_size}")
    image_size = DIGITS_SIZE if digits else settings.image_size
    options = {"arch_key": settings.arch_key, "width": settings.width, "image_size": image_size, "dataset": dataset}
    defaults = {"arch_key": "mobilenet", "image_size": IMAGE_SIZE, "dataset": default}
    for name, given in options.items():
        known = described.get(name)
        if name in fixed and given is not None and known is not None and given != known:
            got = f"{given}, that of the digits" if name == "image_size" and digits else given
            raise ValueError(f"{name}: expected {known}, that of the network in {path}, got {got}")
        options[name] = next((value for value in (given, known, defaults.get(name)) if value is not None), None)
    if options["arch_key"] == "mobilenet":
        width = DIGITS_WIDTH if digits else 1.0
        options["width"] = check_positive("width", width if options["width"] is None else options["width"])
    return replace(settings, **options)
