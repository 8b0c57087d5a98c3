"""Modifiers of the learning rate and the weight decay: values, and when the optimizer is left alone."""

import math

import pytest
import torch

from mfac.recipe import Manager

RANGE = "modifiers:\n  - !EpochRangeModifier {end_epoch: 10}\n"


def rates(modifiers, epochs, groups=1):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    model = torch.nn.ParameterList(weights)
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=1.0)
    session = Manager.from_recipe(RANGE + modifiers).apply(model, optimizer)
    seen = [optimizer.param_groups[0]["lr"]]
    for epoch in epochs:
        session.step(epoch)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen, optimizer, session


def test_a_rate_is_set_once_and_then_left_to_the_scheduler():
    text = "  - !SetLearningRateModifier {learning_rate: 0.1}\n"
    text += "  - !SetLearningRateModifier {learning_rate: 0.01, start_epoch: 2}\n"
    _, optimizer, session = rates(text, [])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    for step in range(6):
        optimizer.step()
        scheduler.step()
        session.step((step + 1) / 2)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.05, 0.025, 0.0125, 0.01, 0.005, 0.0025])


@pytest.mark.parametrize(
    ("func", "expected"),
    [
        ("linear", [1.0, 0.9, 0.5, 0.1]),
        (
            "cosine",
            [1.0, 1 - 0.8 * (1 - math.cos(math.pi / 8)) / 2, 0.6, 0.2 + 0.8 * (1 + math.cos(0.75 * math.pi)) / 2],
        ),
        ("cyclic_linear, cycle_epochs: 1.5", None),
    ],
)
def test_functions(func, expected):
    if func == "linear":
        final, expected = 0.0, [1.0, 1 - 1 / 8, 0.5, 0.25]
    else:
        final = 0.2
    text = f"  - !LearningRateFunctionModifier {{lr_func: {func}, init_lr: 1.0, final_lr: {final}, end_epoch: 4}}\n"
    seen, _, _ = rates(text, [0.5, 2, 3, 4, 5])
    if expected is None:  # cycles 0 - 1.5, 1.5 - 3 and 3 - 4
        expected = [1.0, 1 - 0.8 / 3, 1 - 0.8 / 3, 1.0]
    assert seen == pytest.approx([*expected, final, final])


def test_functions_follow_each_other_and_leave_the_rate_alone():
    text = ""
    for start, end, first, last in ((0, 2, 1.0, 0.5), (2, 4, 0.4, 0.2)):
        text += f"  - !LearningRateFunctionModifier {{lr_func: linear, init_lr: {first}, final_lr: {last}, "
        text += f"start_epoch: {start}, end_epoch: {end}}}\n"
    seen, optimizer, session = rates(text, [1, 2, 3, 4.5])
    assert seen == pytest.approx([1.0, 0.75, 0.4, 0.3, 0.2])
    optimizer.param_groups[0]["lr"] = 7.0
    session.step(5)
    assert optimizer.param_groups[0]["lr"] == 7.0


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("lr_class: StepLR, lr_kwargs: {step_size: 2, gamma: '1e-1'}", [1.0, 1.0, 0.1, 0.1, 0.01]),
        ("lr_class: MultiStepLR, lr_kwargs: {milestones: [2, 4], gamma: 0.1}", [1.0, 0.1, 0.1, 0.01, 0.01]),
        ("lr_class: ExponentialLR, lr_kwargs: {gamma: 0.5}", [1.0, 0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_schedulers_of_torch(scheduler, expected):
    text = f"  - !LearningRateModifier {{init_lr: 1, {scheduler}, start_epoch: 1}}\n"
    seen, _, _ = rates(text, [0.5, 1, 1.5, 2, 3, 4, 5.5])
    assert seen == pytest.approx([1.0, 1.0, expected[0], expected[0], *expected[1:]])


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (
            "LearningRateFunctionModifier {lr_func: step, init_lr: 1, final_lr: 0, end_epoch: 1}",
            "lr_func: expected one",
        ),
        (
            "LearningRateFunctionModifier {lr_func: linear, init_lr: 1, final_lr: 0, end_epoch: 0}",
            "end_epoch: expected",
        ),
        ("LearningRateFunctionModifier {lr_func: linear, init_lr: 1, final_lr: 0}", "end_epoch: expected a value"),
        ("LearningRateFunctionModifier {lr_func: linear, init_lr: x, final_lr: 0, end_epoch: 1}", "init_lr: expected"),
        ("LearningRateModifier {lr_class: OneCycleLR, init_lr: 1}", "lr_class: expected one of StepLR, MultiStepLR"),
        (
            "LearningRateModifier {lr_class: StepLR, init_lr: 1}",
            "lr_kwargs: expected a value of step_size, which StepLR needs, got none",
        ),
        (
            "LearningRateModifier {lr_class: StepLR, init_lr: 1, lr_kwargs: 3}",
            "lr_kwargs: expected arguments of StepLR",
        ),
    ],
)
def test_errors(modifier, message):
    with pytest.raises(ValueError, match=f"recipe line 3: .*{message}"):
        Manager.from_recipe(f"{RANGE}  - !{modifier}\n")


