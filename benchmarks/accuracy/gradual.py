"""ResNet-20 on CIFAR-10, pruned while it is trained for ten epochs: magnitude, M-FAC as published, M-FAC as here.

    python benchmarks/accuracy/gradual.py --data cifar10 --checkpoint resnet20.pt --device cuda --jobs 9

All start from one dense checkpoint, on the same images in the same order, and train under autocast to bfloat16. They
prune from 50 % on along a cubic curve in the first seven epochs, with one threshold for all layers; three epochs of
training are left. Learning rate and then frequency of updates are those that are best for magnitude by runs to 95 % in
which 5,000 training images are held out. Test images serve for the table alone. Rows are appended to
results/gradual.jsonl as they are measured, and what stands there is not run again.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet20 import accuracy, endless_batches, load_images, load_model, options_parser, record, run_all, spread
from torch import Tensor

from mfac.recipe.manager import Manager

EPOCHS, PRUNING_EPOCHS, BATCH, GRADIENT_BATCH = 10, 7.0, 128, 32
SPARSITIES = (0.9, 0.95, 0.98)
RATES, FREQUENCIES = (0.03, 0.1), (1.0, 0.5)  # to choose from; of updates, in epochs
METHODS = {  # label, modifier, its arguments
    "magnitude": ("magnitude", "MagnitudePruningModifier", ""),
    "published": (
        "M-FAC as published",
        "MFACPruningModifier",
        "num_grads: {0.0: 64, 0.5: 128, 0.75: 256, 0.85: 512}, damping: 1e-5, block_size: 2000, update: independent, "
        "substeps: 1, recomputations: 1, corrections: 0",
    ),
    "mfac": ("M-FAC, this package's defaults", "MFACPruningModifier", ""),
    "joint": ("M-FAC, `update: joint`", "MFACPruningModifier", "update: joint"),
}
RECIPE = """
modifiers:
  - !EpochRangeModifier {{start_epoch: 0.0, end_epoch: {epochs}}}
  - !{modifier}
    {{params: __ALL_PRUNABLE__, init_sparsity: 0.5, final_sparsity: {sparsity}, start_epoch: 0.0, end_epoch: {end},
     update_frequency: {frequency}, inter_func: cubic, mask_type: unstructured, global_sparsity: true, {arguments}}}
