"""`mfac demo`: the tutorial on embedded digits, M-FAC beside magnitude pruning under the same budget."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mfac.extras import install_hint
from mfac.ops.backend import select_backend
from mfac.pruning.result import write_csv
from mfac.recipe.load import tutorial_recipes
from mfac.recipe.manager import Manager
from mfac.tutorial.data import load_data
from mfac.tutorial.dense import DENSE_EPOCHS, DIGITS_WIDTH, dense_digits
from mfac.tutorial.loop import Measurement, evaluate, fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEASURE_EVERY = 8  # steps of the 44 of an epoch
_LABEL_DISTANCE = 4.5  # least distance of the labels of the final accuracies, in per cent


@dataclass(frozen=True, eq=False)
class Method:
    """One way to prune; everything else is the same for all."""

    label: str  # in table and plot
    recipe: str  # file name
    colour: str
    variables: dict[str, Any] = field(default_factory=dict)  # of the recipe, to set


_PUBLISHED = {"update": "independent", "substeps": 1, "damping": 1e-5, "block_size": 2000, "corrections": 0}
METHODS = (
    Method("magnitude", "magnitude.md", "#d95f02"),
    Method("M-FAC as published", "mfac.md", "#7570b3", _PUBLISHED),
    Method("M-FAC, joint update", "mfac.md", "#1b9e77"),
)
_FOOTNOTE = """\
top-1 accuracy on the validation images, mean ± standard deviation of the seeds; sparsity: of the weights that the
recipes prune; seconds: training, pruning and measuring together"""


@dataclass(frozen=True)
class Run:
    """One method with one seed: the measurements, and the seconds for training, pruning and measuring together."""

    method: Method
    seed: int
    measurements: list[Measurement]
    seconds: float

    @property
    def after_pruning(self) -> Measurement:
        """The measurement right after the last pruning step."""
        return [measured for measured in self.measurements if measured.pruned][-1]


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
) -> Run:
    """Prune and train a copy of the dense model.

    Args:
        method: What to run.
        dense: The model to start from; it is not changed.
        seed: Seed of the order of the images and of their shifts.
        recipe_args: Variables of the recipe to set.
        max_train_steps: Optimizer steps per epoch at most; -1: all.

    Returns:
        The run.
    """
    model = copy.deepcopy(dense)
    data = load_data(seed=seed, test_batch_size=120, device=next(model.parameters()).device)
    manager = Manager.from_recipe(recipe_path(method.recipe), recipe_args)
    optimizer = torch.optim.Adam(model.parameters())
    session = manager.apply(model, optimizer, data.gradients, F.cross_entropy, progress=sys.stderr.isatty())
    began = time.perf_counter()
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
    return Run(method, seed, measurements, time.perf_counter() - began)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation, in per cent."""
    return f"{_mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "") + " %"


def _row(method: str, sparsity: str, pruned: str, trained: str, seconds: str) -> str:
    return f"| {method:25} | {sparsity:>8} | {pruned:>19} | {trained:>20} | {seconds:>7} |"


def table(dense_top1: float, runs: list[Run]) -> str:
    """Return the comparison as the README's table (Markdown): dense model, and each method over the seeds.

    Args:
        dense_top1: Accuracy of the dense model in per cent.
        runs: All the runs.

    Returns:
        The table.
    """
    lines = [
        _row("method", "sparsity", "right after pruning", "after the last epoch", "seconds"),
        f"|{'-' * 27}|{'-' * 9}:|{'-' * 20}:|{'-' * 21}:|{'-' * 8}:|",
        _row("dense", "0.0 %", "", f"{dense_top1:.1f} %", ""),
    ]
    for method in METHODS:
        mine = [run for run in runs if run.method == method]
        last = [run.measurements[-1] for run in mine]
        sparsity = _mean([100 * measured.sparsity for measured in last])
        pruned = _spread([run.after_pruning.top1 for run in mine])
        trained = _spread([measured.top1 for measured in last])
        seconds = _mean([run.seconds for run in mine])
        lines.append(_row(method.label, f"{sparsity:.1f} %", pruned, trained, f"{seconds:.1f}"))
    return "\n".join(lines)


