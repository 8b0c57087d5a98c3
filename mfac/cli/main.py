"""The `mfac` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mfac import __version__
from mfac._build import BuildError
from mfac.extras import DISTRIBUTION

_DESCRIPTION = """\
Prune PyTorch models with second-order information (M-FAC).

  mfac demo                                    see it work: M-FAC beside magnitude pruning, in a few minutes
  mfac doctor                                  what is installed, built and used on this machine
  mfac train --recipe-path recipes/mfac.md     prune a MobileNet under a recipe, on embedded data
  mfac train --recipe-path R.md --dataset imagenette --dataset-path DIR --pretrained dense.pt
                                               the same on image folders (DIR/train/<class>, DIR/val/<class>)
"""
_EPILOG = "Use `mfac COMMAND --help` for the options of a command. From Python: `import mfac; help(mfac)`."


def _boolean_or_path(text: str) -> str:
    return text.capitalize() if text.lower() in ("true", "false") else text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train and prune a model under a recipe",
        description="Train and prune a model under a recipe. Writes model.pt, model.txt and checkpoint.pt into "
        "SAVE_DIR/MODEL_TAG.",
        epilog="example: mfac train --recipe-path recipes/mfac.md --recipe-args num_grads=64 --model-tag first",
        argument_default=argparse.SUPPRESS,
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--recipe-path", required=True, metavar="FILE", help="recipe: .md with front matter or .yaml")
    recipe.add_argument("--recipe-args", metavar="K=V,...", help="override variables of the recipe (or JSON)")
    recipe.add_argument("--one-shot", action="store_true", help="prune to the final sparsity at once, without training")
    model = parser.add_argument_group("model")
    model.add_argument("--arch-key", metavar="NAME", help="network: mobilenet (the default)")
    model.add_argument("--width", type=float, help="multiplier of its channels (default: 0.35 for digits, else 1.0)")
    model.add_argument(
        "--pretrained",
        type=_boolean_or_path,
        metavar="True|False|FILE",
        help="start from a state_dict; True: a dense model trained on the digits once and cached (default for digits)",
    )
    model.add_argument(
        "--checkpoint-path",
        metavar="FILE",
        help="go on from a checkpoint.pt, masks included; with --one-shot: prune its model",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=("digits", "imagenette", "imagefolder"),
        help="digits (embedded, the default), or image files in folders",
    )
    data.add_argument("--dataset-path", metavar="DIR", help="folder with train/<class>/*.jpg and val/<class>/*.jpg")
    data.add_argument("--image-size", type=_positive, metavar="N", help="height and width of folder images (224)")
    data.add_argument("--train-batch-size", type=_positive, metavar="N", help="images per step and per gradient (32)")
    data.add_argument("--test-batch-size", type=_positive, metavar="N", help="images per validation batch (64)")
    data.add_argument("--loader-num-workers", type=int, metavar="N", help="processes that read images (0)")
    training = parser.add_argument_group("training")
    training.add_argument("--init-lr", type=float, metavar="LR", help="learning rate until the recipe sets one (4e-4)")
    training.add_argument("--max-train-steps", type=int, metavar="N", help="steps per epoch at most (-1: all)")
    training.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    training.add_argument("--seed", type=int, help="seed of the order of images and of new weights (0)")
    output = parser.add_argument_group("output")
    output.add_argument("--save-dir", metavar="DIR", help="folder of the results (runs)")
    output.add_argument("--model-tag", metavar="NAME", help="folder in it for this run (default: the recipe's name)")
    output.add_argument(
        "--save-best-after",
        type=int,
        metavar="EPOCH",
        help="model.pt is the best from this epoch on (default: the first epoch at the final sparsity)",
    )
    output.add_argument("--logs-dir", metavar="DIR", help="folder for a CSV of loss, accuracy and sparsity over time")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare M-FAC with magnitude pruning on embedded data",
        description="Prune a dense MobileNet on embedded digits to more than 95 % by magnitude, by the published "
        "M-FAC update and by the joint one, each with the same budget; print a table and draw comparison.png. Needs "
        f"pip install '{DISTRIBUTION}[demo]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", default="mfac-demo", metavar="DIR", help="folder of table, CSV files and plot")
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="runs of each method; a seed takes about 2 minutes on 2 cores",
    )
    parser.add_argument("--num-grads", type=_positive, default=64, metavar="N", help="gradients per Fisher")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the `mfac` command.

    Returns:
        The parser; the options of `mfac train` have the names of TrainSettings' fields.
    """
    parser = argparse.ArgumentParser(
        prog="mfac", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mfac {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_demo(commands)
    commands.add_parser("doctor", help="report what is installed, built and used on this machine")
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
        from mfac.tutorial.train import TrainSettings, train

        train(TrainSettings(**options))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `mfac` command.

    Args:
        arguments: The command line without the program's name; None: the process's own.

    Returns:
        The exit status: 0 if all went well, 2 for wrong input or for what cannot be done here, said on stderr: in one
        line, or in several if the kernels cannot be built.
    """
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        parser.print_help()
        return 2
    try:
        return _run(vars(parser.parse_args(arguments)))
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        text = str(error) if isinstance(error, BuildError) else " ".join(str(error).split())
        sys.stderr.write(f"mfac: error: {text}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("mfac: interrupted\n")
        return 130