"""


@dataclass
class Bench:
    """Images on the device, and the checkpoint."""

    images: Tensor  # [n, 3, 32, 32] uint8, padded by 4
    targets: Tensor
    train: tuple
    validation: tuple
    checkpoint: Path
    device: str

    @classmethod
    def load(cls, data: Path, checkpoint: Path, device: str, hold_out: bool) -> Bench:
        """Read the images; held-out training images take the place of the test images."""
        torch.set_num_threads(1)
        train, validation = load_images(data, True), load_images(data, False)
        if hold_out:
            order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
            images, targets = train[0][order], train[1][order]
            train, validation = (images[:-5000], targets[:-5000]), (images[-5000:], targets[-5000:])
        padded = F.pad(train[0], (4, 4, 4, 4)).to(device)
        return cls(padded, train[1].to(device), train, validation, checkpoint, device)

    def epoch(self, generator: torch.Generator):
        """Yield the batches of an epoch, shifted by up to 4 pixels, half of them mirrored."""
        order = torch.randperm(len(self.images), generator=generator).to(self.device)
        rows = torch.arange(32, device=self.device)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            y, x, mirrored = torch.randint(0, 1 << 20, (3, BATCH), generator=generator).to(self.device)
            columns = x[:, None] % 9 + torch.where(mirrored[:, None] % 2 == 0, rows, 31 - rows)
            chosen = self.images[
                batch[:, None, None], :, (y[:, None] % 9 + rows)[:, :, None], columns[:, None, :]
            ]  # [n, 32, 32, 3]
            yield chosen.permute(0, 3, 1, 2).float().div(127.5).sub(1), self.targets[batch]

    def __call__(self, key: dict) -> dict:
        """Train under a recipe; return accuracy after the last epoch and right after the last update."""
        _, modifier, arguments = METHODS[key["method"]]
        rate, frequency = key["rate"], key["frequency"]
        model, kind = load_model(self.checkpoint, self.device), torch.device(self.device).type
        if kind == "cuda":  # the kernels of so small a network are shorter than the time to launch them
            with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
                record(model, True, BATCH)
            record(model, False, GRADIENT_BATCH)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
        text = RECIPE.format(
            epochs=EPOCHS, end=PRUNING_EPOCHS, modifier=modifier, sparsity=key["sparsity"], frequency=frequency,
            arguments=arguments,
        )  # fmt: skip
        manager = Manager.from_recipe(text)
        gradients = endless_batches(*self.train, 1000 + key["seed"], GRADIENT_BATCH, augment=True)
        session = manager.apply(model, optimizer, gradients, F.cross_entropy)
        generator = torch.Generator().manual_seed(key["seed"])
        steps, done, pruning, after = len(self.images) // BATCH, 0, 0.0, math.nan
        began = time.perf_counter()
        for _ in range(EPOCHS):
            model.train()
            for images, targets in self.epoch(generator):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 + math.cos(math.pi * done / (EPOCHS * steps))) / 2
                with torch.autocast(kind, torch.bfloat16):
                    outputs = model(images)
                loss = F.cross_entropy(outputs.float(), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                start = time.perf_counter()
                if session.step(done / steps):
                    pruning += time.perf_counter() - start
                    if done / steps >= PRUNING_EPOCHS - frequency / 2:
                        after = accuracy(model, *self.validation)
                        model.train()
        return {
            **key,
            "top1": accuracy(model, *self.validation),
            "after": after,
            "sparsity_reached": session.sparsity,
            "seconds": time.perf_counter() - began,
            "pruning_seconds": pruning,
            "device": kind,
        }


def choose(log: Path, arguments: tuple, jobs: int) -> dict[str, float]:
    """Return magnitude's best learning rate, and its best frequency then, by held-out training images."""
    chosen = {"frequency": FREQUENCIES[0]}
    for name, values in (("rate", RATES), ("frequency", FREQUENCIES)):
        plan = [
            {"method": "magnitude", "sparsity": 0.95, "seed": 0, **chosen, name: value, "held_out": True}
            for value in values
        ]
        rows = run_all(plan, log, Bench.load, (*arguments, True), jobs)
        found = [row for row in rows if any(key.items() <= row.items() for key in plan)]
        best = max(found, key=lambda row: row["top1"])
        chosen = {"rate": best["rate"], "frequency": best["frequency"]}
    return chosen


def main() -> None:
    """Run what is not there yet; write the table."""
    parser = options_parser(__doc__, SPARSITIES, METHODS)
    options = parser.parse_args()
    log, common = options.output / "gradual.jsonl", (options.data, options.checkpoint, options.device)
    chosen = choose(log, common, options.jobs)
    plan = [
        {"method": method, "sparsity": sparsity, "seed": seed, **chosen, "held_out": False}
        for seed, sparsity, method in itertools.product(range(options.seeds), options.sparsities, options.methods)
    ]
    rows = [row for row in run_all(plan, log, Bench.load, (*common, False), options.jobs) if not row["held_out"]]
    devices = sorted({row["device"] for row in rows})
    heads = [f"{s:.0%}" for s in options.sparsities] + [f"seconds, {device}" for device in devices]
    lines = [
        "# ResNet-20 on CIFAR-10, pruned during ten epochs of training",
        "",
        "top-1 in per cent on the 10,000 test images (dense: 91.43), mean ± standard deviation of the seeds; in "
        "brackets right after the last update, three epochs before the end; seconds: of training, of which pruning, "
        "beside other runs.",
        "",
        f"Learning rate {chosen['rate']}, an update every {chosen['frequency']} epochs.",
        "",
        "| method | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for method, (label, *_) in METHODS.items():
        found = [row for row in rows if row["method"] == method]
        cells = []
        for sparsity in options.sparsities:
            some = [row for row in found if row["sparsity"] == sparsity]
            texts = [spread([row[name] for row in some]) for name in ("top1", "after")] if some else []
            cells.append(f"{texts[0]} ({texts[1]})" if texts else "")
        if found:
            for device in devices:
                some = [row for row in found if row["device"] == device]
                means = [statistics.mean(row[name] for row in some) for name in ("seconds", "pruning_seconds") if some]
                cells.append("{:.0f}, {:.0f}".format(*means) if some else "")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    (options.output / "gradual.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
