"""Recipes: reading, variables, errors, and what a session does to model and optimizer."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mfac
from mfac.recipe import Manager, load_recipe
from mfac.recipe.modifiers import MODIFIERS
from mfac.tutorial.demo import recipe_path
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNING = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 3}
  - !%s
    params: [0.weight]
    init_sparsity: 0.25
    final_sparsity: 0.75
    start_epoch: 1.0
    end_epoch: 2.0
    update_frequency: 0.5
    inter_func: linear
"""

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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "end: 2\nmodifiers:\n  - !EpochRangeModifier {end_epoch: eval(end)}\n"),
        ("a.yml", "---\nend: 2\nx_modifiers_y:\n  - !EpochRangeModifier {end_epoch: eval(end)}\n"),
        (
            "a.md",
            "<!-- a --- b -->\n---\nend: 2\nmodifiers:\n"
            "  - !EpochRangeModifier {end_epoch: eval(end)}\n---\nText\n---\n",
        ),
        ("a.md", "+++\nend: 2\nmodifiers:\n  - !EpochRangeModifier {end_epoch: eval(end)}\n+++\n"),
    ],
)
def test_reads_files_and_text(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    for source in (path, str(path), text):
        assert Manager.from_recipe(source).epochs == 2
    assert Manager.from_recipe(path, {"end": 5}).epochs == 5
    assert Manager.from_recipe(path, "end=1.5").epochs == 1.5
    assert Manager.from_recipe(path, '{"end": 4}').epochs == 4


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a", 3),
        ("a + b * 2", 11.0),
        ("-(a - 1) ** 2 / 8", -0.5),
        ("7 // 2 % 2", 1),
        ("max(1, round(2.6), abs(-2), int(2.9))", 3),
        ("names", ["x", "y"]),
    ],
)
def test_expressions(expression, expected):
    text = f"a: 3\nb: eval(a + 1.0)\nnames: [x, y]\nmodifiers:\n  - !Any {{value: 'eval({expression})'}}"
    assert load_recipe(text).items[0].arguments["value"] == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("missing", "unknown recipe variable 'missing'"),
        ("a", "in a circle: a -> b -> a"),
        ("__import__('os').getcwd()", "only numbers, variable names"),
        ("(lambda: 1)()", "only numbers, variable names"),
        ("a.b", "only numbers, variable names"),
        ("[1][0]", "only numbers, variable names"),
        ("1 / 0", r"eval\(1 / 0\) cannot be computed: division by zero"),
        ("9 ** 9 ** 9", "exponent .* is larger than 100"),
        ("9 ** 99 * 9", "a number is larger than 1e"),
        ("1 +", "cannot be computed"),
        ("'1' * 3", "expected numbers, got '1'"),
        ("names", "end_epoch must be a number, at least -1, got"),
    ],
)
def test_expression_errors(expression, message):
    text = (
        f"a: eval(b)\nb: eval(a)\nnames: [x]\nmodifiers:\n  - !EpochRangeModifier {{end_epoch: 'eval({expression})'}}"
    )
    if "'" in expression:
        text = text.replace(f"'eval({expression})'", f'"eval({expression})"')
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe(text)


def test_stages_shadow_variables_and_metadata_is_kept():
    recipe = load_recipe("""
end: 1
__metadata__: {author: me}
first_stage:
  end: 2
  training_modifiers:
    - !EpochRangeModifier {end_epoch: eval(end)}
second_stage:
  modifiers:
    - !EpochRangeModifier {end_epoch: eval(end)}
""")
    assert [item.arguments["end_epoch"] for item in recipe.items] == [2, 1]
    assert recipe.metadata == {"author": "me"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no/such.yaml", "no recipe file at no/such.yaml"),
        ("just words", "expected a recipe .* got 'just words'"),
        ("a: [1", "not valid YAML"),
        ("a: 1\nb: 2", "holds no modifiers"),
        ("modifiers: []", "holds no modifiers"),
        ("modifiers: 3", "modifiers must be a list"),
        ("modifiers:\n  - !EpochRangeModifier [1]", "line 2: !EpochRangeModifier must be followed by"),
        ("s:\n  x_modifiers:\n    GPTQModifier: {sparsity: 0.5}\n", "without the `!`.*another program"),
        (
            "modifiers:\n  - !MFACPrunningModifier {}",
            "line 2: !MFACPrunningModifier is not .*mean 'MFACPruningModifier'",
        ),
        ("modifiers:\n  - !!python/object:os.system {}", "not valid YAML"),
        ("modifiers:\n  - !EpochRangeModifier {}", "the argument 'end_epoch' is missing"),
        ("modifiers:\n  - !EpochRangeModifier {end_epoch: 1, start_epoch: 2}", "end_epoch 1 is before start_epoch 2"),
        ("modifiers:\n  - !EpochRangeModifier {end_epochs: 1}", "unknown argument 'end_epochs' .*mean 'end_epoch'"),
        (
            "modifiers:\n  - !SetLearningRateModifier {learning_rate: fast}",
            "learning_rate must be a number, at least 0, got 'fast'",
        ),
    ],
)
def test_recipe_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.75", "1.2", "final_sparsity must be a number between 0 and 1, got 1.2"),
        ("0.25", "-1", "init_sparsity must be a number between 0 and 1, got -1"),
        ("0.5", "0", "update_frequency must be a finite number above 0"),
        ("linear", "square", "inter_func must be one of linear, cubic, inverse_cubic, got 'square'"),
        ("[0.weight]", "[]", "params must name the weights"),
        ("0.75", "{0.75: [2.weight]}", "needs `params: \\[\\]`"),
        ("linear", "linear\n    mask_type: 4:2", "mask_type must be unstructured, block4, .* 1 <= N < M .*, got '4:2'"),
        ("linear", "linear\n    mask_type: filter", "mask_type must be unstructured, block4, .*, got 'filter'"),
        ("linear", "linear\n    num_substeps: 0", "num_substeps must be a number, at least 1, got 0"),
        ("linear", "linear\n    damp: 1*men", "damp must be a number, at least 0, got '1[*]men'"),
        ("linear", "linear\n    leave_enabled: false", "leave_enabled must be True"),
        ("linear", "linear\n    damp: 0", "damp must be a finite number above 0"),
        ("linear", "linear\n    num_grads: 1.5", "num_grads must be a whole number, got 1.5"),
        ("linear", "linear\n    num_grads: {0.0: 64}", "num_grads must be a whole number"),
        ("linear", "linear\n    update: both", "update must be one of joint, independent, none, got 'both'"),
        ("linear", "linear\n    dampp: 1", "unknown argument 'dampp' .*mean 'damp'"),
    ],
)
def test_pruning_errors(old, new, message):
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe((PRUNING % "MFACPruningModifier").replace(old, new))


