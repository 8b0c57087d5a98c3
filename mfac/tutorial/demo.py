"""`mfac demo`: the tutorial on embedded digits, M-FAC beside magnitude pruning under the same budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mfac.ops.backend import select_backend
from mfac.recipe.load import tutorial_recipes
from mfac.recipe.manager import Manager
from mfac.sparse import convert
from mfac.tutorial.compare import Method, Run, check_matplotlib, write_comparison
from mfac.tutorial.data import load_data
from mfac.tutorial.dense import DENSE_EPOCHS, dense_digits
from mfac.tutorial.files import make_folder
from mfac.tutorial.loop import evaluate, fit
from mfac.tutorial.settings import DIGITS_WIDTH

_MEASURE_EVERY = 8  # steps of the 44 of an epoch


_PUBLISHED = {"update": "independent", "substeps": 1, "damping": 1e-5, "block_size": 2000, "corrections": 0}
METHODS = (
    Method("magnitude", "magnitude.md", "#d95f02"),
    Method("M-FAC as published", "mfac.md", "#7570b3", _PUBLISHED),
    Method("M-FAC, joint update", "mfac.md", "#1b9e77"),
)


def recipe_path(name: str) -> Path:
    """Return the path of a recipe that comes with the package.

    Args:
        name: The file's name.

    Returns:
        Its path, in the installed package or beside it in a source tree.

    Raises:
        ValueError: If it is not there.
    """
    path = tutorial_recipes() / name
    if not path.is_file():
        raise ValueError(
            f"name: expected one of the recipes in {path.parent}, got {name!r}; if it is missing, reinstall mfac"
        )
    return path


def run_method(
    method: Method, dense: nn.Module, seed: int, recipe_args: dict[str, Any], max_train_steps: int = -1
) -> tuple[Run, nn.Module]:
    """Prune and train a copy of the dense model.

    Args:
        method: What to run.
        dense: The model to start from; it is not changed.
        seed: Seed of the order of the images and of their shifts.
        recipe_args: Variables of the recipe to set.
        max_train_steps: Optimizer steps per epoch at most; -1: all.

    Returns:
        The run, and the copy.
    """
    model = copy.deepcopy(dense)
    data = load_data(seed=seed, test_batch_size=120, device=next(model.parameters()).device)
    manager = Manager.from_recipe(recipe_path(method.recipe), recipe_args)
    optimizer = torch.optim.Adam(model.parameters())
    session = manager.apply(model, optimizer, data.gradients, F.cross_entropy, progress=True)
    measurements = fit(
        model,
        optimizer,
        session,
        data,
        manager.epochs,
        max_train_steps=max_train_steps,
        measure_every=_MEASURE_EVERY,
        report=lambda line: tqdm.write(f"  {line}"),
    )
    return Run(method, seed, measurements), model


def size_and_time(model: nn.Module, image: torch.Tensor) -> str:
    """Convert a pruned model (:func:`mfac.sparse.convert`) and say what that makes of its size and time.

    Args:
        model: The pruned model.
        image: One image, shape [1, channels, height, width].

    Returns:
        A line with the megabytes of the weights and the milliseconds of one image, dense and converted, measured now.
    """
    report = convert(model, image).sparse_report
    before, after = (sum(getattr(layer, name) for layer in report.layers) / 1e6 for name in ("dense_bytes", "bytes"))
    line = f"the last network, sparse against dense: weights {before:.2f} -> {after:.2f} MB"
    if report.dense_ms is None or not report.replaced:
        return f"{line}; no layer is faster sparse on this machine"
    return (
        f"{line}, one image {report.dense_ms:.2f} -> {report.fast_ms:.2f} ms on {report.machine} (threads: "
        f"{report.threads}; mfac.sparse.convert)"
    )


def demo(
    output: str | Path = "mfac-demo",
    seeds: int = 3,
    num_grads: int = 64,
    *,
    recomputations: int = 8,
    width: float = DIGITS_WIDTH,
    dense_epochs: float = DENSE_EPOCHS,
    max_train_steps: int = -1,
) -> list[Run]:
    """Run the comparison; print a table, write it, the plot and one CSV per run.

    Args:
        output: Folder for `comparison.txt`, `comparison.png` and the CSV files.
        seeds: Runs of each method.
        num_grads: Gradients per Fisher.
        recomputations: Fishers per pruning step.
        width: Multiplier of the network's channels.
        dense_epochs: Length of the dense training.
        max_train_steps: Optimizer steps per epoch at most; -1: all.

    Returns:
        The runs.

    Raises:
        ValueError: If the folder cannot be written to.
        ImportError: If matplotlib or scikit-learn is not installed.
    """
    check_matplotlib()
    folder = make_folder("output", output)
    dense = dense_digits(width, epochs=dense_epochs)
    _, dense_top1, _ = evaluate(dense, load_data().validation)
    tqdm.write(f"dense: top-1 {dense_top1:.1f} %")
    tqdm.write("loading the kernels; at their first use they are compiled, which takes half a minute")
    select_backend()  # here, so that no method's time contains it
    budget = {"num_grads": num_grads, "recomputations": recomputations, "refresh": max(1, num_grads // 4)}
    title = "MobileNet on digits: three pruning methods, the same images and steps"
    runs, model, text = [], dense, ""
    for seed in range(seeds):
        for method in METHODS:
            tqdm.write(f"{method.label}, seed {seed}")
            arguments = {**budget, **method.variables} if method.recipe == "mfac.md" else {}
            run, model = run_method(method, dense, seed, arguments, max_train_steps)
            runs.append(run)
        text = write_comparison(dense_top1, runs, folder, title)  # after each seed: Ctrl-C loses no other
    tqdm.write(f"\n{text}\n\ntable, comparison.png and a CSV file per run are in {folder}")
    tqdm.write(size_and_time(model.cpu(), next(iter(load_data().validation))[0][:1].cpu()))
    return runs
