"""The callback for Transformers' Trainer under torchrun: replicas stay the same; resumed runs equal whole ones."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ranks import TORCHRUN, run_script  # noqa: E402  after the check that it is there
from test_transformers import SETTINGS, make_model, make_trainer, zeros  # noqa: E402

from mfac.integrations.transformers import FILE, PrunerCallback  # noqa: E402

STOP = 5


class Watching(PrunerCallback):
    """Asserts that all ranks have the same weights and masks, and that pruned weights do not count in the norm."""

    def on_pre_optimizer_step(self, args, state, control, **objects):
        for name, mask in self.pruner.masks.items():
            assert (self.pruner.params[name].grad[~mask] == 0).all()

    def on_step_end(self, args, state, control, **objects):
        super().on_step_end(args, state, control, **objects)
        tensors = [*objects["model"].parameters(), *self.pruner.masks.values()]
        flat = torch.cat([x.detach().reshape(-1).float() for x in tensors])
        first = flat.clone()
        distributed.broadcast(first, 0)
        assert torch.equal(first, flat)


def forward(model, batch):
    """Keeps the batches of gradients."""
    SEEN.append(batch["input_ids"].tolist())
    return model(**batch).loss


SEEN = []


def run(path, resume=None):
    model = make_model()
    settings = {**SETTINGS, "num_grads": 3}  # no multiple of the ranks
    callback = Watching(sparsity=0.8, start=1, end=7, frequency=2, recomputations=2, forward=forward, **settings)
    trainer = make_trainer(model, callback, path)
    trainer.args.save_strategy, trainer.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, STOP
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.args.world_size == 2 and callback.pruner.finished
    assert zeros(model, callback.pruner) == pytest.approx(0.8, abs=1e-3)
    return model


def main(folder):
    """What each process does."""
    torch.set_num_threads(1)
    whole = run(folder)
    seen = [None, None]
    distributed.all_gather_object(seen, SEEN)
    first = [tuple(row) for batches in (seen[0][:2], seen[1][:1]) for batch in batches for row in batch]
    assert len(set(first)) == 12  # a part for each process
    checkpoint = folder / f"checkpoint-{STOP}"
    assert torch.load(checkpoint / FILE, weights_only=True)["masks"]
    resumed = run(folder, str(checkpoint))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    (folder / f"done-{distributed.get_rank()}").touch()


def test_two_processes(tmp_path):
    done = run_script(*TORCHRUN, __file__, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


def test_sharded_models_are_refused(tmp_path):
    trainer = make_trainer(make_model(), callback := PrunerCallback(sparsity=0.8, end=4, **SETTINGS), tmp_path)
    trainer.args.fsdp = "full_shard"
    with pytest.raises(ValueError, match="args: expected a model that each process holds whole, got fsdp='full_shard'"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
