"""The callback for Transformers' Trainer: masks hold, and a resumed run equals the one without a break."""

import pytest
import torch

import mfac

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from mfac.integrations.transformers import FILE, PrunerCallback  # noqa: E402  after the check that it is there

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = {"num_grads": 4, "damping": "3e-2*mean", "block_size": 64, "substeps": 2, "progress": False}


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(32, (32, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def make_trainer(model, callback, path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(path), per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", save_strategy="no", learning_rate=1e-2, seed=3, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), callbacks=[callback])


def zeros(model, pruner):
    params = mfac.prunable_parameters(model)
    assert all(torch.equal(params[name] != 0, mask) for name, mask in pruner.masks.items())
    return 1 - sum(int((p != 0).sum()) for p in params.values()) / sum(p.numel() for p in params.values())


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_training(tmp_path, options):
    """Batches are the training dataloader's, the loss is that of the output; the embedding stays dense."""
    model, callback = make_model(), PrunerCallback(sparsity=0.8, start=2, end=7, frequency=2, **SETTINGS)
    make_trainer(model, callback, tmp_path, **options).train()
    assert zeros(model, callback.pruner) == pytest.approx(0.8, abs=1e-3) and callback.pruner.finished
    assert [time for time, _ in callback.pruner.results] == [4, 6, 7]
    assert (model.transformer.wte.weight != 0).all()


def test_order_of_training_is_not_disturbed(tmp_path):
    """Every batch of an epoch is seen once, however often the Pruner collects in between."""
    seen = []

    class Seeing(transformers.Trainer):
        def training_step(self, model, inputs, *rest):
            seen.append(inputs["input_ids"].sum(1).tolist())
            return super().training_step(model, inputs, *rest)

    def run(callbacks):
        seen.clear()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", save_strategy="no", seed=3,
        )  # fmt: skip
        Seeing(make_model(), arguments, train_dataset=Tokens(), callbacks=callbacks).train()
        return list(seen)

    assert run([]) == run([PrunerCallback(sparsity=0.5, start=1, end=6, recomputations=2, **SETTINGS)])


def test_clipping_counts_no_pruned_weights(tmp_path):
    norms = []

    class Callback(PrunerCallback):
        def on_pre_optimizer_step(self, args, state, control, **objects):
            for name, mask in self.pruner.masks.items():
                assert (dict(objects["model"].named_parameters())[name].grad[~mask] == 0).all()
            norms.append(state.global_step)

    callback = Callback(criterion="magnitude", sparsity=0.9, end=1)
    make_trainer(make_model(), callback, tmp_path).train()
    assert len(norms) == 16 and callback._hooks == []


@pytest.mark.parametrize("stop", [5, 8])
def test_resumed(tmp_path, stop):
    """From the Trainer's own checkpoint, in the middle of an epoch and of the schedule: the same bits."""

    def run(path, resume=None, **options):
        model = make_model()
        callback = PrunerCallback(sparsity=0.8, start=3, end=14, frequency=3, recomputations=2, **SETTINGS)
        trainer = make_trainer(model, callback, path, **options)
        trainer.args.save_strategy, trainer.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, stop
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    whole, callback = run(tmp_path)
    folder = tmp_path / f"checkpoint-{stop}"
    assert (folder / FILE).is_file()
    resumed, again = run(tmp_path, str(folder))
    assert [time for time, _ in again.pruner.results] == [time for time, _ in callback.pruner.results]
    assert all(torch.equal(again.pruner.masks[name], mask) for name, mask in callback.pruner.masks.items())
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=r"resume_from: expected the state of the Pruner at .*, got none"):
        run(tmp_path, str(folder))


def test_interrupted_training_leaves_nothing_behind(tmp_path):
    """Hooks that are still there do nothing in a training without the callback."""

    class Interrupting(PrunerCallback):
        def on_step_end(self, args, state, control, **objects):
            super().on_step_end(args, state, control, **objects)
            if state.global_step == 5:
                raise KeyboardInterrupt

    model = make_model()
    callback = Interrupting(criterion="magnitude", sparsity=0.9, end=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, callback, tmp_path).train()
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert callback._hooks and (weight == 0).any()
    ids = Tokens().ids[:4]
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    assert (weight.grad[weight == 0] != 0).any()


def test_state_of_another_run_is_refused(tmp_path):
    for name, sparsity in (("a", 0.8), ("b", 0.5)):
        callback = PrunerCallback(sparsity=sparsity, end=4, frequency=2, **SETTINGS)
        trainer = make_trainer(make_model(), callback, tmp_path / name)
        trainer.args.save_strategy, trainer.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, 6
        trainer.train()
    callback = PrunerCallback(sparsity=0.5, end=4, frequency=2, **SETTINGS)
    with pytest.raises(ValueError, match="resume_from: expected the state of this model"):
        make_trainer(make_model(), callback, tmp_path / "b").train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6")
        )


