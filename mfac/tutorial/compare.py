"""`mfac compare`: several recipes under the same budget, from the same model, with the same seeds, side by side."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mfac.checks import check_int
from mfac.extras import install_hint
from mfac.pruning.result import write_csv
from mfac.recipe.manager import Manager
from mfac.tutorial.files import make_folder
from mfac.tutorial.loop import Measurement
from mfac.tutorial.processes import find_device
from mfac.tutorial.settings import RunSettings, TrainSettings, resolve
from mfac.tutorial.start import load_images, measure_initial, read_pretrained
from mfac.tutorial.train import check_options, epochs_done, holds_run, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_DISTANCE = 4.5  # least distance of the labels of the final accuracies, in per cent
_COLOURS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")  # Brewer's Dark2
_RUNS = "comparison.json"
FOOTNOTE = """\
top-1 accuracy on the validation images, mean ± standard deviation of the seeds; sparsity: of the weights that the
recipes prune; seconds: of training and pruning together, and of pruning (collecting gradients included)"""


@dataclass(frozen=True, eq=False)
class Method:
    """One way to prune; everything else is the same for all."""

    label: str  # in table and plot
    recipe: str  # path or file name
    colour: str
    variables: dict[str, Any] = field(default_factory=dict)  # of the recipe, to set


@dataclass(frozen=True)
class Run:
    """One method with one seed, and what was measured."""

    method: Method
    seed: int
    measurements: list[Measurement]

    @property
    def after_pruning(self) -> Measurement:
        """The measurement right after the last pruning step; without one, the last."""
        return [*(m for m in self.measurements[:-1] if not m.pruned), *(m for m in self.measurements if m.pruned)][-1]

    @property
    def pruning_seconds(self) -> float:
        """The time that pruning took."""
        return sum(measured.pruning_seconds for measured in self.measurements)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation, in per cent."""
    return f"{_mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "") + " %"


def _methods(runs: Sequence[Run]) -> list[Method]:
    return list(dict.fromkeys(run.method for run in runs))


