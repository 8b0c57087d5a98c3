"""The options of the program: fields are flags, docstrings their help."""

from __future__ import annotations

from dataclasses import dataclass

from mfac.tutorial.data import DIGITS_SIZE, IMAGE_SIZE, TEST_BATCH, TRAIN_BATCH

DIGITS_WIDTH = 0.35


@dataclass(kw_only=True)
class ModelSettings:
    """The options about a model and its data.

    Args:
        arch_key: Network: mobilenet, a name of torchvision or timm, or package.module:function.
        width: Multiplier of its channels (default: 0.35 for digits, else 1.0).
        dataset: digits (bundled with scikit-learn), or images in folders: imagenette or imagefolder.
        dataset_path: Folder with train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg.
        download: Fetch imagenette into dataset_path (default: the cache folder) if it is not there.
        image_size: Height and width to which images are resized.
        test_batch_size: Images per validation batch.
        loader_num_workers: Processes that read images.
        device: cpu, cuda or cuda:N (default: cuda if available).
    """

    arch_key: str = "mobilenet"
    width: float | None = None
    dataset: str = "digits"
    dataset_path: str | None = None
    download: bool = False
    image_size: int = IMAGE_SIZE
    test_batch_size: int = TEST_BATCH
    loader_num_workers: int = 0
    device: str | None = None

    @property
    def effective_width(self) -> float:
        """The multiplier of the channels."""
        return (DIGITS_WIDTH if self.dataset == "digits" else 1.0) if self.width is None else self.width

    @property
    def effective_image_size(self) -> int:
        """Height and width of the images."""
        return DIGITS_SIZE if self.dataset == "digits" else self.image_size


@dataclass(kw_only=True)
class RunSettings(ModelSettings):
    """The options of `mfac compare`: of all its runs.

    Args:
        recipe_args: Values for variables of the recipe: K=V,... or JSON.
        pretrained: Initial weights: True, False or a file with a state_dict. True: those of the network's package (for
            mobilenet timm's, of ImageNet) or, on the digits, a dense model that is trained once and cached (default
            there); False: random (default otherwise).
        train_batch_size: Images per step, and per gradient of M-FAC.
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