@pytest.mark.filterwarnings("always")
def test_a_model_that_is_dense_at_the_end_is_announced(tmp_path):
    """As after load_best_model_at_end, which may find best what was saved before pruning."""
    model, callback = make_model(), PrunerCallback(sparsity=0.8, end=4, frequency=2, **SETTINGS)
    make_trainer(model, callback, tmp_path).train()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(1)
    with pytest.warns(UserWarning, match="weights that the Pruner has pruned are not zero"):
        callback.on_train_end(None, None, None, model=model)


def test_a_second_training_goes_on(tmp_path):
    model, callback = make_model(), PrunerCallback(sparsity=0.8, end=4, frequency=2, **SETTINGS)
    for _ in range(2):
        make_trainer(model, callback, tmp_path).train()
        assert zeros(model, callback.pruner) == pytest.approx(0.8, abs=1e-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="unit: expected one of step, epoch, got 'hour'"):
        PrunerCallback(unit="hour")


RECIPE = """
modifiers:
  - !EpochRangeModifier {end_epoch: 2}
  - !SetLearningRateModifier {learning_rate: 0.005}
  - !OBSPruningModifier
    params: ["re:transformer.h.*.weight"]
    final_sparsity: 0.8
    start_epoch: 0.25
    end_epoch: 1.5
    update_frequency: 0.5
    num_grads: 4
    damp: 1e-7
    fisher_block_size: 50
"""


def test_recipe(tmp_path):
    """The optimizer, the epochs and the batches are the trainer's; a resumed run ends with the same weights."""
    weights = []
    for resume in (False, True):
        model, callback = make_model(), PrunerCallback(recipe=RECIPE)
        trainer = make_trainer(model, callback, tmp_path, save_steps=6)
        trainer.args.save_strategy = "steps"
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resume else None)
        assert callback.pruner.sparsity == pytest.approx(0.8, abs=1e-3)
        names = callback.pruner.masks
        assert all(bool((p[~names[name]] == 0).all()) for name, p in callback.pruner.params.items())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.005  # not the trainer's scheduler's
    with pytest.raises(ValueError, match="recipe: expected a trainer of at least its 3 epochs, got 2"):
        longer = RECIPE.replace("end_epoch: 2}", "end_epoch: 3}")
        make_trainer(make_model(), PrunerCallback(recipe=longer), tmp_path).train()
    for steps in (3, 4):  # of 3 of the 8 batches of an epoch, the last one of 2
        with pytest.raises(ValueError, match=f"of at least its 3 epochs, got {steps / 3:g}"):
            options = {"gradient_accumulation_steps": 3, "max_steps": steps}
            make_trainer(make_model(), PrunerCallback(recipe=longer), tmp_path, **options).train()
    with pytest.raises(ValueError, match="of at least its 3 epochs, got 2"):
        make_trainer(make_model(), PrunerCallback(recipe=longer), tmp_path, gradient_accumulation_steps=3).train()
    with pytest.raises(TypeError, match="recipe: expected no settings beside it, got sparsity"):
        PrunerCallback(recipe=RECIPE, sparsity=0.5)
