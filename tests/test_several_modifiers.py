"""Several modifiers that prune the same parameters."""

import pytest
import torch
import torch.nn.functional as F
from test_manager import apply
from torch import nn

from mfac.recipe import Manager

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def training(model, optimizer, session, steps):
    """Train with four steps per epoch; yield the epochs done after each."""
    for step in range(1, steps + 1):
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(step / 4)
        yield step / 4


TWICE = """
modifiers:
  - !EpochRangeModifier {{end_epoch: 5}}
  - !{name}
    {{params: __ALL_PRUNABLE__, final_sparsity: 0.75, end_epoch: 2, global_sparsity: {scope}{more}}}
  - !{name}
    {{params: __ALL_PRUNABLE__, init_sparsity: 0.75, final_sparsity: {final}, start_epoch: {start}, end_epoch: 4,
    global_sparsity: {scope}{more}}}
"""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["one_shot", "training", "resumed"])
@pytest.mark.parametrize(
    ("name", "scope", "start", "final"),
    [
        ("MFACPruningModifier", "true", 2, 0.75),
        ("MFACPruningModifier", "false", 2, 0.875),
        ("OBSPruningModifier", "true", 1, 0.875),  # at the same time for a while
        ("GMPruningModifier", "true", 2, 0.875),
    ],
)
def test_a_modifier_goes_on_from_the_masks_of_another(how, seed, name, scope, start, final):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = [(torch.randn(8, 8), torch.randint(4, (8,))) for _ in range(16)]
    more = "" if name.startswith("GM") else ", num_grads: 16"
    manager = Manager.from_recipe(TWICE.format(name=name, scope=scope, start=start, final=final, more=more))
    if how == "one_shot":
        session = manager.one_shot(model, data, F.cross_entropy)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        session = manager.apply(model, optimizer, data, F.cross_entropy)
        for step in range(20):
            inputs, targets = data[step % 16]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            session.step((step + 1) / 4)
            if how == "resumed" and step in (6, 8, 12):
                state, session = session.state_dict(), manager.apply(model, optimizer, data, F.cross_entropy)
                session.load_state_dict(state)
    zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 2))
    assert zeros == final * 192 and session.sparsity == final
    first, second = (pruner.masks for pruner in session.pruners)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)


def test_a_modifier_below_what_another_holds_says_so(model):
    text = "modifiers:\n  - !GMPruningModifier {params: [0.weight], final_sparsity: 0.75}\n"
    text += "  - !GMPruningModifier {params: [0.weight, 2.weight], final_sparsity: 0.5}\n"
    with pytest.warns(
        UserWarning, match=r"sparsity: expected at least the 0.75 that is held already of 0.weight, got 0.5"
    ):
        session = Manager.from_recipe(text).one_shot(model)
    assert [int((model[i].weight == 0).sum()) for i in (0, 2)] == [24, 4]
    assert session.sparsity == 28 / 40


def test_a_modifier_goes_on_from_constant_masks(model):
    """Though the first update may revive weights that were zero, which the mask of ConstantPruning holds."""
    text = "modifiers:\n  - !EpochRangeModifier {end_epoch: 2}\n  - !ConstantPruningModifier {params: [0.weight]}\n"
    text += "  - !MFACPruningModifier {params: [0.weight], final_sparsity: 0.75, start_epoch: 1, end_epoch: 2, "
    text += "num_grads: 4, recomputations: 4}\n"
    with torch.no_grad():
        model[0].weight[:, :4] = 0
    session, _ = apply(text, model)
    for epoch in (0.5, 1.0, 2.0):
        session.step(epoch)
    assert session.sparsity == float((model[0].weight == 0).float().mean()) == 0.75


@pytest.mark.parametrize(
    ("other", "released"),
    [
        ("!MagnitudePruningModifier {ARGS, final_sparsity: 0.8, start_epoch: 0, end_epoch: 2, "
         "leave_enabled: False}", 3),
        ("!ACDCPruningModifier {params: [weight], compression_sparsity: 0.7, start_epoch: 0, end_epoch: 5, "
         "update_frequency: 1}", 2.5),
        ("!ACDCPruningModifier {params: [weight], compression_sparsity: 0.9, start_epoch: 0, end_epoch: 3, "
         "update_frequency: 1, leave_enabled: False}", 5),
    ],
)  # fmt: skip
def test_masks_that_are_dropped_are_no_one_elses(other, released):
    """A modifier does not keep what another lets go of."""
    arguments = "params: [weight], init_sparsity: 0.0, update_frequency: 0.5"
    own = "!MagnitudePruningModifier {ARGS, final_sparsity: 0.3, start_epoch: 0, end_epoch: 3}"
    lines = ["!EpochRangeModifier {end_epoch: 5}", own, other]
    recipe = "modifiers:\n" + "".join(f"  - {line}\n" for line in lines).replace("ARGS", arguments)
    model = torch.nn.Linear(40, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Manager.from_recipe(recipe).apply(model, optimizer)
    for epoch in training(model, optimizer, session, 20):
        if epoch == released:
            assert float((model.weight == 0).float().mean()) == pytest.approx(0.3, abs=0.03)


def test_an_update_sees_the_masks_of_the_others(model):
    """Though the optimizer has just moved what they hold at zero."""
    text = "modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n"
    for name in ("0.weight", "2.weight"):
        text += f"  - !MFACPruningModifier {{params: [{name}], init_sparsity: 0.5, final_sparsity: 0.75, num_grads: 4, "
        text += "start_epoch: 1, end_epoch: 2}\n"
    data = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(4)]
    alive = []

    def loss_fn(outputs, targets):
        alive.append([int((p != 0).sum()) for p in (model[0].weight, model[2].weight)])
        return F.cross_entropy(outputs, targets)

    session = Manager.from_recipe(text).apply(model, torch.optim.SGD(model.parameters(), lr=0.1), data, loss_fn)
    session.step(1.0)
    with torch.no_grad():
        model[0].weight.add_(1), model[2].weight.add_(1)
    alive.clear()
    session.step(2.0)
    assert alive[0] == [16, 4] and max(kept for kept, _ in alive) == 16 and max(kept for _, kept in alive) == 4


def test_acdc_sees_the_masks_of_the_others():
    """The sparsity is the highest that is asked for, in whichever order the modifiers stand."""
    acdc = "!ACDCPruningModifier {params: [weight], compression_sparsity: 0.8, start_epoch: 0, end_epoch: 4, "
    acdc += "update_frequency: 1}"
    other = "!MagnitudePruningModifier {params: [weight], init_sparsity: 0.5, final_sparsity: 0.5, start_epoch: 1, "
    other += "end_epoch: 2, update_frequency: 1}"
    found = []
    for lines in ((acdc, other), (other, acdc)):
        torch.manual_seed(0)
        model = nn.Linear(40, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        recipe = "modifiers:\n  - !EpochRangeModifier {end_epoch: 5}\n" + "".join(f"  - {line}\n" for line in lines)
        session = Manager.from_recipe(recipe).apply(model, optimizer)
        for _ in training(model, optimizer, session, 8):
            pass
        found.append(session.sparsity)
    assert found[0] == found[1]
