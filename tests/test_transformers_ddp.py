"""The callback for Transformers' Trainer under torchrun, with whole models and with sharded ones.

Ranks stay the same; resumed runs equal whole ones.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from ranks import TORCHRUN, run_script  # noqa: E402  after the check that it is there
from test_transformers import SETTINGS, make_model, make_trainer, zeros  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: E402

from mfac.distributed.shards import is_sharded, whole  # noqa: E402
from mfac.integrations.transformers import FILE, PrunerCallback  # noqa: E402

STOP = 5
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}}


class Watching(PrunerCallback):
    """Asserts that all ranks have the same weights and masks, and that pruned weights do not count in the norm."""

    def on_pre_optimizer_step(self, args, state, control, **objects):
        for name, mask in self.pruner.masks.items():
            assert (whole(self.pruner.params[name].grad)[~mask] == 0).all()

    def on_step_end(self, args, state, control, **objects):
        super().on_step_end(args, state, control, **objects)
        tensors = [*objects["model"].parameters(), *self.pruner.masks.values()]
        flat = torch.cat([whole(x).reshape(-1).float() for x in tensors])
        first = flat.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, flat)


def forward(model, batch):
    """Keeps the batches of gradients."""
    SEEN.append(batch["input_ids"].tolist())
    return model(**batch).loss


SEEN = []


def let_accelerate_shard_on_cpus():
    """It shards models on accelerators only: make it take several CPUs for a kind of them."""
    kinds = {kind.name: kind for kind in accelerate.utils.DistributedType}
    accelerate.state.DistributedType = SimpleNamespace(**{**kinds, "MULTI_HPU": kinds["MULTI_CPU"]})


def run(path, resume=None, **options):
    model = make_model()
    settings = {**SETTINGS, "num_grads": 3}  # no multiple of the ranks
    callback = Watching(sparsity=0.8, start=1, end=7, frequency=2, recomputations=2, forward=forward, **settings)
    trainer = make_trainer(model, callback, path, **options)
    trainer.args.save_strategy, trainer.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, STOP
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.args.world_size == 2 and callback.pruner.finished
    assert is_sharded(next(trainer.model.parameters())) == bool(options)
    names = {p: name for name, p in model.named_parameters()}
    values = {name: whole(p) for p, name in names.items()}
    with torch.no_grad():
        plain = make_model()
        for name, p in plain.named_parameters():
            p.copy_(values[name])
    assert zeros(plain, callback.pruner) == pytest.approx(0.8, abs=1e-3)
    return values


def main(folder, kind):
    """What each process does."""
    torch.set_num_threads(1)
    if kind == "sharded":
        let_accelerate_shard_on_cpus()
    options = SHARDED if kind == "sharded" else {}
    values = run(folder, **options)
    seen = [None, None]
    distributed.all_gather_object(seen, SEEN)
    first = [tuple(row) for batches in (seen[0][:2], seen[1][:1]) for batch in batches for row in batch]
    assert len(set(first)) == 12  # a part for each process
    checkpoint = folder / f"checkpoint-{STOP}"
    assert torch.load(checkpoint / FILE, weights_only=True)["masks"]
    resumed = run(folder, str(checkpoint), **options)
    assert all(torch.equal(value, resumed[name]) for name, value in values.items())
    (folder / f"done-{distributed.get_rank()}").touch()


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_two_processes(tmp_path, kind):
    done = run_script(*TORCHRUN, __file__, tmp_path, kind)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_refusals(tmp_path):
    trainer = make_trainer(make_model(), callback := PrunerCallback(sparsity=0.8, end=4, **SETTINGS), tmp_path)

    def begin(model):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"model: expected fully_shard or .*, got FullyShardedDataParallel"):
            begin(FullyShardedDataParallel(make_model(), device_id=torch.device("cpu")))
    finally:
        distributed.destroy_process_group()
    trainer.args.deepspeed = "zero.json"
    with pytest.raises(ValueError, match=r"args: expected a model without DeepSpeed, got deepspeed='zero.json'"):
        begin(trainer.model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
