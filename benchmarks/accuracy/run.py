"""Accuracy of pruned ResNet-20 on CIFAR-10, without any training: methods, recomputations, sparsities, patterns.

    python benchmarks/accuracy/run.py --data cifar10 --checkpoint resnet20_cifar10.pt

`--data` is a tree train/<class>/*.jpg, val/<class>/*.jpg; `--checkpoint` a state_dict (see resnet20.py). Gradients
come from the training images, accuracy from all validation images; nothing is chosen by the latter. Every run is
written to results/runs.jsonl as it ends, and what stands there is not run again: stop it and go on as you like,
delete the file to start anew. The table and the plot are made from that file (`--seeds 0` makes them without running
anything).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet20 import accuracy, endless_batches, load_images, load_model
from torch import nn
from tqdm import tqdm

import mfac
from mfac.pruning.patterns import parse_pattern

M = 256  # gradients of 32 images
REFRESH = M // 4
PUBLISHED = {"damping": 1e-5, "block_size": 2000, "substeps": 1}
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
METHODS = {  # options of mfac.prune; those not named are its defaults
    "independent": {"update": "independent", "refresh": M, **PUBLISHED},
    "joint": {"refresh": M},
    "rolling": {"refresh": REFRESH},
    "auto": {"refresh": REFRESH, "damping": "auto", "block_size": "auto"},
}
LABELS = {
    "magnitude": "magnitude",
    "independent": "M-FAC as published (independent update, B = 2000, λ = 1e-5)",
    "joint": "joint update, 8 sub-steps, all gradients new",
    "rolling": "the same, a quarter of the gradients new (rolling)",
    "auto": "the same, rolling, automatic damping and block size",
}
PATTERNS = {  # pattern: (sparsity, name of the rule: how)
    "2:4": (0.5, ("single saliencies, no update", "single saliencies, joint update", "groups, joint update")),
    "block4": (0.7, ("mean of single saliencies, independent update", "groups, joint update")),
}


@dataclass
class Bench:
    """Data, checkpoint and the gradients of the dense model, which all runs of a seed start with."""

    train: tuple
    validation: tuple
    checkpoint: Path
    cached_seed: int | None = None
    cached: list | None = None

    def gradients(self, seed: int) -> mfac.GradientBuffer:
        """Return the M gradients that a run of this seed collects first."""
        if self.cached_seed != seed:
            batches = endless_batches(*self.train, seed)
            self.cached = mfac.collect_gradients(load_model(self.checkpoint), batches, F.cross_entropy, M)
            self.cached_seed = seed
        return self.cached

    def run(self, method: str, sparsity: float, recomputations: int, seed: int) -> dict:
        """Prune and measure."""
        model = load_model(self.checkpoint)
        grads = self.gradients(seed) if recomputations == 1 and method != "magnitude" else None
        began = time.perf_counter()
        if method == "magnitude":
            result = mfac.prune_step(model, None, sparsity, criterion="magnitude")
        elif recomputations == 1:  # the same as mfac.prune, from gradients that all methods share
            options = {key: value for key, value in METHODS[method].items() if key != "refresh"}
            result = mfac.prune_step(model, grads, sparsity, **options)
        else:
            batches = endless_batches(*self.train, seed)
            options = {**METHODS[method], "recomputations": recomputations}
            result = mfac.prune(model, batches, F.cross_entropy, sparsity, num_grads=M, progress=False, **options)
        seconds = time.perf_counter() - began
        return {**self.measured(model, seed), "seconds": seconds, "damping": result.damping, "B": result.block_size}

    def measured(self, model: nn.Module, seed: int) -> dict:
        """Return the accuracy, and that after re-estimation of BatchNorm from 64 batches."""
        top1 = accuracy(model, *self.validation)
        mfac.reestimate_batchnorm(model, endless_batches(*self.train, 1000 + seed), 64)
        return {"top1": top1, "top1_batchnorm": accuracy(model, *self.validation)}

    def run_pattern(self, pattern: str, rule: str, sparsity: float, seed: int) -> dict:
        """Prune by a pattern with one set of gradients, and measure."""
        model, grads = load_model(self.checkpoint), self.gradients(seed)
        began = time.perf_counter()
        if rule.startswith("groups"):
            mfac.prune_step(model, grads, sparsity, pattern=pattern)
        else:
            single_saliencies(model, grads, sparsity, pattern, rule)
        seconds = time.perf_counter() - began
        return {**self.measured(model, seed), "seconds": seconds}


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
    groups, kept = torch.cat(groups), torch.ones(len(weights), dtype=torch.bool)
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


def worth_it(method: str, recomputations: int, sparsity: float, seed: int) -> bool:
    """Whether a run is done without being asked for; collecting 4,096 gradients for one takes as long as 16 others.

    Below 80 % one collection is enough. With several, methods that are there for comparison have one seed, and the
    published one stops at 4.
    """
    if recomputations == 1:
        return True
    if method == "independent":
        return recomputations <= 4 and sparsity >= 0.8 and seed == 0
    alone = method == "auto" or (method == "joint" and recomputations > 4)
    return sparsity >= 0.8 and (seed == 0 or not alone)


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(rows: list[dict], key: str) -> str:
    """Return the Markdown table of one of the two accuracies."""
    mine = [row for row in rows if "method" in row]
    sparsities = sorted({row["sparsity"] for row in mine})
    head = "| method | R | " + " | ".join(f"{s:.0%}" for s in sparsities) + " | seconds |"
    lines = [head, "|---|---:|" + "---:|" * (len(sparsities) + 1)]
    for method, r in itertools.product(LABELS, sorted({row["R"] for row in mine})):
        found = [row for row in mine if (row["method"], row["R"]) == (method, r)]
        if not found:
            continue
        cells = []
        for s in sparsities:
            values = [row[key] for row in found if row["sparsity"] == s]
            cells.append(spread(values) if values else "")
        seconds = statistics.mean(row["seconds"] for row in found)
        lines.append(f"| {LABELS[method]} | {r} | " + " | ".join(cells) + f" | {seconds:.0f} |")
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
    """Draw accuracy over sparsity for every method at its most recomputations, and the joint update at R = 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color="#444444", ls=":", lw=1.5, label=f"dense ({dense:.1f} %)")
    colours = dict(zip(LABELS, ("#d95f02", "#7570b3", "#66a61e", "#1b9e77", "#e7298a"), strict=True))
    styles = {1: "--", 4: "-.", 16: "-"}
    mine = [row for row in rows if "method" in row]
    for method, r in itertools.product(LABELS, sorted({row["R"] for row in mine})):
        found = [row for row in mine if (row["method"], row["R"]) == (method, r)]
        if not found or (r == 1 and method == "rolling"):
            continue
        xs = sorted({row["sparsity"] for row in found})
        values = [[row["top1"] for row in found if row["sparsity"] == x] for x in xs]
        label = method if method == "magnitude" else f"{method}, R = {r}"
        axes.plot(
            [100 * x for x in xs], [statistics.mean(v) for v in values], "o", ls=styles.get(r, "-"),
            color=colours[method], label=label, markersize=4,
        )  # fmt: skip
        axes.fill_between([100 * x for x in xs], *zip(*((min(v), max(v)) for v in values), strict=True),
                          color=colours[method], alpha=0.12, lw=0)  # fmt: skip
    axes.set_title("ResNet-20 on CIFAR-10, pruned without training", fontsize=11)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run what is not there yet; write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--checkpoint", type=Path, required=True, help="state_dict of the dense ResNet-20")
    helped = "default: 50 to 95 %%, and for R > 1 what is worth its time (see worth_it); others are run in full"
    parser.add_argument("--sparsities", type=float, nargs="+", help=helped)
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--recomputations", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patterns", nargs="*", choices=list(PATTERNS), default=list(PATTERNS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(load_images(options.data / "train"), load_images(options.data / "val"), options.checkpoint)
    dense = accuracy(load_model(options.checkpoint), *bench.validation)
    log = options.output / "runs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    plan = []
    for r, seed, method, sparsity in itertools.product(
        options.recomputations, range(options.seeds), options.methods, options.sparsities or SPARSITIES
    ):
        if options.sparsities is None and not worth_it(method, r, sparsity, seed):
            continue
        if (method == "magnitude" and (r, seed) != (1, 0)) or (method == "rolling" and r == 1):
            continue  # no gradients, hence no seed; and one collection cannot roll
        plan.append({"method": method, "R": r, "sparsity": sparsity, "seed": seed})
    for seed, pattern in itertools.product(range(options.seeds), options.patterns):
        sparsity, rules = PATTERNS[pattern]
        plan += [{"pattern": pattern, "rule": rule, "sparsity": sparsity, "seed": seed} for rule in rules]
    plan.sort(key=lambda key: (key.get("R", 1), key["seed"]))  # the gradients of a seed are collected once
    for key in tqdm(plan, desc="runs"):
        if any(key.items() <= row.items() for row in rows):
            continue
        if "method" in key:
            measured = bench.run(key["method"], key["sparsity"], key["R"], key["seed"])
        else:
            measured = bench.run_pattern(key["pattern"], key["rule"], key["sparsity"], key["seed"])
        rows.append({**key, **measured})
        tqdm.write(json.dumps(rows[-1]))
        with log.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    text = [
        "# ResNet-20 on CIFAR-10, pruned without training",
        "",
        f"    python benchmarks/accuracy/run.py --data {options.data.name} --checkpoint {options.checkpoint.name}",
        "",
        f"top-1 in per cent on {len(bench.validation[1]):,} validation images (dense: {dense:.1f}), mean ± standard "
        f"deviation of the seeds; {M} gradients of 32 training images, R recomputations; seconds: wall time of "
        "pruning, the gradients included but for R = 1, beside other work. Without ±: one seed; empty: not run.",
        "",
        table(rows, "top1"),
        "",
        "With the statistics of BatchNorm re-estimated afterwards from 64 training batches:",
        "",
        table(rows, "top1_batchnorm"),
        "",
        "Patterns, one set of gradients (R = 1):",
        "",
        pattern_table(rows),
        "",
    ]
    (options.output / "table.md").write_text("\n".join(text))
    plot(rows, dense, options.output / "accuracy.png")
    tqdm.write("\n".join(text))


if __name__ == "__main__":
    main()
