"""The `mfac` command."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from mfac import __version__
from mfac._build import BuildError
from mfac.extras import DISTRIBUTION
from mfac.tutorial.data import DATASETS
from mfac.tutorial.dense import DIGITS_WIDTH
from mfac.tutorial.train import ARCHITECTURES, TrainSettings

_DESCRIPTION = """\
Prune PyTorch models with second-order information (M-FAC).

examples:
  mfac demo                                    compare M-FAC with magnitude pruning, in a few minutes
  mfac doctor                                  report what is installed, built and used on this machine
  mfac train --recipe-path recipes/mfac.md     prune a MobileNet as a recipe says, on the bundled digits
  mfac train --recipe-path R.md --dataset imagenette --dataset-path DIR --pretrained dense.pt
                                               the same on image folders (DIR/train/<class>, DIR/val/<class>)
"""
_EPILOG = """\
`mfac COMMAND --help` lists the options of a command; `--debug` shows where an error arose.
From Python: `import mfac; help(mfac)`.
"""
_TRAIN_DESCRIPTION = """\
Train and prune a model as a recipe says. Writes model.pt (the best epoch), model.txt (its loss and accuracy) and
checkpoint.pt (the last epoch, to resume from) into SAVE_DIR/MODEL_TAG.
"""
_TRAIN_EPILOG = """\
examples:
  override variables of the recipe:
    mfac train --recipe-path recipes/mfac.md --recipe-args num_grads=64,recomputations=4 --model-tag first
  resume after an interruption, masks included:
    mfac train --recipe-path recipes/mfac.md --checkpoint-path runs/first/checkpoint.pt --model-tag first
  prune to the final sparsity at once, without training:
    mfac train --recipe-path recipes/mfac.md --one-shot --model-tag oneshot
  your own images (DIR/train/<class>/*.jpg, DIR/val/<class>/*.jpg) and weights (a state_dict):
    mfac train --recipe-path R.md --dataset imagefolder --dataset-path DIR --pretrained dense.pt --device cuda
"""


def _boolean_or_path(text: str) -> str:
    return text.capitalize() if text.lower() in ("true", "false") else text


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an int, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an int >= 1, got {text}")
    return value


def _steps(text: str) -> int:
    return -1 if text == "-1" else _positive(text)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    # Absent unless given: a default of the command would override what was given before the command.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error, not one line"
    )


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train and prune a model as a recipe says",
        description=_TRAIN_DESCRIPTION,
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_debug(parser)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--recipe-path", required=True, metavar="FILE", help="recipe: .yaml, .yml, or .md with front matter"
    )
    recipe.add_argument("--recipe-args", metavar="K=V,...", help="values for variables of the recipe; also JSON")
    recipe.add_argument("--one-shot", action="store_true", help="prune to the final sparsity at once, without training")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--arch-key", metavar="NAME", help=f"network: {', '.join(ARCHITECTURES)} (default: {TrainSettings.arch_key})"
    )
    model.add_argument(
        "--width",
        type=float,
        metavar="X",
        help=f"multiplier of its channels (default: {DIGITS_WIDTH} for digits, else 1.0)",
    )
    model.add_argument(
        "--pretrained",
        type=_boolean_or_path,
        metavar="True|False|FILE",
        help="initial weights, a state_dict; True: a dense model, trained on the digits once and cached (default for "
        "digits); False: random (default otherwise)",
    )
    model.add_argument(
        "--checkpoint-path",
        metavar="FILE",
        help="resume from a checkpoint.pt, masks included; with --one-shot: prune its model",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        help=f"digits (bundled with scikit-learn), or images in folders (default: {TrainSettings.dataset})",
    )
    data.add_argument("--dataset-path", metavar="DIR", help="folder with train/<class>/*.jpg and val/<class>/*.jpg")
    data.add_argument(
        "--image-size",
        type=_positive,
        metavar="N",
        help=f"height and width to which images are resized (default: {TrainSettings.image_size})",
    )
    data.add_argument(
        "--train-batch-size",
        type=_positive,
        metavar="N",
        help=f"images per step, and per gradient of M-FAC (default: {TrainSettings.train_batch_size})",
    )
    data.add_argument(
        "--test-batch-size",
        type=_positive,
        metavar="N",
        help=f"images per validation batch (default: {TrainSettings.test_batch_size})",
    )
    data.add_argument(
        "--loader-num-workers",
        type=int,
        metavar="N",
        help=f"processes that read images (default: {TrainSettings.loader_num_workers})",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--init-lr",
        type=float,
        metavar="LR",
        help=f"learning rate until the recipe sets one (default: {TrainSettings.init_lr:g})",
    )
    training.add_argument(
        "--max-train-steps",
        type=_steps,
        metavar="N",
        help=f"largest number of steps per epoch; -1: all (default: {TrainSettings.max_train_steps})",
    )
    training.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if available)")
    training.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help=f"seed for the order of images and for random weights (default: {TrainSettings.seed})",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--save-dir", metavar="DIR", help=f"folder for the results of all runs (default: {TrainSettings.save_dir})"
    )
    output.add_argument(
        "--model-tag",
        metavar="NAME",
        help="subfolder for this run, a plain name (default: the recipe's; a number is added if it holds a run)",
    )
    output.add_argument(
        "--save-best-after",
        type=int,
        metavar="EPOCH",
        help="first epoch that can become model.pt (default: the first one that begins at the final sparsity)",
    )
    output.add_argument("--logs-dir", metavar="DIR", help="folder for a CSV file of loss, accuracy and sparsity")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare M-FAC with magnitude pruning on bundled data",
        description="Prune a dense MobileNet on bundled images of digits to above 95 % sparsity: by magnitude, with "
        "the published M-FAC update and with the joint update, all with the same training budget. Prints a table and "
        "draws comparison.png. Requires "
        f"pip install '{DISTRIBUTION}[demo]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_debug(parser)
    parser.add_argument("--output", default="mfac-demo", metavar="DIR", help="folder for the table, CSV files and plot")
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=3,
        metavar="N",
        help="runs of each method; all three methods take about a minute per seed on 2 cores",
    )
    parser.add_argument("--num-grads", type=_positive, default=64, metavar="N", help="gradients of the Fisher")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the `mfac` command.

    Returns:
        The parser; the options of `mfac train` have the names of TrainSettings' fields.
    """
    parser = argparse.ArgumentParser(
        prog="mfac", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mfac {__version__}")
    _add_debug(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_demo(commands)
    _add_debug(commands.add_parser("doctor", help="report what is installed, built and used on this machine"))
    return parser


def _run(options: dict) -> int:
    # Each command imports what it needs, so that `mfac --help` is fast.
    command = options.pop("command")
    if command == "doctor":
        from mfac.cli import doctor

        return doctor.main()
    if command == "demo":
        from mfac.tutorial.demo import demo

        demo(**options)
    else:
        from mfac.tutorial.train import train

        train(TrainSettings(**options))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `mfac` command.

    Args:
        arguments: The command line without the program's name; None: the process's own.

    Returns:
        The exit status: 0 on success; 2 for invalid input or what this machine cannot do, with one line on stderr
        (several if the kernels cannot be built; a traceback with ``--debug``); 130 if interrupted.
    """
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        parser.print_help()
        return 2
    options = vars(parser.parse_args(arguments))
    debug = options.pop("debug", False)
    try:
        return _run(options)
    except (ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
        if debug:
            traceback.print_exc()
            return 2
        text = str(error) or "expected enough memory, got a MemoryError"  # which mostly has no text
        text = text if isinstance(error, BuildError) else " ".join(text.split())
        sys.stderr.write(f"mfac: error: {text}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("mfac: interrupted\n")
        return 130
