"""Managers and sessions: what a recipe does to a model and an optimizer."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pruning_recipe import PRUNING
from torch import nn

from mfac.recipe import Manager
from mfac.recipe.modifiers import MODIFIERS, MagnitudePruning
from mfac.tutorial.demo import recipe_path
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")


# The two recipes of the published tutorial, in their own spelling: legacy names, and none of our extensions.
ORIGINALS = Path(__file__).parent / "recipes"
BLOCKS = {0.9: "1.0 1.1 2.0", 0.95: "2.1 3.0 3.1 3.5", 0.97: "3.2 3.3 3.4 4.0 4.1"}


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def batches(count=4):
    return [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(count)]


def apply(text, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
    return Manager.from_recipe(text).apply(model, optimizer, batches(), F.cross_entropy, **options), optimizer


def test_settings_follow_the_epochs(model):
    session, optimizer = apply(
        """
modifiers:
  - !EpochRangeModifier {end_epoch: 2}
  - !SetLearningRateModifier {learning_rate: 0.01, start_epoch: 1}
  - !SetLearningRateModifier {learning_rate: 0.1}
  - !SetWeightDecayModifier {weight_decay: 0, start_epoch: 1, param_groups: [0]}
""",
        model,
    )
    seen = []
    for step in range(3):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]))
        session.step((step + 1) / 2)
    assert seen == [(0.1, 0.5), (0.1, 0.5), (0.01, 0.0)]


GRADUAL = [name for name, cls in MODIFIERS.items() if issubclass(cls, MagnitudePruning)]


@pytest.mark.parametrize("name", GRADUAL)
def test_pruning_schedule(model, name):
    extra = "    num_grads: 4\n    recomputations: 1\n" if "MFAC" in name or "OBS" in name else ""
    session, _ = apply(PRUNING % name + extra, model)
    reached = []
    for step in range(10):
        with torch.no_grad():
            model[0].weight.add_(0.01)  # an optimizer step that revives pruned weights
        results = session.step((step + 1) / 4)
        reached.append(round(float((model[0].weight == 0).float().mean()), 4))
        assert bool(results) == (step + 1 in (4, 6, 8))
    assert reached == [0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75]
    assert session.sparsity == 0.75
    assert not (model[2].weight == 0).any()


def test_one_shot_ignores_the_schedule(model):
    session = Manager.from_recipe(PRUNING % "MagnitudePruningModifier").one_shot(model)
    assert session.sparsity == float((model[0].weight == 0).float().mean()) == 0.75
    with pytest.raises(ValueError, match="recipe: expected a pruning modifier for one-shot pruning, got none"):
        Manager.from_recipe("modifiers:\n  - !EpochRangeModifier {end_epoch: 2}").one_shot(model)


@pytest.mark.parametrize("init", ["0.0", "0.5"])
def test_one_shot_needs_no_epochs(model, init):
    for epochs in ("", ", start_epoch: 2, end_epoch: 3"):
        text = "modifiers:\n  - !MagnitudePruningModifier "
        text += f"{{params: [0.weight], init_sparsity: {init}, final_sparsity: 0.5{epochs}}}"
        session = Manager.from_recipe(text).one_shot(model)
        assert session.sparsity == float((model[0].weight == 0).float().mean()) == 0.5
        assert len(session.pruners[0].results) == 1


def test_magnitude_moves_no_weight(model):
    """Though batches are given, for the modifiers that need them."""
    before, taken = model[0].weight.detach().clone(), []
    batches = (taken.append(i) or (torch.randn(4, 8), torch.randn(4, 2)) for i in range(300))
    Manager.from_recipe(PRUNING % "MagnitudePruningModifier").one_shot(model, batches, nn.functional.mse_loss)
    assert torch.equal(model[0].weight, torch.where(model[0].weight != 0, before, 0)) and not taken


def test_nothing_changes_when_a_name_is_wrong(model):
    text = PRUNING.replace("0.weight", "7.weight") % "MagnitudePruningModifier"
    text += "  - !SetLearningRateModifier {learning_rate: 0.1}\n"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"7\.weight"):
        Manager.from_recipe(text).apply(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    text = "modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n"
    text += "  - !SetLearningRateModifier {learning_rate: 0.1}\n"
    text += "  - !SetWeightDecayModifier {weight_decay: 0.1, param_groups: [1]}\n"
    with pytest.raises(ValueError, match="param_groups: expected indices below the optimizer's 1, got 1"):
        Manager.from_recipe(text).apply(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_length_is_needed(model):
    text = "modifiers:\n  - !GMPruningModifier {params: [0.weight], final_sparsity: 0.5}"
    with pytest.raises(ValueError, match=r"recipe: expected a length of training, .*, got none"):
        apply(text, model)


@pytest.mark.parametrize(
    "name", ["ConstantPruningModifier {params: [0.weight]}", "SetLearningRateModifier {learning_rate: 0.1}"]
)
def test_length_is_not_needed_by_what_has_no_end(model, name):
    with torch.no_grad():
        model[0].weight[0] = 0
    session, _ = apply(f"modifiers:\n  - !{name}", model)
    for epoch in (1.0, 100.0):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        session.step(epoch)
        assert bool((model[0].weight[0] == 0).all()) == name.startswith("Constant")
    with pytest.raises(ValueError, match=r"recipe: expected a length of training, .*, got none"):
        Manager.from_recipe(f"modifiers:\n  - !{name}").check_epochs()


def test_state_survives_a_restart(model):
    text = PRUNING % "MagnitudePruningModifier"
    session, _ = apply(text, model)
    session.step(1.0)
    state = session.state_dict()
    other = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    other.load_state_dict(model.state_dict())
    again, _ = apply(text, other)
    again.load_state_dict(state)
    assert again.sparsity == 0.25
    assert again.step(1.25) == []  # the update at 1.0 is not taken twice
    with torch.no_grad():
        other[0].weight.add_(1.0)
    again.step(2.0)
    assert float((other[0].weight == 0).float().mean()) == 0.75
    with pytest.raises(ValueError, match="state: expected 1 modifiers, those of this recipe, got 0"):
        again.load_state_dict({"epoch": 1.0, "actions": []})


@pytest.mark.parametrize("name", ["MagnitudePruningModifier", "MFACPruningModifier"])
def test_state_is_read_with_weights_only(model, name, tmp_path):
    text = PRUNING % name + ("    num_grads: 4\n" if "MFAC" in name else "")
    session, optimizer = apply(text, model)
    session.step(1.0)
    torch.save(session.state_dict(), tmp_path / "state.pt")
    again = Manager.from_recipe(text).apply(model, optimizer, batches(), F.cross_entropy)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.sparsity == 0.25
    assert torch.equal(again.masks["0.weight"], session.masks["0.weight"])
    if "MFAC" in name:
        again = Manager.from_recipe(text + "    damping: 1e-3\n").apply(model, optimizer, batches(), F.cross_entropy)
        with pytest.raises(ValueError, match=r"expected damping=0.001 like this Pruner, .*; strict=False goes"):
            again.load_state_dict(session.state_dict())
        again.load_state_dict(session.state_dict(), strict=False)
        assert again.sparsity == 0.25


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda objects: pickle.loads(pickle.dumps(objects))])
def test_copies_prune_the_copied_model(model, duplicate):
    text = PRUNING % "MagnitudePruningModifier" + "  - !SetLearningRateModifier {learning_rate: 0.1}\n"
    session, optimizer = apply(text, model)
    session.step(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other, other_optimizer, again = duplicate((model, optimizer, session))
    assert again.sparsity == 0.25
    other_optimizer.param_groups[0]["lr"] = 7.0
    again.step(2.0)
    assert float((other[0].weight == 0).float().mean()) == 0.75
    assert other_optimizer.param_groups[0]["lr"] == 7.0  # set once, and left alone
    assert session.sparsity == 0.25
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    session.step(2.0)
    assert torch.equal(model[0].weight, other[0].weight)


@pytest.mark.parametrize("state", [None, {}, {"epoch": 0.0, "actions": None}])
def test_other_states_are_refused(model, state):
    session, _ = apply(PRUNING % "MagnitudePruningModifier", model)
    with pytest.raises(ValueError, match=r"state: expected what Session.state_dict\(\) returned, got"):
        session.load_state_dict(state)


@pytest.mark.parametrize(("epoch", "error"), [("1", TypeError), (True, TypeError), (float("nan"), ValueError)])
def test_epochs_are_numbers(model, epoch, error):
    session, _ = apply(PRUNING % "MagnitudePruningModifier", model)
    with pytest.raises(error, match="epoch: expected a"):
        session.step(epoch)


class Drawn:
    """Batches, counted as they are taken."""

    def __init__(self, batches):
        self.batches, self.count = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.count += 1
            yield batch


@pytest.mark.parametrize(
    ("name", "epochs", "updates", "gradients"),
    [
        ("original_magnitude.md", (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), [(1.0, 0.35, 0.1), (2.0, 0.96, 0.0)], 0),
        # Training in such long strides that there is one update, to 0.97: log2(1 / 0.03) is 5.06, so R is 10.
        ("original_mfac.md", (2.0, 3.0), [(2.0, 0.96, 0.0)], 256 + 9 * 16 + 10 * 4),
    ],
)
def test_originals_run_unmodified(name, epochs, updates, gradients):
    model = MobileNetV1(10, width=0.1)
    data = [(torch.randn(2, 3, 8, 8), torch.randint(10, (2,))) for _ in range(256)]
    batches = Drawn(data)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager = Manager.from_recipe(ORIGINALS / name)
    asks_for_cuda = gradients and not torch.cuda.is_available()
    assert [str(w.message) for w in caught] == (
        ["the recipe asks for cuda:0, but CUDA is not available: the CPU is used"] if asks_for_cuda else []
    )
    session = manager.apply(model, optimizer, batches, F.cross_entropy)
    assert (manager.epochs, optimizer.param_groups[0]["lr"]) == (3.0, 0.0004)
    seen = []
    for epoch in epochs:
        inputs, targets = torch.cat([x for x, _ in data[:8]]), torch.cat([y for _, y in data[:8]])
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if session.step(epoch):
            seen.append((epoch, round(session.sparsity, 2), optimizer.param_groups[0]["weight_decay"]))
    assert seen == updates  # epoch, sparsity, weight decay
    assert batches.count == gradients
    layers = {f"sections.{block}.point.conv.weight": s for s, blocks in BLOCKS.items() for block in blocks.split()}
    assert set(session.masks) == set(layers)
    for layer, sparsity in layers.items():
        weight = model.get_parameter(layer)
        assert int((weight == 0).sum()) == round(sparsity * weight.numel())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["magnitude.md", "mfac.md"])
def test_shipped_recipes_fit_the_tutorials_network(name):
    manager = Manager.from_recipe(recipe_path(name))
    model = MobileNetV1(10)
    session = manager.apply(model, torch.optim.Adam(model.parameters()), [], F.cross_entropy)
    assert (manager.epochs, manager.pruned_from) == (3.0, 2.0)
    assert session.sparsity == 0.0
    text = Path(recipe_path(name)).read_text()
    assert all(f"sections.{block}.point.conv.weight" in text for block in ("1.0", "2.1", "3.5", "4.1"))


@pytest.mark.parametrize("how", ["plain", "compiled", "accumulated", "scaled", "groups"])
def test_training_loops(how):
    """A recipe with every construct gives the same in all of them (accumulated: in half as many steps)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = torch.compile(net, backend="eager") if how == "compiled" else net
    groups = [{"params": [p]} for p in net.parameters()] if how == "groups" else net.parameters()
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = Manager.from_recipe(ORIGINALS / "everything.yaml")
    data = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(8)]
    session = manager.apply(model, optimizer, data, F.cross_entropy)
    every = 2 if how == "accumulated" else 1
    for step in range(48):
        inputs, targets = data[step % 8]
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "scaled"):
            loss = F.cross_entropy(model(inputs).float(), targets)
        scaler.scale(loss / every).backward()
        if (step + 1) % every == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            session.step((step + 1) / 8)
    assert session.sparsity == pytest.approx(96 / 144)
    assert sum(int((net[i].weight == 0).sum()) for i in (0, 2)) == 96
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001] * len(optimizer.param_groups))
    assert all(name.count("_orig_mod") == 0 for name in session.masks)


def test_an_update_at_every_step(model):
    session, _ = apply((PRUNING % "GMPruningModifier").replace("update_frequency: 0.5", "update_frequency: -1"), model)
    made = [len(session.step((step + 1) / 8)) for step in range(24)]
    assert made == [0] * 7 + [1] * 9 + [0] * 8 and session.sparsity == 0.75
