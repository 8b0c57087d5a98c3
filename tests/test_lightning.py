"""The callback for Lightning, in its own Trainer: masks hold, and a resumed run equals the one without a break."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mfac

lightning = pytest.importorskip("lightning.pytorch")

from mfac.integrations.lightning import PrunerCallback  # noqa: E402  after the check that Lightning is there

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|GPU available|tensorboard|LeafSpec|litlogger)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
CE = nn.functional.cross_entropy
SETTINGS = {"num_grads": 6, "damping": "3e-2*mean", "block_size": 64, "substeps": 2, "progress": False}


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.norms = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = CE(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_before_zero_grad(self, optimizer):
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def zeros(self):
        return int((self.net[0].weight == 0).sum() + (self.net[3].weight == 0).sum())


def loader(shuffle=True):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 12, generator=generator), torch.randint(4, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)


def trainer(callbacks, path, **options):
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=path, callbacks=callbacks, **{"max_epochs": 3, "enable_checkpointing": False, **options},
    )  # fmt: skip


def plain_loop(epochs=3):
    """The same training without Lightning."""
    module = Module()
    optimizer = module.configure_optimizers()
    pruner = mfac.Pruner(module, loader(False), CE, sparsity=0.8, start=4, end=20, frequency=4, **SETTINGS)
    module.train()
    for _ in range(epochs):
        for x, y in loader(False):
            optimizer.zero_grad()
            CE(module(x), y).backward()
            pruner.mask_gradients()
            optimizer.step()
            pruner.step()
    return module, pruner


def test_equals_the_plain_loop(tmp_path):
    """With the training dataloader and training_step, or with batches and a loss, as written by hand."""
    expected, pruner = plain_loop()
    for arguments in ((), (loader(False), CE)):
        module, callback = Module(), PrunerCallback(*arguments, sparsity=0.8, start=4, end=20, frequency=4, **SETTINGS)
        trainer([callback], tmp_path).fit(module, loader(False))
        assert module.zeros() == round(0.8 * 256) == expected.zeros()
        assert [time for time, _ in callback.pruner.results] == [time for time, _ in pruner.results]
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_accumulation_and_mixed_precision(tmp_path, options):
    """Time is the trainer's optimizer steps; the masks hold at the end."""
    module, callback = Module(), PrunerCallback(sparsity=0.8, start=2, end=10, frequency=2, **SETTINGS)
    trainer([callback], tmp_path, **options).fit(module, loader())
    assert module.zeros() == round(0.8 * 256) and callback.pruner.finished
    assert [time for time, _ in callback.pruner.results] == [4, 6, 8, 10]


def test_time_in_epochs(tmp_path):
    module = Module()
    callback = PrunerCallback(unit="epoch", sparsity=0.8, start=0.5, end=2, frequency=0.5, **SETTINGS)
    trainer([callback], tmp_path).fit(module, loader())
    assert [time for time, _ in callback.pruner.results] == [1.0, 1.5, 2.0]


def test_clipping_counts_no_pruned_weights(tmp_path):
    module, callback = Module(), PrunerCallback(criterion="magnitude", sparsity=1.0, end=1, scope="layer")
    trainer([callback], tmp_path, gradient_clip_val=1e-3, max_epochs=1).fit(module, loader())
    assert module.zeros() == 256 and max(module.norms) <= 1e-3 * (1 + 1e-3)


class Stateful(DataLoader):
    """A loader whose place in the epoch Lightning saves and restores; others begin the epoch anew."""

    taken = 0

    def __iter__(self):
        batches = list(super().__iter__())[self.taken :]
        for batch in batches:
            self.taken += 1
            yield batch
        self.taken = 0

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


@pytest.mark.parametrize("stop", [5, 8, 13])
def test_resumed(tmp_path, stop):
    """From Lightning's own checkpoint, in the middle of an epoch and of the schedule: the same bits."""

    def run(path, checkpoint=None, **options):
        lightning.seed_everything(0, verbose=False)
        module = Module()
        source = (loader(), CE)
        callback = PrunerCallback(*source, sparsity=0.8, start=3, end=20, frequency=3, recomputations=2, **SETTINGS)
        callbacks = [callback]
        if options:
            callbacks.append(lightning.callbacks.ModelCheckpoint(path, every_n_train_steps=stop, save_top_k=-1))
        fit = trainer(callbacks, path, enable_checkpointing=bool(options), **options)
        fit.fit(
            module,
            Stateful(loader().dataset, batch_size=4),
            ckpt_path=checkpoint,
            **({"weights_only": False} if checkpoint else {}),
        )
        return module, callback, fit

    whole, callback, _ = run(tmp_path / "whole")
    _, first, _ = run(tmp_path / "first", max_steps=stop)
    checkpoints = list((tmp_path / "first").glob("*.ckpt"))
    assert len(checkpoints) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of a checkpoint in mid-epoch
        resumed, again, _ = run(tmp_path / "second", str(checkpoints[0]))
    assert 0 <= first.pruner.sparsity < again.pruner.sparsity == callback.pruner.sparsity
    assert [time for time, _ in again.pruner.results] == [time for time, _ in callback.pruner.results]
    for name, mask in callback.pruner.masks.items():
        assert torch.equal(again.pruner.masks[name], mask)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


