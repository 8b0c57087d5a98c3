"""What the tests of the program share: recipes, options, images, and how a run is interrupted."""

import itertools

import numpy as np
import torch
from PIL import Image

from mfac.tutorial.data import Batches

RECIPE = """
modifiers:
  - !EpochRangeModifier {end_epoch: 4}
  - !LearningRateFunctionModifier {lr_func: cosine, init_lr: 1e-3, final_lr: 0, end_epoch: 4}
  - !MFACPruningModifier
    params: ["re:sections.4.*point.conv.weight"]
    init_sparsity: 0.25
    final_sparsity: 0.9
    start_epoch: 0.5
    end_epoch: 2.5
    update_frequency: 0.5
    num_grads: 3
    recomputations: 2
    corrections: 1
    correction_batches: 2
"""
OPTIONS = "--width 0.25 --pretrained False --train-batch-size 8 --test-batch-size 360 --max-train-steps 4 --device cpu"


SHORT = """
modifiers:
  - !EpochRangeModifier {end_epoch: 2}
  - !GMPruningModifier
    params: ["re:sections.4.*point.conv.weight"]
    init_sparsity: 0.5
    final_sparsity: 0.9
    start_epoch: 0
    end_epoch: 2
    update_frequency: 1
"""


def write_images(root, classes):
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.jpg")


def interrupt_in(monkeypatch, epoch):
    """Let Ctrl-C come in the second step of an epoch."""
    batches, counter = Batches.__iter__, itertools.count()

    def iterate(self):
        wanted = self.loader.drop_last and next(counter) == epoch
        for index, batch in enumerate(batches(self)):
            if wanted and index == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Batches, "__iter__", iterate)


def weights(path):
    return torch.load(path, weights_only=True)["model"]