def table(dense_top1: float, runs: Sequence[Run]) -> str:
    """Return the comparison as a table (Markdown): the initial model, and each method over the seeds.

    Args:
        dense_top1: Accuracy of the initial model in per cent.
        runs: All the runs.

    Returns:
        The table.
    """
    width = max(25, *(len(method.label) for method in _methods(runs)))

    def row(method: str, *cells: str) -> str:
        widths = (8, 19, 20, 7, 7)
        return " | ".join([f"| {method:{width}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))]) + " |"

    lines = [
        row("method", "sparsity", "right after pruning", "after the last epoch", "seconds", "pruning"),
        f"|{'-' * (width + 2)}|{'-' * 9}:|{'-' * 20}:|{'-' * 21}:|{'-' * 8}:|{'-' * 8}:|",
        row("dense", "0.0 %", "", f"{dense_top1:.1f} %", "", ""),
    ]
    for method in _methods(runs):
        mine = [run for run in runs if run.method == method]
        last = [run.measurements[-1] for run in mine]
        lines.append(
            row(
                method.label,
                f"{_mean([100 * measured.sparsity for measured in last]):.1f} %",
                _spread([run.after_pruning.top1 for run in mine]),
                _spread([measured.top1 for measured in last]),
                f"{_mean([measured.seconds for measured in last]):.1f}",
                f"{_mean([run.pruning_seconds for run in mine]):.1f}",
            )
        )
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


def _label_ends(axes: Axes, runs: Sequence[Run]) -> None:
    """Write the final accuracies at the right, lifted where they would overlap."""
    last = {
        method: _mean([run.measurements[-1].top1 for run in runs if run.method == method]) for method in _methods(runs)
    }
    step, height = runs[0].measurements[-1].step, -_LABEL_DISTANCE
    for method, top1 in sorted(last.items(), key=lambda item: item[1]):
        height = max(top1, height + _LABEL_DISTANCE)
        axes.text(step * 1.013, height, f"{top1:.1f}", va="center", color=method.colour, fontweight="bold")


def plot(dense_top1: float, runs: Sequence[Run], path: Path, title: str) -> None:
    """Draw accuracy over training steps for all methods, with the pruning steps marked.

    Args:
        dense_top1: Accuracy of the initial model in per cent.
        runs: All the runs.
        path: The PNG file to write.
        title: Of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense_top1, color="#444444", ls=":", lw=1.5, label=f"dense ({dense_top1:.1f} %)")
    for method in _methods(runs):
        _draw_method(axes, method, [run for run in runs if run.method == method], dense_top1)
    marks = {measured.step: measured.sparsity for measured in runs[0].measurements if measured.pruned}
    for step, sparsity in marks.items():
        axes.axvline(step, color="#888888", ls="--", lw=1, zorder=0)
        if len(marks) <= 4:
            label = f"pruned to {100 * sparsity:.1f} %"
            axes.text(step, 104, label, ha="center", va="bottom", color="#555555", fontsize=9)
    _label_ends(axes, runs)
    seeds = len({run.seed for run in runs})
    mean = f" (mean of {seeds} seeds)" if seeds > 1 else ""
    axes.set_title(f"{title}{mean}", pad=20)
    axes.set_xlabel("training step")
    axes.set_ylabel("top-1 accuracy on the validation images, %")
    axes.set_ylim(0, 103)
    axes.set_xlim(0, runs[0].measurements[-1].step * 1.08)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=True, framealpha=1)
    figure.savefig(path)


def check_matplotlib() -> None:
    """Check, before hours of work, that what draws their result is there.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (looked for only)
    except ImportError as error:
        raise ImportError(install_hint("matplotlib, which draws the comparison,", "demo")) from error


def write_comparison(dense_top1: float, runs: Sequence[Run], folder: Path, title: str) -> str:
    """Write `comparison.txt`, `comparison.png` and a CSV file per run.

    Args:
        dense_top1: Accuracy of the initial model in per cent.
        runs: All the runs.
        folder: Where they go.
        title: Of the plot.

    Returns:
        The table and what it means.
    """
    text = f"{table(dense_top1, runs)}\n\n{FOOTNOTE}"
    (folder / "comparison.txt").write_text(f"{text}\n", encoding="utf-8")
    for run in runs:
        write_csv(folder / f"{_file_name(run.method.label)}-{run.seed}.csv", Measurement, run.measurements)
    plot(dense_top1, runs, folder / "comparison.png", title)
    return text


def _labels(recipes: Sequence[str]) -> list[str]:
    """File names without suffix, or the paths if two have the same."""
    parts = [recipe.partition("#") for recipe in recipes]
    labels = [Path(path).stem + mark + number for path, mark, number in parts]
    return (
        labels if len(set(map(_file_name, labels))) == len(labels) else [f"{i} {r}" for i, r in enumerate(recipes, 1)]
    )


def _file_name(label: str) -> str:
    """A label as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in label.lower())


class _Record:
    """The file of the runs that are done, so that an interrupted comparison goes on."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = folder / _RUNS, settings
        self.content: dict[str, Any] = {"settings": settings, "dense": None, "runs": []}
        if self._path.exists():
            try:
                self.content = json.loads(self._path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"save_dir: expected a comparison in {self._path}, got a damaged file") from error
            before = self.content.get("settings") or {}
            differing = [name for name, value in settings.items() if before.get(name) != value]
            if differing:
                raise ValueError(
                    f"save_dir: expected a folder without a comparison, or one of this comparison, got {folder}, whose "
                    f"{_RUNS} is of one with other {' and '.join(differing)}; take another --save-dir"
                )

    def check_folders(self, tags: Iterable[str]) -> None:
        """Check that no folder of a run that is to be made holds a run that is not of this comparison."""
        for tag in tags:
            folder = self._path.parent / tag
            if tag != self.content.get("running") and holds_run(folder):
                raise ValueError(
                    f"save_dir: expected a folder without runs of these names, got {folder}, which holds one that is "
                    "not of this comparison; take another --save-dir"
                )

    def find(self, label: str, seed: int) -> list[Measurement] | None:
        for run in self.content["runs"]:
            if (run["label"], run["seed"]) == (label, seed):
                return [Measurement(**measured) for measured in run["measurements"]]
        return None

    def begin(self, tag: str) -> None:
        self.content["running"] = tag
        self.write()

    def add(self, label: str, seed: int, measurements: list[Measurement]) -> None:
        self.content["runs"].append(
            {"label": label, "seed": seed, "measurements": [asdict(measured) for measured in measurements]}
        )
        self.write()

    def write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        partial.replace(self._path)


def compare(recipes: Sequence[str], settings: RunSettings, seeds: int = 1) -> list[Run]:
    """Run several recipes from the same model, on the same images in the same order, and compare them.

    Writes `comparison.txt`, `comparison.png`, a CSV file per run, and each run's own folder as `mfac train` does, into
    `settings.save_dir`. Runs that are done are kept in `comparison.json`: started again, it goes on, with the run that
    was interrupted after its last whole epoch.

    Args:
        recipes: Paths of recipes.
        settings: The options of all of them.
        seeds: Runs of each recipe, with the seeds 0, 1, ...

    Returns:
        The runs.

    Raises:
        ValueError: If there are no recipes, or `save_dir` holds a comparison with other options or images, or another
            run under the name of one of these; and as for `train`.
        ImportError: If matplotlib is not installed.
    """
    check_matplotlib()
    if not recipes:
        raise ValueError("recipes: expected at least one, got none")
    check_int("seeds", seeds)
    managers = [Manager.from_recipe(recipe, settings.recipe_args) for recipe in recipes]
    _, described, path = read_pretrained(settings)
    settings = resolve(settings, described, path)
    common = TrainSettings(recipe_path=recipes[0], **asdict(settings))
    check_options(common)
    labels = _labels(recipes)
    methods = [
        Method(label, recipe, _COLOURS[i % len(_COLOURS)])
        for i, (label, recipe) in enumerate(zip(labels, recipes, strict=True))
    ]
    folder = make_folder("save_dir", settings.save_dir)
    varying = ("recipe_args", "save_dir", "logs_dir")
    same = {name: value for name, value in asdict(settings).items() if name not in varying}
    loaded = {label: str(manager.recipe) for label, manager in zip(labels, managers, strict=True)}
    images = load_images(settings, find_device(settings.device), settings.train_batch_size).num_images
    record = _Record(folder, {**same, "recipes": loaded, "images": list(images)})
    plan = [
        (f"{_file_name(method.label)}-{seed}", seed, method)
        for seed, method in itertools.product(range(seeds), methods)
    ]
    record.check_folders(tag for tag, seed, method in plan if record.find(method.label, seed) is None)
    if record.content["dense"] is None:
        record.content["dense"] = measure_initial(common)[1]
        record.write()
    dense = record.content["dense"]
    tqdm.write(f"initial model: top-1 {dense:.1f} %")
    runs = []
    for tag, seed, method in plan:
        measurements = record.find(method.label, seed)
        if measurements is None:
            tqdm.write(f"{method.label}, seed {seed}")
            done = epochs_done(folder / tag) if record.content.get("running") == tag else None
            if done is None:
                (folder / tag / "checkpoint.pt").unlink(missing_ok=True)  # untrained, of another run
                record.begin(tag)
            run = replace(common, recipe_path=method.recipe, model_tag=tag, seed=seed)
            measurements = train(replace(run, resume=done is not None, overwrite=done is None), "again")
            record.add(method.label, seed, measurements)
        runs.append(Run(method, seed, measurements))
    text = write_comparison(
        dense, runs, folder, f"{settings.arch_key} on {settings.dataset}: the same images and steps"
    )
    tqdm.write(f"\n{text}\n\ntable, comparison.png and a CSV file per run are in {folder}")
    return runs