class Augmenting(Module):
    """Without batch_idx, with a batch hook."""

    def __init__(self):
        super().__init__()
        self.scales = set()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 0 + 7.0, batch[1]

    def training_step(self, batch):
        self.scales.add(float(batch[0].max()))
        return super().training_step(batch, 0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_batches_are_those_of_training(tmp_path, precision):
    """The module's batch hooks and the trainer's precision hold for the gradients too."""
    module, callback = Augmenting(), PrunerCallback(sparsity=0.8, end=4, frequency=2, **SETTINGS)
    trainer([callback], tmp_path, max_epochs=1, precision=precision).fit(module, loader())
    assert module.scales == {7.0} and module.zeros() == round(0.8 * 256)


def test_a_second_fit_goes_on(tmp_path):
    """With the same callback: the zeros stay, though the schedule begins again."""
    module, callback = Module(), PrunerCallback(sparsity=0.8, end=6, frequency=3, **SETTINGS)
    trainer([callback], tmp_path, max_epochs=1).fit(module, loader())
    assert module.zeros() == 205
    trainer([callback], tmp_path, max_epochs=1).fit(module, loader())
    assert module.zeros() == 205


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


def test_what_cannot_be_done_is_refused(tmp_path):
    callback = PrunerCallback(sparsity=0.8, end=6, **SETTINGS)
    with pytest.raises(ValueError, match="loss_fn: expected a function with manual optimization"):
        trainer([callback], tmp_path).fit(Manual(), loader())
    with pytest.raises(ValueError, match="batches: expected one DataLoader for training, got dict"):
        trainer([callback], tmp_path).fit(Module(), {"a": loader(), "b": loader()})
    monitor = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="loss")
    with pytest.warns(UserWarning, match="may choose a checkpoint from before the final sparsity"):
        trainer([callback, monitor], tmp_path, max_epochs=1, enable_checkpointing=True).fit(Module(), loader())


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="unit: expected one of step, epoch, got 'hour'"):
        PrunerCallback(unit="hour")
    with pytest.raises(TypeError, match="unexpected keyword argument 'sparsty'; did you mean 'sparsity'"):
        trainer([PrunerCallback(sparsty=0.5, end=3)], tmp_path).fit(Module(), loader())


RECIPE = """
modifiers:
  - !EpochRangeModifier {end_epoch: 2}
  - !LearningRateFunctionModifier {lr_func: linear, init_lr: 0.1, final_lr: 0, end_epoch: 2}
  - !MFACPruningModifier
    params: [net.0.weight, net.3.weight]
    final_sparsity: 0.75
    start_epoch: 0.5
    end_epoch: 1.5
    update_frequency: 0.5
    num_grads: 4
"""


def test_recipe(tmp_path):
    """The optimizer, the epochs, the batches and the loss are the trainer's."""
    module, callback = Module(), PrunerCallback(recipe=RECIPE)
    used = trainer([callback], tmp_path, max_epochs=2)
    used.fit(module, loader())
    assert callback.pruner.sparsity == 0.75 and module.zeros() == round(0.75 * 192) + round(0.75 * 64)
    assert used.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="recipe: expected a trainer of at least its 2 epochs, got 1"):
        trainer([PrunerCallback(recipe=RECIPE)], tmp_path, max_epochs=1).fit(Module(), loader())


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_recipe_sets_the_learning_rate_against_a_scheduler(tmp_path, interval):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    rates, recipe = [], "modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n"
    recipe += "  - !SetLearningRateModifier {start_epoch: 1, learning_rate: 0.01}\n"
    trainer([PrunerCallback(recipe=recipe)], tmp_path).fit(Scheduled(), loader())
    assert rates == [0.1] * 8 + [0.01] * 16


def test_a_recipe_is_resumed(tmp_path):
    weights = []
    for path in (None, "half.ckpt"):
        module = Module()
        used = trainer([PrunerCallback(recipe=RECIPE)], tmp_path, max_epochs=2)
        if path is None:
            half = trainer([PrunerCallback(recipe=RECIPE)], tmp_path, max_epochs=2, max_steps=8)
            with pytest.warns(UserWarning, match="trainer: expected max_steps of at least 12, where"):
                half.fit(Module(), loader(False))
            half.save_checkpoint(tmp_path / "half.ckpt")
        used.fit(module, loader(False), ckpt_path=path and str(tmp_path / path))
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
