"""`mfac demo`: the tutorial on embedded digits, M-FAC beside magnitude pruning under the same budget."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mfac.recipe.manager import Manager
from mfac.vision.data import load_data
from mfac.vision.dense import dense_digits
from mfac.vision.loop import Measurement, evaluate, fit, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 0.35
_MEASURE_EVERY = 11  # steps; about four points per epoch of 44 steps


@dataclass(frozen=True)
class Method:
    """One way to prune: its name in table and plot, its recipe, what it changes in it, and its colour."""

    label: str
    recipe: str
    arguments: dict[str, Any]
    colour: str


METHODS = (
    Method("magnitude", "magnitude.md", {}, "#d95f02"),
    Method("M-FAC, independent update", "mfac.md", {"update": "independent"}, "#7570b3"),
    Method("M-FAC, joint update", "mfac.md", {"update": "joint"}, "#1b9e77"),
)


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
        ValueError: If it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"the recipe {name} is missing from {package / 'recipes'}; reinstall mfac")


def run_method(
    method: Method, dense: nn.Module, seed: int, recipe_args: dict[str, Any], max_train_steps: int = -1
) -> Run:
    """Prune and train a copy of the dense model.

    Args:
        method: What to run.
        dense: The model to start from; it is not changed.
        seed: Seed of the order of the images and of their shifts.
        recipe_args: Variables of the recipe to set, beside the method's own.
        max_train_steps: Optimizer steps per epoch at most; -1: all.

    Returns:
        The run.
    """
    model = copy.deepcopy(dense)
    data = load_data(seed=seed, test_batch_size=120, device=next(model.parameters()).device)
    manager = Manager.from_recipe(recipe_path(method.recipe), {**recipe_args, **method.arguments})
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


def table(dense_top1: float, runs: list[Run]) -> str:
    """Return the comparison as text: one line for the dense model and one per method, means over the seeds.

    Args:
        dense_top1: Accuracy of the dense model in per cent.
        runs: All the runs.

    Returns:
        The table.
    """
    lines = [
        f"{'':28}{'sparsity':>10}{'top-1 after':>14}{'top-1 after':>16}{'seconds':>10}",
        f"{'':28}{'%':>10}{'pruning, %':>14}{'last epoch, %':>16}{'':>10}",
        f"{'dense':28}{0:10.2f}{'':>14}{dense_top1:16.1f}{'':>10}",
    ]
    for method in METHODS:
        mine = [run for run in runs if run.method == method]
        last = [run.measurements[-1] for run in mine]
        lines.append(
            f"{method.label:28}"
            f"{100 * _mean([measured.sparsity for measured in last]):10.2f}"
            f"{_mean([run.after_pruning.top1 for run in mine]):14.1f}"
            f"{_mean([measured.top1 for measured in last]):16.1f}"
            f"{_mean([run.seconds for run in mine]):10.1f}"
        )
    return "\n".join(lines)


def _draw_method(axes: Axes, method: Method, runs: list[Run]) -> None:
    """Draw the mean over the seeds, from the dense model on, and the range if there are several."""
    points = list(zip(*(run.measurements for run in runs), strict=True))
    steps = [point[0].step for point in points]
    top1 = [[measured.top1 for measured in point] for point in points]
    axes.plot(
        steps, [_mean(values) for values in top1], "o-", color=method.colour, label=method.label, lw=2, markersize=4
    )
    if len(runs) > 1:
        low, high = [min(values) for values in top1], [max(values) for values in top1]
        axes.fill_between(steps, low, high, color=method.colour, alpha=0.15, lw=0)
    axes.annotate(
        f"{_mean(top1[-1]):.1f}",
        (steps[-1], _mean(top1[-1])),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=method.colour,
        fontweight="bold",
    )


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
        _draw_method(axes, method, [run for run in runs if run.method == method])
    for measured in runs[0].measurements:
        if measured.pruned:
            axes.axvline(measured.step, color="#888888", ls="--", lw=1, zorder=0)
            axes.annotate(
                f"pruned to {100 * measured.sparsity:.1f} %",
                (measured.step, 3),
                xytext=(-5, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="bottom",
                color="#666666",
                fontsize=9,
            )
    seeds = len({run.seed for run in runs})
    axes.set_title(
        f"MobileNet on digits, three pruning methods, same training{f' (mean of {seeds} seeds)' if seeds > 1 else ''}"
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("top-1 accuracy on the validation images, %")
    axes.set_ylim(0, 103)
    axes.set_xlim(0, runs[0].measurements[-1].step * 1.07)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9)
    figure.savefig(path)


def demo(
    output: str | Path = "mfac-demo",
    seeds: int = 1,
    num_grads: int = 64,
    *,
    width: float = _WIDTH,
    dense_epochs: float | None = None,
    recipe_args: dict[str, Any] | None = None,
    max_train_steps: int = -1,
) -> list[Run]:
    """Run the comparison; print a table, write it, the plot and one CSV per run.

    Args:
        output: Folder for `comparison.txt`, `comparison.png` and the CSV files.
        seeds: Runs of each method.
        num_grads: Gradients per Fisher.
        width: Multiplier of the network's channels.
        dense_epochs: Length of the dense training; None: the one that reaches 98 %.
        recipe_args: Variables to set in all the recipes.
        max_train_steps: Optimizer steps per epoch at most; -1: all.

    Returns:
        The runs.

    Raises:
        ImportError: If matplotlib or scikit-learn is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (needed at the end: say so at the start)
    except ImportError as error:
        raise ImportError("the demo draws with matplotlib; install it with: pip install 'mfac[demo]'") from error
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    dense = dense_digits(width) if dense_epochs is None else dense_digits(width, epochs=dense_epochs)
    _, dense_top1, _ = evaluate(dense, load_data().validation)
    tqdm.write(f"dense: top-1 {dense_top1:.1f} %")
    runs = []
    for seed in range(seeds):
        for method in METHODS:
            tqdm.write(f"{method.label}, seed {seed}")
            arguments = {**(recipe_args or {}), **({"num_grads": num_grads} if method.arguments else {})}
            run = run_method(method, dense, seed, arguments, max_train_steps)
            runs.append(run)
            write_csv(
                folder / f"{method.label.replace(', ', '-').replace(' ', '-').lower()}-{seed}.csv", run.measurements
            )
    text = table(dense_top1, runs)
    (folder / "comparison.txt").write_text(f"{text}\n", encoding="utf-8")
    plot(dense_top1, runs, folder / "comparison.png")
    tqdm.write(f"\n{text}\n\nsparsity: share of zeros in the weights that the recipes prune; everything is in {folder}")
    return runs
