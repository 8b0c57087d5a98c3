"""mfac.prune: recomputations, rolling gradients, measurements, errors that leave the model as it was."""

import contextlib
import csv
import json
import warnings

import pytest
import torch
from perceptron import make_batches, make_model
from torch import nn

import mfac
from mfac.pruning.schedule import interpolate_sparsity

LOSS = nn.functional.cross_entropy
PLAIN = {"corrections": 0, "final_corrections": 0}  # tests/test_correction.py is about these
FAST = {"num_grads": 8, "recomputations": 3, "progress": False, "damping": 1e-3, "block_size": 50, **PLAIN}


def test_it_is_the_steps_made_by_hand():
    """First m gradients, then the oldest `refresh` rows renewed at each step; equal ratios of the density."""
    model, other, batches = make_model(), make_model(), make_batches(8 + 2 * 3)
    result = mfac.prune(model, batches, LOSS, 0.8, refresh=3, **FAST)

    source, masks, buffer = iter(batches), None, None
    for r in (1, 2, 3):
        buffer = mfac.collect_gradients(other, source, LOSS, 8 if r == 1 else 3, buffer=buffer)
        step = mfac.prune_step(
            other, buffer, interpolate_sparsity(0, 0.8, r / 3), masks=masks, damping=1e-3, block_size=50
        )
        masks = step.masks
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(result.masks[name], masks[name]) for name in masks)
    assert [s.new_gradients for s in result.steps] == [8, 3, 3]
    assert result.steps[-1].predicted_loss_increase == pytest.approx(16 * step.predicted_loss_increase)


def test_measured_losses(unchanged):
    """Losses are the means of the batches drawn before and after each step, in eval mode."""
    batches = make_batches(1, 64)  # the same batch each time
    model = make_model()
    before = LOSS(model.eval()(batches[0][0]), batches[0][1]).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one batch for 8 gradients
        result = mfac.prune(model, batches, LOSS, 0.7, **FAST)
    after = LOSS(model.eval()(batches[0][0]), batches[0][1]).item()
    assert result.steps[0].loss_before == pytest.approx(before)
    assert result.steps[-1].loss_after == pytest.approx(after)
    for one, next_ in zip(result.steps, result.steps[1:], strict=False):
        assert one.loss_after == pytest.approx(next_.loss_before)


def test_only_weights_change(unchanged):
    model = make_model()
    with unchanged(model, weights=False):
        result = mfac.prune(model, make_batches(12), LOSS, 0.8, **FAST)
    assert result.sparsity == pytest.approx(144 / 180)
    assert sum(int((p == 0).sum()) for p in mfac.prunable_parameters(model).values()) == 144


def test_all_fresh_and_a_quarter():
    result = mfac.prune(make_model(), make_batches(12), LOSS, 0.5, refresh=8, **FAST)
    assert [s.new_gradients for s in result.steps] == [8, 8, 8]
    result = mfac.prune(make_model(), make_batches(12), LOSS, 0.5, **FAST)
    assert [s.new_gradients for s in result.steps] == [8, 2, 2]
    result = mfac.prune(make_model(), make_batches(60), LOSS, 0.5, **{**FAST, "corrections": 1})
    assert [s.new_gradients for s in result.steps] == [8, 1, 1]


def test_a_shuffling_loader_gives_new_batches_each_time():
    x = torch.randn(64, 10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :5].argmax(1)), 8, shuffle=True)
    torch.manual_seed(0)
    first = [s.loss_before for s in mfac.prune(make_model(), loader, LOSS, 0.0, refresh=8, **FAST).steps]
    torch.manual_seed(0)
    again = [s.loss_before for s in mfac.prune(make_model(), loader, LOSS, 0.0, refresh=8, **FAST).steps]
    assert first == again  # a seed says all
    loader = torch.utils.data.DataLoader(loader.dataset, 4, shuffle=True)
    halves = [s.loss_before for s in mfac.prune(make_model(), loader, LOSS, 0.0, refresh=8, **FAST).steps]
    assert len(set(halves)) == 3  # 8 of 16 batches each