def test_recipe_args_errors():
    for arguments, message in [("ends=1", "names 'ends'.*'end'"), ("end", "JSON or"), ("{end", "not valid JSON")]:
        with pytest.raises(ValueError, match=message):
            load_recipe("end: 2\nmodifiers:\n  - !EpochRangeModifier {end_epoch: eval(end)}", arguments)


def test_numbers_written_as_strings():
    text = (PRUNING % "MFACPruningModifier") + "    damp: 1e-7\n    fisher_block_size: null\n"
    modifier = Manager.from_recipe(text).modifiers[1]
    assert modifier.damp == 1e-7
    assert modifier.fisher_block_size is None


def test_legacy_options():
    text = (PRUNING % "MFACGlobalPruningModifier") + "    mfac_options: {num_grads: 8, fisher_block_size: 50}\n"
    modifier = Manager.from_recipe(text).modifiers[1]
    assert (modifier.num_grads, modifier.fisher_block_size, modifier.global_sparsity) == (8, 50, True)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("", None),
        ("    grads_device: cpu\n", "cpu"),
        ("    grads_device: 'cuda:0'\n", None),
        ("    num_pages: 1\n", None),
        ("    num_pages: 4\n", "cpu"),
    ],
)
def test_where_gradients_are_kept(written, kept):
    modifier = Manager.from_recipe((PRUNING % "MFACPruningModifier") + written).modifiers[1]
    assert modifier.options()["grads_device"] == kept
    with pytest.raises(ValueError, match="grads_device must be cpu, cuda or cuda:<index>, got 'disk'"):
        Manager.from_recipe((PRUNING % "MFACPruningModifier") + "    grads_device: disk\n")


@pytest.mark.parametrize(
    ("written", "pattern"),
    [("2:4", "2:4"), ("'2:4'", "2:4"), ("1:4", "1:4"), ("tensorrt", "2:4"), ("block4", "block4"), ("[2, 4]", [2, 4])],
)
def test_mask_type(written, pattern):
    """Also where YAML reads 2:4 as a number of base 60; the Pruner that comes of it prunes by it."""
    text = (PRUNING % "GMPruningModifier") + f"    mask_type: {written}\n"
    modifier = Manager.from_recipe(text).modifiers[1]
    assert modifier.mask_type == pattern
    modifier.final_sparsity = 0.5
    net = nn.Sequential(nn.Linear(8, 8))
    modifier.pruner(net, None, None, 3.0, False, one_shot=True).step()
    expected = copy.deepcopy(net)
    mfac.prune_step(expected, None, 0.5, criterion="magnitude", pattern=pattern)
    assert torch.equal(net[0].weight, expected[0].weight) and int((net[0].weight == 0).sum()) in (32, 33)


def test_other_work_is_left_out():
    text = (PRUNING % "GMPruningModifier") + "  - !QuantizationModifier {start_epoch: 1}\n"
    with pytest.warns(
        UserWarning, match="line 12: !QuantizationModifier is neither pruning nor training; it is left out"
    ):
        assert len(Manager.from_recipe(text).modifiers) == 2
    with pytest.raises(ValueError, match="mfac does not run it"):
        Manager.from_recipe(text, strict=True)


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


@pytest.mark.parametrize("name", [name for name in MODIFIERS if "Pruning" in name])
def test_pruning_schedule(model, name):
    extra = "    num_grads: 4\n    num_recomputations: 1\n" if "MFAC" in name else ""
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
    with pytest.raises(ValueError, match="one-shot needs a recipe with a pruning modifier"):
        Manager.from_recipe("modifiers:\n  - !EpochRangeModifier {end_epoch: 2}").one_shot(model)


@pytest.mark.parametrize("init", ["0.0", "0.9"])  # 0.9 is above the final sparsity
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
    with pytest.raises(ValueError, match="param_groups names group 1, but the optimizer has 1"):
        Manager.from_recipe(text).apply(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_length_is_needed(model):
    text = "modifiers:\n  - !SetLearningRateModifier {learning_rate: 0.1}"
    with pytest.raises(ValueError, match="gives no length of training"):
        apply(text, model)


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
    with pytest.raises(ValueError, match="state has 0 pruning modifiers, but this recipe has 1"):
        again.load_state_dict({"pruners": []})


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
        # Training in such long strides that there is one update, to the final sparsity: 8 times the 256 gradients.
        ("original_mfac.md", (2.0, 3.0), [(2.0, 0.96, 0.0)], 8 * 256),
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
