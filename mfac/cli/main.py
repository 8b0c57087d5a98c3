"""The `mfac` command."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter, validators

from mfac import __version__
from mfac._build import BuildError
from mfac.tutorial import processes
from mfac.tutorial.settings import ModelSettings, RunSettings, TrainSettings

_HELP = """\
Prune PyTorch models with second-order information (M-FAC).

Start here: `mfac demo` compares M-FAC with magnitude pruning in a few minutes; `mfac train --recipe-path
recipes/mfac.md` prunes a MobileNet as a recipe says, on the bundled digits. `mfac COMMAND --help` lists the options
of a command. From Python: `import mfac; help(mfac)`.
"""
_DONE, _FAILED, _WRONG, _INTERRUPTED, _BROKEN_PIPE = 0, 1, 2, 130, 141  # exit statuses; 128 + SIGINT, 128 + SIGPIPE
_Positive = Annotated[int, Parameter(validator=validators.Number(gte=1))]
_Flat = Parameter(name="*")

app = App(
    name="mfac",
    help=_HELP,
    version=f"mfac {__version__}",
    help_format="markdown",
    result_action="return_value",
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=""),
)


@app.command
def demo(*, output: str = "mfac-demo", seeds: _Positive = 3, num_grads: _Positive = 64) -> None:
    """Compare M-FAC with magnitude pruning on bundled images of digits, in a few minutes.

    A dense MobileNet is pruned to above 95 % sparsity by magnitude, with the published M-FAC update and with the joint
    update, all with the same training budget. Requires `pip install 'mfac-pruning[demo]'`.

    Args:
        output: Folder for the table, the picture and a CSV file per run.
        seeds: Runs of each method; all three methods take one to two minutes per seed.
        num_grads: Gradients of the Fisher.
    """
    from mfac.tutorial.demo import demo as run

    run(output, seeds, num_grads)


@app.command
def train(settings: Annotated[TrainSettings, _Flat]) -> None:
    """Train and prune a model as a recipe says.

    The optimizer is Adam, for which the learning rates of a recipe that was written for SGD are too high.

    Writes model.pt (the best epoch), model.txt (its loss and accuracy) and checkpoint.pt (the last epoch, for
    `--resume`) into SAVE_DIR/MODEL_TAG.

    Override variables of the recipe:

    `mfac train --recipe-path recipes/mfac.md --recipe-args num_grads=64,recomputations=4 --model-tag first`

    Go on after Ctrl-C or a crash, masks and order of the images included:

    `mfac train --recipe-path recipes/mfac.md --model-tag first --resume`

    Prune to the final sparsity at once, without training:

    `mfac train --recipe-path recipes/mfac.md --one-shot --model-tag oneshot`

    Your own images (DIR/train/CLASS/IMAGE.jpg, DIR/val/CLASS/IMAGE.jpg) and weights (a state_dict):

    `mfac train --recipe-path R.md --dataset imagefolder --dataset-path DIR --pretrained dense.pt --device cuda`

    Several processes that train and prune one model together, each on a GPU of its own or on CPU cores, with a
    TRAIN_BATCH_SIZE of its own:

    `torchrun --nproc-per-node 2 -m mfac train --recipe-path recipes/mfac.md`
    """
    from mfac.tutorial.export import export as write
    from mfac.tutorial.train import run_folder
    from mfac.tutorial.train import train as run

    run(settings)
    if settings.export and processes.rank() == 0:
        folder = run_folder(settings)
        write(str(folder / "model.pt"), str(folder / "exported"), settings)


@app.command
def compare(
    recipes: Annotated[list[str], Parameter(negative="")],
    /,
    *,
    seeds: _Positive = 1,
    settings: Annotated[RunSettings | None, _Flat] = None,
) -> None:
    """Run several recipes from the same model, on the same images in the same order, and compare them.

    Prints a table and writes it, a picture and a CSV file per run into SAVE_DIR. After Ctrl-C or a crash the same
    command again goes on, after the last whole epoch. The other options are those of `mfac train`; --recipe-args holds
    for all recipes.

    `mfac compare recipes/magnitude.md recipes/mfac.md --seeds 3`

    Args:
        recipes: Files of recipes.
        seeds: Runs of each recipe, with the seeds 0, 1, ...
        settings: The options of all runs.
    """
    from mfac.tutorial.compare import compare as run

    run(recipes, settings or RunSettings(), seeds)


@app.command
def lint(
    recipe: str, /, *, recipe_args: str | None = None, strict: bool = False, arch_key: str | None = None,
    checkpoint_path: str | None = None,
) -> None:  # fmt: skip
    """Check a recipe and show what it does, without running it.

    `mfac lint recipes/mfac.md --arch-key mobilenet`

    Args:
        recipe: The file: .yaml, .yml, or .md (FILE.md#2 for the second of its fenced recipes).
        recipe_args: Values for variables of the recipe: K=V,... or JSON.
        strict: Refuse what otherwise gives a warning: modifiers that are skipped (quantization, distillation), an end
            beyond that of the training, a sparsity of 1.
        arch_key: Check its names against a network; see `mfac train`.
        checkpoint_path: Check its names against the weights of a file.
    """
    from mfac.tutorial.inspect import lint as run

    run(recipe, recipe_args, strict=strict, arch_key=arch_key, checkpoint_path=checkpoint_path)


@app.command
def plan(settings: Annotated[TrainSettings, _Flat]) -> None:
    """Show what a recipe is going to do with a model and what that costs, without training.

    Per update: the sparsity, the gradients and their memory, and an estimate of the time from a short measurement (of
    collecting gradients and of a step with default settings; not of corrections). Refuses what does not fit into memory
    and says what would. The options are those of `mfac train`.

    `mfac plan --recipe-path recipes/mfac.md --dataset imagenette --dataset-path DIR`
    """
    from mfac.tutorial.inspect import plan as run

    run(settings.recipe_path, settings)


@app.command(name="eval")
def evaluate(checkpoint_path: str, /, *, settings: Annotated[ModelSettings | None, _Flat] = None) -> None:
    """Measure a model on the validation images: loss, accuracy, and sparsity of each layer.

    `mfac eval runs/mfac/model.pt --dataset imagenette --dataset-path DIR`

    Args:
        checkpoint_path: A checkpoint of `mfac train`, or a state_dict.
        settings: Which model and data.
    """
    from mfac.tutorial.inspect import evaluate as run

    run(checkpoint_path, settings or ModelSettings())


@app.command
def export(
    checkpoint_path: str, /, *, output: str = "exported", format: list[str] | None = None,
    settings: Annotated[ModelSettings | None, _Flat] = None,
) -> None:  # fmt: skip
    """Write a pruned model for use elsewhere, and say how large it is in several formats.

    Writes into OUTPUT: model.pt (a dense state_dict with exact zeros) with network.json (which network it is, how its
    images are normalised), model.safetensors (the same), model.compressed.safetensors (without the zeros; at 95 %
    sparsity 7 % of the size; `mfac.load_compressed` and the commands here read it) and model.onnx (BatchNorm folded,
    checked against torch by ONNX Runtime; requires `pip install 'mfac-pruning[onnx]'`).

    `mfac export runs/mfac/model.pt --format compressed --format onnx`

    Args:
        checkpoint_path: A checkpoint of `mfac train`, a state_dict, or a safetensors file.
        output: The folder.
        format: pt, safetensors, compressed or onnx; several times for several (default: all that can be written here).
        settings: Which model.
    """
    from mfac.tutorial.export import export as run

    run(checkpoint_path, output, settings or ModelSettings(), format)


@app.command
def verify(
    file: str, /, *, sparsity: float | None = None, layer_sparsity: float | None = None, pattern: str | None = None,
    max_size: float | None = None, zeros_of: str | None = None, params: list[str] | None = None,
    exclude: list[str] | None = None,
) -> int:  # fmt: skip
    """Show the zeros and sizes of a file of weights, and check what is asked of them.

    The exit status is 0 if all that is asked holds, 1 if something does not, 2 if the file cannot be read. The file
    alone is looked at, not what it should be: a checkpoint or state_dict of torch, safetensors, compressed or not, or
    ONNX, quantized or not. NaN and infinity always fail.

    `mfac verify exported/model.compressed.safetensors --sparsity 0.95 --max-size 0.08`

    `mfac verify model.pt --pattern 2:4 --exclude input.conv.weight`

    `mfac verify int8.onnx --zeros-of exported/model.onnx`

    Args:
        file: The file.
        sparsity: Least share of zeros of all weights together, such as 0.95.
        layer_sparsity: Least share of zeros of each weight.
        pattern: What each weight must keep: N:M, block4, or R,C for blocks of output by input channels. The first place
            that breaks it is shown.
        max_size: Largest size of the file, as a share of its tensors stored densely: 0.08.
        zeros_of: Another file, each of whose zeros must be one here: the model before it was quantized or converted.
        params: Names of the weights to look at, or re:REGEX (default: all with two axes or more).
        exclude: Names of weights that may be as they are, or re:REGEX.

    Returns:
        The exit status.
    """
    from mfac.export.verify import verify as run

    found = run(
        file, sparsity=sparsity, layer_sparsity=layer_sparsity, max_size=max_size, zeros_of=zeros_of, params=params,
        pattern=_pattern(pattern), exclude=exclude or (),
    )  # fmt: skip
    sys.stdout.write(f"{found}\n")
    return _DONE if found.ok else _FAILED


@app.command
def doctor() -> int:
    """Report what is installed, built and used on this machine."""
    from mfac.cli import doctor as report

    return report.main()


def _pattern(text: str | None) -> str | list[int] | None:
    """Return a pattern as the library takes it: R,C is [R, C]."""
    parts = [part.strip() for part in text.strip("[] ").split(",")] if text is not None else []
    return [int(part) for part in parts] if len(parts) == 2 and all(map(str.isdecimal, parts)) else text


@contextmanager
def _plain_log() -> Iterator[None]:
    """Say what the package logs and warns of in plain lines meanwhile."""
    from tqdm import tqdm

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(record.getMessage())

    log = logging.getLogger("mfac")
    before = log.handlers, log.propagate, log.level, warnings.showwarning
    log.handlers, log.propagate = [Lines()], False
    log.setLevel(logging.INFO)
    shown = processes.rank() == 0  # one of several says it for all
    warnings.showwarning = lambda message, *_: shown and tqdm.write(f"warning: {message}", file=sys.stderr)
    try:
        yield
    finally:
        log.handlers, log.propagate, level, warnings.showwarning = before
        log.setLevel(level)


def _check_command(tokens: Sequence[str]) -> None:
    """Check that several processes run a command that they can run together."""
    if processes.count() > 1 and tokens[0] in {name for name in app if name[0] != "-"} - {"train"}:
        raise ValueError(f"torchrun: expected `mfac train`, which several processes run together, got {tokens[0]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `mfac` command.

    Args:
        arguments: The command line without the program's name; None: the process's own. ``--debug`` anywhere in it
            shows the traceback of an error.

    Returns:
        The exit status: 0 on success; 2 for bad usage, options or recipes, and 1 for other failures (of `verify` 2),
        each with one line on stderr (several if the kernels cannot be built); 130 if interrupted; 141, and no line, if
        stdout is a closed pipe. Of several processes, that torchrun has started, one writes the line.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    tokens = [token for token in given if token != "--debug"]
    if not tokens:
        app.help_print([])
        return _WRONG
    try:
        with processes.joined(), _plain_log():
            _check_command(tokens)
            status = app(tokens, print_error=processes.rank() == 0) or _DONE
            sys.stdout.flush()
            return status
    except CycloptsError:
        return _WRONG
    except BrokenPipeError:  # the reader has ended, as in `mfac lint R.md | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        return _BROKEN_PIPE
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError) as error:
        if "--debug" in given:
            traceback.print_exc()
        elif processes.first_to_fail():
            text = str(error) or "memory: expected enough, got a MemoryError"  # which mostly has no text
            text = text if isinstance(error, BuildError) else " ".join(text.split())
            sys.stderr.write(f"mfac: error: {text}\n")
        wrong = isinstance(error, (ValueError, TypeError)) or "verify" in tokens[:1]  # whose 1 is an answer
        return _WRONG if wrong else _FAILED
    except KeyboardInterrupt:
        if processes.first_to_fail():
            sys.stderr.write("mfac: interrupted\n")
        return _INTERRUPTED