def test_dicts_patterns_and_names():
    result = mfac.prune(make_model(), make_batches(12), LOSS, {"0.weight": 0.5}, params=["0.weight"], **FAST)
    assert [(name, kept) for name, _, kept in result.layers] == [("0.weight", 60)]
    result = mfac.prune(make_model(), make_batches(12), LOSS, 0.5, pattern="2:4", **FAST)
    assert [kept for _, _, kept in result.layers] == [120 - 12 * 4, 30]  # 8 of 10 input channels make groups
    assert mfac.prune(make_model(), make_batches(12), LOSS, 0.5, criterion="magnitude", **FAST).sparsity == 0.5


def test_batchnorm_is_reestimated_if_asked_for():
    models = [make_model(), make_model()]
    for model, count in zip(models, (0, 4), strict=True):
        model[1].running_mean.fill_(-50)  # far off
        mfac.prune(model, make_batches(12), LOSS, 0.8, batchnorm_batches=count, **FAST)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert torch.equal(models[0][1].running_mean, torch.full((12,), -50.0))
    assert models[1][1].running_mean.abs().max() < 2


def test_batchnorm_statistics_that_are_worse_are_not_kept():
    """The model has been trained with other statistics than those of its inputs, and needs them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(5, 10))
        model[1].running_mean.fill_(-1), model[1].weight.fill_(4), model[1].bias.copy_(torch.arange(5.0) - 6)
    batches = [(x, model.eval()(x).argmax(1)) for x, _ in make_batches(12)]
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.warns(UserWarning, match="batchnorm_batches: new statistics raise the loss .*; the old ones stay"):
        result = mfac.prune(model, batches, LOSS, 0.5, batchnorm_batches=8, **FAST)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert result.steps[-1].loss_after > 0


@pytest.mark.parametrize("error", [ValueError("of the loss"), RuntimeError("of the loss"), KeyboardInterrupt()])
def test_batchnorm_statistics_that_are_not_judged_are_not_kept(error):
    calls, model = [], make_model()
    model.register_buffer("expanded", torch.ones(1).expand(5))  # cannot be written

    def loss_fn(out, y):
        calls.append(1)
        if len(calls) == 8 + 2 + 2 + 2 + 1:  # the gradients, the loss before, and the first batch after
            raise error
        return LOSS(out, y)

    with contextlib.suppress(RuntimeError, KeyboardInterrupt):
        mfac.prune(model, make_batches(12), loss_fn, 0.5, batchnorm_batches=3, **FAST)
    assert len(calls) == 15 and torch.equal(model[1].running_mean, torch.zeros(12))


def test_result_as_text_json_and_csv(tmp_path):
    result = mfac.prune(make_model(), make_batches(12), LOSS, 0.8, **{**FAST, "damping": "auto"})
    lines = str(result).splitlines()
    assert lines[4].split()[:4] == ["step", "sparsity", "new", "gradients"]
    assert [line.split()[0] for line in lines[5:8]] == ["1", "2", "3"]
    assert "chosen among 5" in lines[8] and "gradients" in lines[9] and "settings" in lines[9]
    result.to_json(tmp_path / "result.json")
    read = json.loads((tmp_path / "result.json").read_text())
    assert read == json.loads(json.dumps(result.to_dict()))
    assert "masks" not in read and len(read["steps"]) == 3 and len(read["candidates"]) == 5
    assert read["layers"][0] == {"name": "0.weight", "weights": 120, "kept": result.layers[0][2]}
    result.to_csv(tmp_path / "steps.csv")
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert [float(row["sparsity"]) for row in rows] == [step.sparsity for step in result.steps]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sparsity": 1.2}, ValueError, r"sparsity: expected in \[0, 1\], got 1.2"),
        ({"recomputations": 0}, ValueError, "recomputations: expected an int 1 to 10000 or 'auto', got 0"),
        ({"recomputations": 2.5}, TypeError, "recomputations: expected an int or .auto., got 2.5"),
        ({"num_grads": 0}, ValueError, "num_grads: expected an int >= 1, got 0"),
        ({"refresh": 9}, ValueError, "refresh: expected an int 1 to 8, got 9"),
        ({"refresh": 0}, ValueError, "refresh: expected an int >= 1, got 0"),
        ({"refresh": 2.0}, TypeError, "refresh: expected an int, got 2.0"),
        ({"num_grads": 3, "damping": "auto"}, ValueError, "num_grads: expected at least 4 for 'auto', got 3"),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got int"),
        ({"batches": []}, ValueError, "batches: expected more batches, got none"),
        ({"loss_fn": None}, TypeError, "loss_fn: expected a function, got None"),
        ({"pattern": "5:4"}, ValueError, "pattern: expected N:M"),
        ({"pattern": [30, 1]}, ValueError, r"pattern: expected one that fits a parameter, .* got \[30, 1\]"),
        (
            {"pattern": "2:4", "sparsity": 0.9},
            ValueError,
            r"sparsity: expected at most 0.5 for .* all that 2:4 allows, got 0.9",
        ),
        (
            {
                "pattern": "4:7",
                "params": ["3.weight", "0.weight"],
                "sparsity": {"3.weight": 0.4, "0.weight": 0.1},
                "batches": None,
            },
            TypeError,
            "batches: expected an iterable",
        ),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"damping": "some"}, ValueError, "damping: expected a number"),
        ({"batchnorm_batches": -1}, ValueError, "batchnorm_batches: expected an int >= 0, got -1"),
        ({"params": "2.weight"}, ValueError, "params: expected names among .*, got '2.weight'"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected torch.float32 or torch.bfloat16"),
    ],
)
def test_bad_input(change, error, message, unchanged):
    model = make_model()
    arguments = {"batches": make_batches(12), "loss_fn": LOSS, "sparsity": 0.5, **FAST, **change}
    with unchanged(model), pytest.raises(error, match=message):
        mfac.prune(model, **arguments)


def test_fewer_batches_than_gradients_are_used_again():
    with pytest.warns(UserWarning, match="batches: 5 batches for 8 gradients; they are used again"):
        mfac.prune(make_model(), make_batches(5), LOSS, 0.5, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # going through them again at a later step is as it should be
        mfac.prune(make_model(), make_batches(8), LOSS, 0.5, **FAST)


@pytest.mark.parametrize("given", [6, 8 + 1, 8 + 2 + 1])
def test_an_iterator_that_ends_early(given):
    """The model is as it was before the step for which there were no gradients."""
    model, other = make_model(), make_model()
    done = {6: 0, 9: 1, 11: 2}[given]
    with pytest.raises(ValueError, match=r"batches: expected more batches, .*; pass a list or DataLoader"):
        mfac.prune(model, iter(make_batches(given)), LOSS, 0.8, **FAST)
    masks, source, buffer = None, iter(make_batches(given)), None
    for r in range(1, done + 1):
        buffer = mfac.collect_gradients(other, source, LOSS, 8 if r == 1 else 2, buffer=buffer)
        masks = mfac.prune_step(
            other, buffer, interpolate_sparsity(0, 0.8, r / 3), masks=masks, damping=1e-3, block_size=50
        ).masks  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_batches_that_end_after_the_last_step():
    """What has been pruned is not lost for want of batches to measure it with."""
    with pytest.warns(UserWarning, match="pruned, but not measured or without new BatchNorm statistics: batches"):
        result = mfac.prune(make_model(), iter(make_batches(8 + 2 + 2)), LOSS, 0.8, **FAST)
    assert result.sparsity == pytest.approx(0.8) and len(result.steps) == 3
    assert result.steps[-1].loss_after != result.steps[-1].loss_after  # NaN


def test_not_a_number_in_json(tmp_path):
    with pytest.warns(UserWarning, match="not measured"):
        result = mfac.prune(make_model(), iter(make_batches(8 + 2 + 2)), LOSS, 0.8, **FAST)
    result.to_json(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["steps"][-1]["loss_after"] is None


def test_a_loss_that_turns_nan(unchanged):
    """Gradients that are not finite from the second step on: weights of the first, all else as before."""
    calls = []

    def loss_fn(out, targets):
        calls.append(1)
        return LOSS(out, targets) * (1 if len(calls) <= 8 else float("nan"))

    model = make_model()
    with unchanged(model, weights=False), pytest.raises(ValueError, match="got 16 with NaN or infinity and 0 finite"):
        mfac.prune(model, make_batches(12), loss_fn, 0.8, **FAST)
    zeros = sum(int((p == 0).sum()) for p in mfac.prunable_parameters(model).values())
    assert zeros == round(180 * interpolate_sparsity(0, 0.8, 1 / 3))
