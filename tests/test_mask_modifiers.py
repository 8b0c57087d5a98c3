"""Modifiers that hold masks, freeze parameters and set them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mfac.recipe import Manager

pytestmark = pytest.mark.usefixtures("one_thread")
RANGE = "modifiers:\n  - !EpochRangeModifier {end_epoch: 10}\n"


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    return model


def apply(text, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Manager.from_recipe(RANGE + text).apply(model, optimizer, **options), optimizer


def train(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 8)), torch.randint(2, (16,))).backward()
    optimizer.step()


@pytest.mark.parametrize("params", ["__ALL__", "__ALL_PRUNABLE__", "[0.weight]", "[re:0.weight]"])
def test_constant_holds_what_is_zero_before_training(model, params):
    session, optimizer = apply(f"  - !ConstantPruningModifier {{params: {params}, start_epoch: 0.0}}\n", model)
    for step in range(4):
        train(model, optimizer)
        session.step(step + 1)
        assert (model[0].weight == 0).float().mean() == 0.5
    assert not session.masks["0.weight"][:, 0].any()


def test_constant_ends(model):
    session, optimizer = apply("  - !ConstantPruningModifier {params: __ALL__, end_epoch: 2}\n", model)
    for step in range(3):
        train(model, optimizer)
        session.step(step + 1)
        assert bool((model[0].weight == 0).any()) == (step < 2)
    assert session.sparsity == 0


def test_constant_survives_a_restart(model):
    text = "  - !ConstantPruningModifier {params: __ALL__}\n"
    session, _ = apply(text, model)
    again, _ = apply(text, nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    again.load_state_dict(session.state_dict())
    assert torch.equal(again.masks["0.weight"], session.masks["0.weight"])


def test_current_sparsity_is_where_a_schedule_starts(model):
    text = """  - !GMPruningModifier
    params: [0.weight, 2.weight]
    init_sparsity: __FROM_PARAM__
    final_sparsity: 0.75
    start_epoch: 1
    end_epoch: 3
    update_frequency: 1
    inter_func: linear
"""
    session, optimizer = apply(text, model)
    seen = []
    for step in range(3):
        train(model, optimizer)
        session.step(step + 1)
        seen.append([float((model[i].weight == 0).float().mean()) for i in (0, 2)])
        if step == 1:  # a resumed run does not take the sparsity that it finds for the initial one
            other = copy.deepcopy(model)
            resumed, _ = apply(text, other)
            resumed.load_state_dict(session.state_dict())
            assert resumed.pruners[0].state_dict()["initial"] == session.pruners[0].state_dict()["initial"]
    assert seen == [[0.5, 0.0], [0.625, 0.375], [0.75, 0.75]]


def test_a_model_that_is_sparser_than_the_recipe_is_refused(model):
    text = "  - !GMPruningModifier {params: [0.weight], init_sparsity: __FROM_PARAM__, final_sparsity: 0.25, "
    with pytest.raises(
        ValueError, match=r"line 3: !GMPruningModifier: init_sparsity: expected at most the final one, 0.25, got 0.5"
    ):
        apply(text + "end_epoch: 1}\n", model)


def test_masks_that_are_not_left_enabled_are_dropped(model):
    text = "  - !GMPruningModifier {params: [2.weight], final_sparsity: 0.5, end_epoch: 2, leave_enabled: False}\n"
    session, optimizer = apply(text, model)
    for step in range(4):
        train(model, optimizer)
        session.step(step + 1)
        assert bool((model[2].weight == 0).any()) == (step < 2)
    assert session.sparsity == 0
    resumed, _ = apply(text, other := copy.deepcopy(model))
    resumed.load_state_dict(session.state_dict())
    assert not (other[2].weight == 0).any()


ACDC = """  - !ACDCPruningModifier
    compression_sparsity: 0.75
    start_epoch: 1
    end_epoch: 6
    update_frequency: 1
    params: [0.weight]
    global_sparsity: True