def _draw_method(axes: Axes, method: Method, runs: list[Run], dense_top1: float) -> None:
    """Draw the mean over the seeds, from the dense model on, and the range if there are several."""
    points = list(zip(*(run.measurements for run in runs), strict=True))
    steps = [0, *(point[0].step for point in points)]
    top1 = [[dense_top1], *([measured.top1 for measured in point] for point in points)]
    axes.plot(
        steps, [_mean(values) for values in top1], "o-", color=method.colour, label=method.label, lw=2, markersize=4
    )
    if len(runs) > 1:
        low, high = [min(values) for values in top1], [max(values) for values in top1]
        axes.fill_between(steps, low, high, color=method.colour, alpha=0.15, lw=0)


def _label_ends(axes: Axes, runs: list[Run]) -> None:
    """Write the final accuracies at the right, lifted where they would overlap."""
    last = {method: _mean([run.measurements[-1].top1 for run in runs if run.method == method]) for method in METHODS}
    step, height = runs[0].measurements[-1].step, -_LABEL_DISTANCE
    for method, top1 in sorted(last.items(), key=lambda item: item[1]):
        height = max(top1, height + _LABEL_DISTANCE)
        axes.text(step * 1.013, height, f"{top1:.1f}", va="center", color=method.colour, fontweight="bold")


def plot(dense_top1: float, runs: list[Run], path: Path) -> None:
    """Draw accuracy over training steps for all methods, with the pruning steps marked.

    Args:
        dense_top1: Accuracy of the dense model in per cent.
        runs: All the runs.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense_top1, color="#444444", ls=":", lw=1.5, label=f"dense ({dense_top1:.1f} %)")
    for method in METHODS:
        _draw_method(axes, method, [run for run in runs if run.method == method], dense_top1)
    for measured in runs[0].measurements:
        if measured.pruned:
            axes.axvline(measured.step, color="#888888", ls="--", lw=1, zorder=0)
            label = f"pruned to {100 * measured.sparsity:.1f} %"
            axes.text(measured.step, 104, label, ha="center", va="bottom", color="#555555", fontsize=9)
    _label_ends(axes, runs)
    seeds = len({run.seed for run in runs})
    mean = f" (mean of {seeds} seeds)" if seeds > 1 else ""
    axes.set_title(f"MobileNet on digits: three pruning methods, the same images and steps{mean}", pad=20)
    axes.set_xlabel("training step")
    axes.set_ylabel("top-1 accuracy on the validation images, %")
    axes.set_ylim(0, 103)
    axes.set_xlim(0, runs[0].measurements[-1].step * 1.08)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=True, framealpha=1)
    figure.savefig(path)


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
        ImportError: If matplotlib or scikit-learn is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (needed at the end: say so at the start)
    except ImportError as error:
        raise ImportError(install_hint("matplotlib, which draws the comparison,", "demo")) from error
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    dense = dense_digits(width, epochs=dense_epochs)
    _, dense_top1, _ = evaluate(dense, load_data().validation)
    tqdm.write(f"dense: top-1 {dense_top1:.1f} %")
    tqdm.write("loading the kernels; at their first use they are compiled, which takes half a minute")
    select_backend()  # here, so that no method's time contains it
    budget = {"num_grads": num_grads, "recomputations": recomputations, "refresh": max(1, num_grads // 4)}
    runs = []
    for seed in range(seeds):
        for method in METHODS:
            tqdm.write(f"{method.label}, seed {seed}")
            arguments = {**budget, **method.variables} if method.recipe == "mfac.md" else {}
            run = run_method(method, dense, seed, arguments, max_train_steps)
            runs.append(run)
            name = method.label.replace(", ", "-").replace(" ", "-").lower()
            write_csv(folder / f"{name}-{seed}.csv", Measurement, run.measurements)
    text = f"{table(dense_top1, runs)}\n\n{_FOOTNOTE}"
    (folder / "comparison.txt").write_text(f"{text}\n", encoding="utf-8")
    plot(dense_top1, runs, folder / "comparison.png")
    tqdm.write(f"\n{text}\n\ntable, comparison.png and a CSV file per run are in {folder}")
    return runs
