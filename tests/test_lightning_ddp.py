"""The callback for Lightning in several processes, with whole models and with sharded ones.

Ranks stay the same, and a resumed run equals the whole one.
"""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

lightning = pytest.importorskip("lightning.pytorch")

from ranks import run_script  # noqa: E402  after the check that Lightning is there
from test_lightning import SETTINGS, Module, loader  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402

from mfac.distributed.shards import is_sharded, whole  # noqa: E402
from mfac.integrations.lightning import PrunerCallback  # noqa: E402

STOP, RANKS = 4, 2


class Watching(PrunerCallback):
    """Asserts after each step that all ranks have the same weights and masks."""

    def on_train_batch_end(self, trainer, module, *arguments):
        super().on_train_batch_end(trainer, module, *arguments)
        masks = [mask.float() for mask in self.pruner.masks.values()]
        flat = torch.cat([whole(x).reshape(-1) for x in (*module.parameters(), *masks)])
        assert bool((trainer.strategy.all_gather(flat) == flat).all())


class Seeing(Module):
    """Keeps the samples of which gradients are taken."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, index):
        if not self.training:  # for a gradient
            self.seen += batch[0][:, 0].tolist()
        return super().training_step(batch, index)


class Sharded(Seeing):
    """Without BatchNorm, whose statistics are each rank's own, while a checkpoint holds those of one."""

    def __init__(self):
        super().__init__()
        self.net[1] = torch.nn.LayerNorm(16)

    def configure_model(self):
        for layer in (self.net[0], self.net[3], self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def on_before_zero_grad(self, optimizer):
        pass


def strategy_of(kind):
    if kind == "whole":
        return "ddp"
    return lightning.strategies.ModelParallelStrategy(RANKS, 1, process_group_backend="gloo")


def run(kind, path, checkpoint=None, **options):
    lightning.seed_everything(0, verbose=False)
    module = Sharded() if kind == "sharded" else Seeing()
    settings = {**SETTINGS, "num_grads": 3}  # no multiple of the ranks
    callback = Watching(sparsity=0.8, start=2, end=7, frequency=2, recomputations=2, **settings)
    saving = lightning.callbacks.ModelCheckpoint(path, every_n_train_steps=STOP, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", strategy=strategy_of(kind), devices=RANKS, logger=False, enable_progress_bar=False,
        max_epochs=2, enable_model_summary=False, default_root_dir=path, callbacks=[callback, saving], **options,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=checkpoint, **({"weights_only": False} if checkpoint else {}))
    return module, callback, trainer


def main(folder, kind):
    """What each process does."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    module, callback, trainer = run(kind, folder / "first")
    assert trainer.world_size == RANKS and [time for time, _ in callback.pruner.results] == [4, 6, 7]
    values = [whole(p) for p in module.parameters()]
    assert is_sharded(next(module.parameters())) == (kind == "sharded")
    pruned = round(0.8 * 256)
    assert sum(int((value == 0).sum()) for value in values if value.dim() == 2) == pruned
    seen = [None] * RANKS
    torch.distributed.all_gather_object(seen, module.seen)
    assert len(set(seen[0][:8]) | set(seen[1][:4])) == 12  # of the first round and a half, a part for each
    checkpoint = next((folder / "first").glob(f"*step={STOP}.ckpt"))
    state = torch.load(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint, weights_only=False)["callbacks"]
    (masks,) = (value["masks"] for value in state.values() if "masks" in value)
    assert 0 < sum(int((~mask).sum()) for mask in masks.values()) < pruned
    resumed, again, _ = run(kind, folder / "again", str(checkpoint))
    assert [time for time, _ in again.pruner.results] == [4, 6, 7]
    assert all(torch.equal(value, whole(p)) for value, p in zip(values, resumed.parameters(), strict=True))
    (folder / f"done-{trainer.global_rank}").touch()


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_two_processes(tmp_path, kind):
    done = run_script(sys.executable, __file__, tmp_path, kind)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_refusals(tmp_path):
    """Strategies that need GPUs: what the callback sees of them is put in their place."""

    def start(strategy, model, world_size=1):
        trainer = SimpleNamespace(strategy=strategy, model=model, world_size=world_size)
        PrunerCallback(sparsity=0.8, end=4, **SETTINGS).on_train_start(trainer, model)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"model: expected fully_shard or .*, got FullyShardedDataParallel"):
            start(None, FullyShardedDataParallel(Module(), device_id=torch.device("cpu")))
    finally:
        torch.distributed.destroy_process_group()
    strategy = object.__new__(lightning.strategies.ModelParallelStrategy)
    with pytest.raises(
        ValueError, match=r"module: expected a configure_model that calls fully_shard .* got no sharded"
    ):
        start(strategy, Module(), 2)
    for name in ("FSDPStrategy", "DeepSpeedStrategy"):
        strategy = object.__new__(getattr(lightning.strategies, name))
        with pytest.raises(
            ValueError, match=f"trainer: expected strategy='ddp' or ModelParallelStrategy .* got {name}"
        ):
            start(strategy, Module(), 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