"""


def test_phases_alternate_and_end_sparse(model):
    session, optimizer = apply(ACDC, model)
    seen = []
    for step in range(16):
        train(model, optimizer)
        results = session.step((step + 1) / 2)
        seen.append(float((model[0].weight == 0).float().mean()))
        assert bool(results) == (step + 1 in (4, 8))
        assert session.sparsity == (0.75 if seen[-1] == 0.75 else 0.0)
    assert Manager.from_recipe(RANGE + ACDC).pruned_from == 4
    # Epochs 0.5 to 8: a dense phase from 1, sparse from 2, dense from 3, sparse from 4 on: the fifth would be dense.
    assert seen == [0, 0, 0, 0.75, 0.75, 0, 0, *[0.75] * 9]


def test_momentum_is_reset_when_weights_come_back(model):
    session, optimizer = apply(ACDC, model)
    for epoch in (1.0, 2.0):
        train(model, optimizer)
        session.step(epoch)
    momentum = optimizer.state[model[2].weight]["momentum_buffer"]
    assert momentum.abs().sum() > 0
    train(model, optimizer)
    session.step(3.0)
    assert momentum.abs().sum() == 0


def test_alternation_survives_a_restart(model):
    session, optimizer = apply(ACDC, model)
    for epoch in (1.0, 2.0):
        train(model, optimizer)
        session.step(epoch)
    again, _ = apply(ACDC, other := copy.deepcopy(model))
    again.load_state_dict(session.state_dict())
    assert again.step(2.5) == [] and again.sparsity == 0.75 == float((other[0].weight == 0).float().mean())


def test_alternation_at_once(model):
    assert Manager.from_recipe(RANGE + ACDC).one_shot(model).sparsity == 0.75


@pytest.mark.parametrize("end", [1.5, 2])
def test_a_single_phase_is_sparse(model, end):
    text = ACDC.replace("end_epoch: 6", f"end_epoch: {end}")
    assert Manager.from_recipe(RANGE + text).pruned_from == 1
    session, optimizer = apply(text, model)
    seen = []
    for step in range(6):
        train(model, optimizer)
        session.step((step + 1) / 2)
        seen.append(float((model[0].weight == 0).float().mean()))
    assert seen == [0, *[0.75] * 5]


@pytest.mark.parametrize("end", [1, -1])
def test_alternation_needs_an_end(end):
    with pytest.raises(ValueError, match="end_epoch: expected above start_epoch = 1, got"):
        Manager.from_recipe(RANGE + ACDC.replace("end_epoch: 6", f"end_epoch: {end}"))


def test_alternation_that_training_cuts_off_is_said():
    with pytest.warns(UserWarning, match=r"line 3: !ACDCPruningModifier: end_epoch: .* the 10 epochs .*, got epoch 18"):
        Manager.from_recipe(RANGE + ACDC.replace("end_epoch: 6", "end_epoch: 20"))


def test_frozen_for_a_while(model):
    model[2].bias.requires_grad_(False)
    text = "  - !TrainableParamsModifier {params: ['re:.*[.]bias'], trainable: False, start_epoch: 1, end_epoch: 2}\n"
    session, optimizer = apply(text, model)
    train(model, optimizer)
    session.step(1.0)
    assert [p.requires_grad for p in (model[0].bias, model[2].bias, model[0].weight)] == [False, False, True]
    assert model[0].bias.grad is None
    other = copy.deepcopy(model)
    other[0].bias.requires_grad_(True)
    resumed, _ = apply(text, other)
    resumed.load_state_dict(session.state_dict())
    assert not other[0].bias.requires_grad
    for now, net in ((session, model), (resumed, other)):
        now.step(2.0)
        assert [net[0].bias.requires_grad, net[2].bias.requires_grad] == [True, False]


def test_frozen_before_training(model):
    apply("  - !TrainableParamsModifier {params: __ALL__, trainable: False}\n", model)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("value", "expected"), [("0.5", [0.5, 0.5]), ("[1, -1]", [1.0, -1.0])])
def test_parameters_are_set_once(model, value, expected):
    session, _ = apply(f"  - !SetParamModifier {{params: [2.bias], val: {value}, start_epoch: 2}}\n", model)
    before = model[2].bias.tolist()
    session.step(1.0)
    assert model[2].bias.tolist() == before
    session.step(2.5)
    assert model[2].bias.tolist() == expected
    with torch.no_grad():
        model[2].bias.fill_(3)
    session.step(3.0)
    assert model[2].bias.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        ("SetParamModifier {params: [2.bias], val: [1]}", r"val: expected a number or the shape \[2\] of '2.bias'"),
        ("SetParamModifier {params: [2.bias], val: x}", "val: expected a number or nested lists"),
        ("SetParamModifier {params: [2.bias], val: .inf}", "val: expected finite numbers"),
        ("SetParamModifier {params: [7.bias], val: 1}", "params: expected names of parameters, got '7.bias'"),
        ("TrainableParamsModifier {params: [7.bias]}", "params: expected names of parameters, got '7.bias'"),
        ("TrainableParamsModifier {params: [2.bias], trainable: 1}", "trainable: expected true or false, got 1"),
        ("ConstantPruningModifier {params: [7.weight]}", "params: expected names among"),
    ],
)
def test_errors(model, modifier, message):
    with pytest.raises(ValueError, match=message):
        apply(f"  - !{modifier}\n", model)


def test_names_that_need_not_match(model):
    apply("  - !TrainableParamsModifier {params: [7.bias], trainable: False, params_strict: False}\n", model)
    assert all(p.requires_grad for p in model.parameters())


def test_masks_hold_whatever_another_modifier_writes(model):
    """In the last step as in every other, and at once."""
    constant = "  - !ConstantPruningModifier {params: [0.weight], start_epoch: 0}\n"
    pruning = "  - !MFACPruningModifier {params: [0.weight, 2.weight], init_sparsity: 0.1, final_sparsity: 0.3, "
    pruning += "start_epoch: 1, end_epoch: 2, num_grads: 4}\n"
    data = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(4)]
    before = copy.deepcopy(model)
    session, optimizer = apply(constant + pruning, model, batches=data, loss_fn=F.cross_entropy)
    for step in range(2):
        train(model, optimizer)
        session.step(step + 1)
    at_once = Manager.from_recipe(RANGE + constant + pruning).one_shot(before, data, F.cross_entropy)
    for found, net in ((session, model), (at_once, before)):
        assert all(not net.get_parameter(name)[~mask].any() for name, mask in found.masks.items())
    text = "  - !GMPruningModifier {params: [0.weight], final_sparsity: 0.5, start_epoch: 0, end_epoch: 1}\n"
    session, _ = apply(text + "  - !SetParamModifier {params: [0.weight], val: 0.1, start_epoch: 2}\n", model)
    session.step(1.0)
    session.step(2.0)
    assert float((model[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_resumed_run_does_not_set_parameters_again(model, loaded_first):
    text = "  - !SetParamModifier {params: [0.bias], val: 0.0, start_epoch: 0}\n"
    session, optimizer = apply(text, model)
    train(model, optimizer)
    session.step(1.0)
    other = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    if loaded_first:
        other.load_state_dict(model.state_dict())
    again, _ = apply(text, other)
    if not loaded_first:
        other.load_state_dict(model.state_dict())
    again.load_state_dict(session.state_dict())
    assert model[0].bias.any() and torch.equal(other[0].bias, model[0].bias)


def test_dropped_masks_are_not_checked(model):
    text = "  - !GMPruningModifier {params: [2.weight], final_sparsity: 0.5, end_epoch: 1, leave_enabled: False}\n"
    session, optimizer = apply(text, model)
    session.step(1.0)
    train(model, optimizer)
    session.step(2.0)
    assert session.layer_sparsities() == {}
    assert Manager.from_recipe(RANGE + text).one_shot(model).sparsity == 0.5


def test_a_model_at_its_final_sparsity_goes_on(model):
    """Though 0.3 of 32 weights is rounded to 10, which is 0.3125."""
    text = "  - !GMPruningModifier {params: [0.weight], init_sparsity: __FROM_PARAM__, final_sparsity: 0.3, "
    text += "end_epoch: 1}\n"
    with torch.no_grad():
        model[0].weight.view(-1)[:] = torch.arange(32.0)
        model[0].weight.view(-1)[:10] = 0
    session, _ = apply(text, model)
    assert session.step(1.0) == [] and float((model[0].weight == 0).float().mean()) == 0.3125


def test_a_freeze_within_another(model):
    """The one that begins last counts; where it ends, the other holds."""
    text = "  - !TrainableParamsModifier {params: __ALL__, trainable: false, start_epoch: 0, end_epoch: 4}\n"
    text += "  - !TrainableParamsModifier {params: [2.weight], trainable: %s, start_epoch: 1, end_epoch: %d}\n"
    for value, end, seen in [("false", 2, [0, 0, 0, 1]), ("true", 2, [0, 1, 0, 1]), ("false", 5, [0, 0, 0, 0, 1])]:
        for p in model.parameters():
            p.requires_grad_(True)
        session, _ = apply(text % (value, end), model)
        found = []
        for epoch in (0.5, 1.0, 2.0, 4.0, 5.0)[: len(seen)]:
            session.step(epoch)
            found.append(int(model[2].weight.requires_grad))
        assert found == seen and model[0].weight.requires_grad


def test_what_a_recipe_thaws_is_named(model):
    """`__ALL_PRUNABLE__` leaves out what is frozen when the recipe is applied."""
    model[0].weight.requires_grad_(False)
    text = "  - !TrainableParamsModifier {params: [0.weight], start_epoch: 1}\n"
    text += "  - !GMPruningModifier {params: %s, final_sparsity: 0.75, start_epoch: 2, end_epoch: 3}\n"
    with pytest.raises(ValueError, match=r"line 4: !GMPruningModifier: params: expected the names of 0.weight too"):
        apply(text % "__ALL_PRUNABLE__", model)
    assert not model[0].weight.requires_grad
    session, _ = apply(text % "[0.weight, 2.weight]", model)
    session.step(3.0)
    assert [float((model[i].weight == 0).float().mean()) for i in (0, 2)] == [0.75, 0.75]


def test_overlapping_freezes_end_as_before(model):
    text = "  - !TrainableParamsModifier {params: __ALL__, trainable: false, start_epoch: 0, end_epoch: 1}\n"
    text += "  - !TrainableParamsModifier {params: [2.weight], trainable: true, start_epoch: 0, end_epoch: 1}\n"
    session, _ = apply(text, model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, False]
    session.step(1.0)
    assert all(p.requires_grad for p in model.parameters())
