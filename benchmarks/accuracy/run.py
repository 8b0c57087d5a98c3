"""Accuracy of pruned ResNet-20 on CIFAR-10, without a training loop: methods, sparsities, patterns.

    python benchmarks/accuracy/run.py --data cifar10 --checkpoint resnet20.pt

`--data` is a tree train/<class>/<file>, val/<class>/<file>, or the folder that torchvision downloads
(`cifar-10-batches-py`); `--checkpoint` a state_dict (see resnet20.py), such as the one that the repositories of M-FAC
and CHITA hold. Gradients come from the training images, accuracy from all validation images; nothing is chosen by the
latter. Every run is written to results/runs.jsonl as it ends, and what stands there is not run again: stop it and go
on as you like, delete the file to start anew. The table and the plot are made from that file (`--seeds 0` makes them
without running anything). `--jobs` runs several at a time (on one GPU under MPS; else they take turns).
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet20 import accuracy, endless_batches, load_images, load_model, options_parser, record, run_all, spread
from torch import nn

import mfac
from mfac.pruning.patterns import parse_pattern

M, MANY, BATCH = 256, 1024, 32  # gradients; images of each
PUBLISHED = {"update": "independent", "substeps": 1, "damping": 1e-5, "block_size": 2000}
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
LABELS = {
    "magnitude": "magnitude",
    "published": "M-FAC as published, one step",
    "published_many": f"the same, {MANY:,} gradients",
    "step": "`prune_step`",
    "step_many": f"the same, {MANY:,} gradients",
    "corrected": "`prune_step(batches=...)`: and a correction",
    "auto": '`prune_step(batches=..., damping="auto", block_size="auto")`',
    "plain": "`prune(corrections=0)`",
    "prune": "`prune`",
    "fresh": "`prune(refresh=256)`: all gradients new",
    "prune_many": f"`prune(num_grads={MANY})`",
}
DRAWN = {"magnitude": "#d95f02", "published": "#7570b3", "step": "#66a61e", "prune": "#1b9e77", "prune_many": "#333399"}
SINGLE_STEPS = {  # method: gradients
    "published": M, "published_many": MANY, "step": M, "step_many": MANY, "corrected": M, "auto": M,
}  # fmt: skip
PRUNE = {  # options of mfac.prune; those not named are its defaults
    "plain": {"corrections": 0},
    "prune": {},
    "fresh": {"refresh": M},
    "prune_many": {"num_grads": MANY},
}
SEEDS = {"plain": 1}  # methods that are there for comparison
PATTERNS = {  # pattern: (sparsity, name of the rule: how)
    "2:4": (
        0.5,
        ("single saliencies, no update", "single saliencies, joint update", "groups, `prune_step`", "groups, `prune`"),
    ),
    "1:4": (0.75, ("groups, `prune_step`", "groups, `prune`")),
    "block4": (
        0.7,
        ("mean of single saliencies, independent update", "groups, `prune_step`", "groups, `prune`"),
    ),
}
CITED = {  # sparsity -> top-1 as their authors report it, of the same checkpoint
    "CHITA++, many stages (Benbaki et al., ICML 2023)": {0.8: 88.7, 0.9: 79.3},
}


@dataclass
class Bench:
    """Data, checkpoint and the gradients of the dense model, which all single steps of a seed are made with."""

    train: tuple
    validation: tuple
    checkpoint: Path
    device: str
    cached_seed: int | None = None
    cached: dict[int, mfac.GradientBuffer] = field(default_factory=dict)  # by their number

    @classmethod
    def load(cls, data: Path, checkpoint: Path, device: str) -> Bench:
        """Read the images."""
        return cls(load_images(data, True), load_images(data, False), checkpoint, device)

    def model(self) -> nn.Module:
        """Return the dense network."""
        model = load_model(self.checkpoint, self.device)
        if torch.device(self.device).type == "cuda":
            record(model, False, BATCH)
        return model

    def gradients(self, seed: int, count: int = M) -> mfac.GradientBuffer:
        """Return the gradients that a run of this seed collects first."""
        if self.cached_seed != seed:
            self.cached_seed, self.cached = seed, {}
        if count not in self.cached:
            options = {"num_grads": count, "progress": False}
            self.cached[count] = mfac.collect_gradients(self.model(), self.batches(seed), F.cross_entropy, **options)
        return self.cached[count]

    def batches(self, seed: int, augment: bool = False):
        """Return endless batches of 32 training images."""
        return endless_batches(*self.train, seed, BATCH, augment)

    def __call__(self, key: dict) -> dict:
        """Return what a run of the plan gives."""
        measured = self.run(**key) if "method" in key else self.run_pattern(**key)
        return {**key, **measured, "device": torch.device(self.device).type}

    def run(self, method: str, sparsity: float, seed: int) -> dict:
        """Prune and measure."""
        model = self.model()
        grads = self.gradients(seed, SINGLE_STEPS[method]) if method in SINGLE_STEPS else None
        began = time.perf_counter()
        if method == "magnitude":
            mfac.prune_step(model, None, sparsity, criterion="magnitude")
        elif grads is None:
            options = {"num_grads": M, "progress": False, **PRUNE[method]}
            mfac.prune(model, self.batches(seed), F.cross_entropy, sparsity, **options)
        else:
            options = PUBLISHED if method.startswith("published") else {}
            if method in ("corrected", "auto"):
                options = {"batches": self.batches(2000 + seed), "loss_fn": F.cross_entropy, "progress": False}
            if method == "auto":
                options |= {"damping": "auto", "block_size": "auto"}
            mfac.prune_step(model, grads, sparsity, **options)
        return {**self.measured(model, seed), "seconds": time.perf_counter() - began}

    def measured(self, model: nn.Module, seed: int) -> dict:
        """Return the accuracy, and that after re-estimation of BatchNorm from 64 batches."""
        top1 = accuracy(model, *self.validation)
        vars(model).pop("forward", None)  # what is recorded has BatchNorm in eval mode, whatever its mode is now
        mfac.reestimate_batchnorm(model, self.batches(1000 + seed, augment=True), 64)
        return {"top1": top1, "top1_batchnorm": accuracy(model, *self.validation)}

    def run_pattern(self, pattern: str, rule: str, sparsity: float, seed: int) -> dict:
        """Prune by a pattern, and measure."""
        model = self.model()
        began = time.perf_counter()
        if rule.endswith("`prune`"):
            mfac.prune(
                model, self.batches(seed), F.cross_entropy, sparsity, pattern=pattern, num_grads=M, progress=False
            )
        elif rule.endswith("`prune_step`"):
            mfac.prune_step(model, self.gradients(seed), sparsity, pattern=pattern)
        else:
            single_saliencies(model, self.gradients(seed), sparsity, pattern, rule)
        return {**self.measured(model, seed), "seconds": time.perf_counter() - began}


def single_saliencies(model: nn.Module, grads: mfac.GradientBuffer, sparsity: float, pattern: str, rule: str) -> None:
    """Prune groups as tools do that score weights one by one: the lowest of a group, or the lowest mean."""
    chosen = mfac.prunable_parameters(model)
    fisher = mfac.Fisher(grads, PUBLISHED["damping"], PUBLISHED["block_size"])
    weights = torch.cat([p.detach().reshape(-1) for p in chosen.values()])
    diagonal = fisher.inverse_diagonal()
    saliency, start, groups = weights.square() / (2 * diagonal), 0, []
    for name, p in chosen.items():
        groups.append(parse_pattern(pattern).groups(p.shape, chosen.targets[name].axes) + start)
        start += p.numel()
    groups = torch.cat(groups).to(weights.device)
    kept = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    if pattern == "2:4":
        kept[groups.gather(1, saliency[groups].argsort(1)[:, :2])] = False
    else:
        kept[groups[saliency[groups].mean(1).argsort()[: round(sparsity * len(groups))]]] = False
    if "joint" in rule:
        fisher.joint_update(weights, kept)
    elif "independent" in rule:
        fisher.independent_update(weights, kept, diagonal)
    else:
        weights *= kept
    with torch.no_grad():
        for p, new in zip(chosen.values(), weights.split([p.numel() for p in chosen.values()]), strict=True):
            p.copy_(new.view_as(p))


def table(rows: list[dict], key: str) -> str:
    """Return the Markdown table of one of the two accuracies."""
    mine = [row for row in rows if "method" in row]
    sparsities = sorted({row["sparsity"] for row in mine})
    devices = sorted({row.get("device", "cpu") for row in mine})
    lines = ["| method | " + " | ".join([f"{s:.0%}" for s in sparsities] + [f"seconds, {d}" for d in devices]) + " |"]
    lines.append("|---|" + "---:|" * (len(sparsities) + len(devices)))
    for method, label in LABELS.items():
        found = [row for row in mine if row["method"] == method]
        cells = [spread([row[key] for row in found if row["sparsity"] == s]) for s in sparsities]
        for device in devices:
            seconds = [row["seconds"] for row in found if row.get("device", "cpu") == device]
            cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
        if found:
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for label, values in CITED.items() if key == "top1" else ():
        cells = [str(values.get(s, "")) for s in sparsities] + [""] * len(devices)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pattern_table(rows: list[dict]) -> str:
    """Return the Markdown table of the patterns."""
    lines = ["| pattern | sparsity | rule | top-1 | with BatchNorm re-estimated |", "|---|---:|---|---:|---:|"]
    for pattern, (sparsity, rules) in PATTERNS.items():
        for rule in rules:
            found = [row for row in rows if (row.get("pattern"), row.get("rule")) == (pattern, rule)]
            if found:
                cells = [spread([row[key] for row in found]) for key in ("top1", "top1_batchnorm")]
                lines.append(f"| {pattern} | {sparsity:.0%} | {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], dense: float, path: Path) -> None:
    """Draw accuracy over sparsity, with the range of the seeds; dashed: with BatchNorm re-estimated, where it helps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color="#444444", ls=":", lw=1.5, label=f"dense ({dense:.1f} %)")
    for method, colour in DRAWN.items():
        found = [row for row in rows if row.get("method") == method]
        xs = sorted({row["sparsity"] for row in found})
        for key, style in (("top1", "o-"), ("top1_batchnorm", "o--"))[: 1 if method in PRUNE else 2]:
            if not found:
                continue
            values = [[row[key] for row in found if row["sparsity"] == x] for x in xs]
            percent, means = [100 * x for x in xs], [statistics.mean(v) for v in values]
            label = LABELS[method].replace("`", "") + (", BatchNorm re-estimated" if key == "top1_batchnorm" else "")
            axes.plot(percent, means, style, color=colour, label=label, markersize=4)
            axes.fill_between(
                percent, *zip(*((min(v), max(v)) for v in values), strict=True), color=colour, alpha=0.12, lw=0
            )
    for label, cited in CITED.items():
        axes.plot([100 * x for x in cited], list(cited.values()), "k*", label=label)
    axes.set_title("ResNet-20 on CIFAR-10, pruned without a training loop", fontsize=11)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run what is not there yet; write table and plot."""
    parser = options_parser(__doc__, SPARSITIES, LABELS)
    parser.add_argument("--patterns", nargs="*", choices=list(PATTERNS), default=list(PATTERNS))
    options = parser.parse_args()
    plan = []
    for seed in range(options.seeds):  # the gradients of a seed are collected once
        for method, sparsity in itertools.product(options.methods, options.sparsities):
            if seed < (1 if method == "magnitude" else SEEDS.get(method, options.seeds)):  # magnitude: no gradients
                plan.append({"method": method, "sparsity": sparsity, "seed": seed})
        for pattern in options.patterns:
            sparsity, rules = PATTERNS[pattern]
            plan += [{"pattern": pattern, "rule": rule, "sparsity": sparsity, "seed": seed} for rule in rules]
    log = options.output / "runs.jsonl"
    rows = run_all(plan, log, Bench.load, (options.data, options.checkpoint, options.device), options.jobs)
    images = load_images(options.data, False)
    dense = accuracy(load_model(options.checkpoint, options.device), *images)
    text = [
        "# ResNet-20 on CIFAR-10, pruned without a training loop",
        "",
        f"    python benchmarks/accuracy/run.py --data {options.data.name} --checkpoint {options.checkpoint.name}",
        "",
        f"top-1 in per cent on {len(images[1]):,} test images (dense: {dense:.2f}), mean ± standard "
        f"deviation of the seeds (without ±: one seed; empty: not run). {M} gradients of {BATCH} training images "
        "if no other number is named; "
        "seconds: wall time of pruning and measuring, beside other work (cuda: several runs at a time on one H200); "
        "single steps share their gradients, which are not counted.",
        "",
        table(rows, "top1"),
        "",
        "With the statistics of BatchNorm re-estimated afterwards from 64 batches, augmented as in training:",
        "",
        table(rows, "top1_batchnorm"),
        "",
        "Patterns:",
        "",
        pattern_table(rows),
        "",
    ]
    (options.output / "table.md").write_text("\n".join(text))
    plot(rows, dense, options.output / "accuracy.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