def test_a_resumed_session_keeps_the_rate_that_a_scheduler_made():
    text = "  - !SetLearningRateModifier {learning_rate: 0.1}\n"
    text += "  - !SetWeightDecayModifier {weight_decay: 0.5, start_epoch: 3}\n"
    _, optimizer, session = rates(text, [1.0])
    optimizer.param_groups[0]["lr"] = 0.07
    state = session.state_dict()
    _, again, resumed = rates(text, [])
    assert again.param_groups[0]["lr"] == 0.1
    resumed.load_state_dict(state)
    resumed.step(2.0)
    assert (again.param_groups[0]["lr"], again.param_groups[0]["weight_decay"]) == (0.07, 0)
    resumed.step(3.0)
    assert again.param_groups[0]["weight_decay"] == 0.5
    _, _, other = rates(text, [], groups=2)
    with pytest.raises(ValueError, match="state: expected lr of 2 parameter groups"):
        other.load_state_dict(state)


def test_milestones_are_epochs_of_the_training():
    """As steps of fractional length, they need not be whole."""
    text = "  - !LearningRateModifier {lr_class: MultiStepLR, lr_kwargs: {milestones: [7, 7.5], gamma: 0.1}, "
    text += "init_lr: 0.01, start_epoch: 6}\n"
    seen, _, _ = rates(text, [6, 6.75, 7, 7.25, 7.5, 9])
    assert seen == pytest.approx([1.0, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    text = "  - !LearningRateModifier {lr_class: StepLR, lr_kwargs: {step_size: 2.5, gamma: 0.5}, init_lr: 0.1}\n"
    assert rates(text, [2.25, 2.5, 5, 7.25, 7.5])[0] == pytest.approx([0.1, 0.1, 0.05, 0.025, 0.025, 0.0125])


@pytest.mark.parametrize(("milestones", "got"), [("[1, 3]", 1), ("[3, 4]", 4), ("[3, 5]", 5)])
def test_milestones_outside_are_refused(milestones, got):
    text = f"  - !LearningRateModifier {{lr_class: MultiStepLR, lr_kwargs: {{milestones: {milestones}}}, init_lr: 1, "
    with pytest.raises(
        ValueError, match=f"lr_kwargs: expected milestones between start_epoch = 1 .* = 4, .* got {got}"
    ):
        Manager.from_recipe(f"{RANGE}{text}start_epoch: 1, end_epoch: 4}}\n")


@pytest.mark.parametrize(
    "kwargs", ["lr_min: '1e-1', cycle_epochs: 2", "eta_min: 0.1, T_0: 2", "eta_min: 0.1, T_0: 2, T_mult: 2"]
)
def test_warm_restarts(kwargs):
    """As torch's scheduler, stepped with the epoch as a float, in both spellings of its arguments."""
    text = f"  - !LearningRateModifier {{lr_class: CosineAnnealingWarmRestarts, lr_kwargs: {{{kwargs}}}, init_lr: 1, "
    epochs = [1 + i / 10 for i in range(80)]
    seen, _, _ = rates(f"{text}start_epoch: 1, end_epoch: 9}}\n", [*epochs, 9, 9.5])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    growth = 2 if "T_mult" in kwargs else 1
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, growth, eta_min=0.1)
    expected = []
    for epoch in epochs:
        scheduler.step(round(epoch - 1, 9))
        expected.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([1.0, *expected, expected[-1], expected[-1]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("{lr_min: 0.1}", "expected a value of cycle_epochs, which CosineAnnealingWarmRestarts needs, got none"),
        ("{T_0: 2, cycle_epochs: 3}", "expected one value for cycle_epochs, got two"),
        ("{T_0: 2, T_mult: 1.5}", "expected an int, got 1.5 for T_mult"),
        (
            "{T_0: 2, verbose: true}",
            "expected cycle_epochs, lr_min, T_mult of CosineAnnealingWarmRestarts, got 'verbose'",
        ),
    ],
)
def test_errors_of_warm_restarts(kwargs, message):
    text = f"{{lr_class: CosineAnnealingWarmRestarts, init_lr: 1, lr_kwargs: {kwargs}}}"
    with pytest.raises(ValueError, match=f"recipe line 3: !LearningRateModifier: lr_kwargs: {message}"):
        Manager.from_recipe(f"{RANGE}  - !LearningRateModifier {text}\n")


@pytest.mark.parametrize(
    "kwargs",
    ["{step_size: 0}", "{step_size: 1, gamma: [1]}", "{step_size: 1, last_epoch: 5}", "{step_size: 1, gamma: -1}"],
)
def test_schedulers_that_fail_are_refused_early(kwargs):
    with pytest.raises(ValueError, match="recipe line 3: !LearningRateModifier: lr_kwargs: expected"):
        Manager.from_recipe(f"{RANGE}  - !LearningRateModifier {{lr_class: StepLR, init_lr: 1, lr_kwargs: {kwargs}}}\n")


def test_cycles_begin_where_they_should():
    """Whatever the rounding of epochs: 0.6 / 0.1 is below 6."""
    text = "  - !LearningRateFunctionModifier "
    text += "{lr_func: cyclic_linear, cycle_epochs: 0.1, init_lr: 1.0, final_lr: 0.0, end_epoch: 2}\n"
    seen, _, _ = rates(text, [0.1, 0.2, 0.3, 0.6, 0.7, 1.2])
    assert seen == pytest.approx([1.0] * 7)


def test_what_does_not_fit_the_optimizer_is_refused():
    manager = Manager.from_recipe(RANGE + "  - !SetWeightDecayModifier {weight_decay: 0.0, start_epoch: 2}\n")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="recipe line 3: !SetWeightDecayModifier: optimizer: expected one with weight_decay"
    ):
        manager.apply(model, torch.optim.Rprop(model.parameters()))
