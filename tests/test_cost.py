"""The formulas of mfac.cost against what processes really send and keep."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

import mfac
from mfac.distributed.replicas import Replicas


def sent(size, block_size, substeps, dtype):
    """Bytes that each rank sends, and those that it keeps."""
    model = nn.Linear(64, 32 * size, bias=False)
    nn.init.ones_(model.weight)
    batches = [(torch.randn(8, 64), torch.randn(8, 32 * size)) for _ in range(16)]
    replicas = []
    original = Replicas.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        replicas.append(self)

    Replicas.__init__ = init
    options = {"process_group": dist.group.WORLD, "progress": False}
    grads = mfac.collect_gradients(model, batches, nn.functional.mse_loss, 12, dtype=dtype, **options)
    collecting = sum(x.sent for x in replicas)
    mfac.prune_step(model, grads, 0.5, block_size=block_size, substeps=substeps, **options)
    return collecting, sum(x.sent for x in replicas) - collecting, grads.nbytes


@pytest.mark.parametrize(
    ("size", "block_size", "substeps", "dtype"),
    [(2, 256, 1, torch.float32), (4, 512, 3, torch.bfloat16), (3, None, 2, torch.float32)],
)
def test_bytes(size, block_size, substeps, dtype):
    d = 64 * 32 * size
    expected = mfac.cost(
        d, 12, size, block_size=block_size, substeps=substeps, gradient_itemsize=torch.finfo(dtype).bits // 8
    )
    for collecting, stepping, kept in run_ranks(sent, size, size, block_size, substeps, dtype):
        assert kept == expected.gradient_bytes
        assert 0 <= collecting - expected.sent_collecting <= 100 * size  # which parameters were reached
        assert 0 <= stepping - expected.sent_stepping <= 1000 * size * substeps  # reports, fingerprints


def test_one_process():
    alone = mfac.cost(1000, 10)
    assert (alone.sent_collecting, alone.sent_stepping) == (0, 0)
    assert alone.gradient_bytes == 40_000


def test_refusals():
    with pytest.raises(ValueError, match="world_size: expected"):
        mfac.cost(1000, 10, 0)
    with pytest.raises(TypeError, match="d: expected an int"):
        mfac.cost(1e6)


def table():
    """The table of docs/guides/distributed.md."""
    for name, d in (("ResNet-50, 25.5 M", 25.5e6), ("ViT-L, 304 M", 304e6), ("7 B", 7e9), ("70 B", 70e9)):
        for size in (1, 8, 64, 512):
            found = mfac.cost(int(d), 256, size, gradient_itemsize=2)
            sent = found.sent_collecting + found.sent_stepping
            yield f"| {name} | {size} | {found.bytes / 1e9:,.1f} | {sent / 1e9:,.1f} | {sum(found.seconds):,.1f} |"


def test_table_of_the_guide():
    page = (Path(__file__).parents[1] / "docs" / "guides" / "distributed.md").read_text()
    assert "\n".join(table()) in page
