"""Modifiers: their arguments, as recipes write them, and what becomes of them."""

import copy

import pytest
import torch
from pruning_recipe import PRUNING
from torch import nn

import mfac
from mfac.pruning.settings import PrunerSettings
from mfac.recipe import Manager
from mfac.recipe.modifiers import Target
from mfac.settings import definitions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.75", "1.2", r"final_sparsity: expected in \[0, 1\], got 1.2"),
        ("0.25", "-1", r"init_sparsity: expected in \[0, 1\], got -1"),
        ("0.75", "95", r"final_sparsity: expected in \[0, 1\], got 95 \(95 % is 0.95\)"),
        ("0.25", "12.5", r"init_sparsity: expected in \[0, 1\], got 12.5 \(12.5 % is 0.125\)"),
        (
            "0.25",
            "0.8",
            "recipe line 6: .*: init_sparsity: expected at most final_sparsity = 0.75, because .*, got 0.8",
        ),
        ("0.5", "0", "update_frequency: expected > 0, got 0"),
        ("linear", "square", "inter_func: expected one of linear, cubic, inverse_cubic, got 'square'"),
        ("[0.weight]", "[]", "params: expected names of the weights"),
        ("0.75", "{0.75: [2.weight]}", "needs `params: \\[\\]`"),
        ("linear", "linear\n    mask_type: 4:2", "mask_type: expected N:M with 1 <= N < M .*, got '4:2'"),
        ("linear", "linear\n    mask_type: filter", "mask_type: expected 'unstructured', .*, got 'filter'; tensorrt"),
        ("linear", "linear\n    substeps: 0", "substeps: expected an int 1 to 10000 or 'auto', got 0"),
        ("linear", "linear\n    damp: 1*men", "damping: expected a number in .* got '1[*]men'"),
        ("linear", "linear\n    leave_enabled: perhaps", "leave_enabled: expected true or false, got 'perhaps'"),
        ("0.25", "__FROM_WEIGHTS__", "init_sparsity: expected a number, got '__FROM_WEIGHTS__'"),
        ("linear", "linear\n    damp: 0", "damping: expected a number in .*, got 0"),
        ("linear", "linear\n    damp: .nan", "damping: expected a number in .*, got nan"),
        ("linear", "linear\n    damp: true", "damping: expected a number, got True"),
        ("linear", "linear\n    damp: -1*mean", "damping: expected"),
        ("2.0", ".inf", "end_epoch: expected >= -1, got inf"),
        ("linear", "linear\n    mask_type: true", "mask_type: expected 'unstructured', .*, got True"),
        ("linear", "linear\n    mask_type: 0", "mask_type: expected 'unstructured', .*, got 0"),
        ("linear", "linear\n    global_sparsity: 'no'", "global_sparsity: expected true or false, got 'no'"),
        ("linear", "linear\n    score_type: movement", "score_type: expected one of MFAC, got 'movement'"),
        ("linear", "linear\n    num_grads: 4\n    refresh: 5", "refresh: expected an int 1 to 4, got 5"),
        ("linear", "linear\n    refresh: 0", "refresh: expected an int >= 1, got 0"),
        ("linear", "linear\n    mfac_options: [1]", r"mfac_options: expected a mapping, got \[1\]"),
        ("[0.weight]", "[1]", r"params: expected a name or a list of names, got \[1\]"),
        ("linear", "linear\n    num_grads: 1.5", "num_grads: expected an int, got 1.5"),
        ("linear", "linear\n    num_grads: {0.5: 64}", "num_grads: expected {sparsity: number} with the sparsity 0.0"),
        ("linear", "linear\n    num_grads: {0.0: many}", "num_grads: expected an int, got 'many'"),
        ("linear", "linear\n    num_grads: {0.0: 8, 0.5: 4}\n    refresh: 5", "refresh: expected an int 1 to 4, got 5"),
        ("linear", "linear\n    update: both", "update: expected one of joint, independent, none, auto, got 'both'"),
        ("linear", "linear\n    dampp: 1", "argument: expected one of .*, got 'dampp'.*mean 'damp'"),
    ],
)
def test_pruning_errors(old, new, message):
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe((PRUNING % "MFACPruningModifier").replace(old, new))


def test_numbers_written_as_strings():
    text = (PRUNING % "MFACPruningModifier") + "    damp: 1e-7\n    fisher_block_size: null\n"
    modifier = Manager.from_recipe(text).modifiers[1]
    assert modifier.settings["damping"] == 1e-7
    assert modifier.settings["block_size"] is None


def test_legacy_options():
    text = (PRUNING % "MFACGlobalPruningModifier") + "    mfac_options: {num_grads: 8, fisher_block_size: 50}\n"
    modifier = Manager.from_recipe(text).modifiers[1]
    assert (modifier.settings["num_grads"], modifier.settings["block_size"], modifier.global_sparsity) == (8, 50, True)


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
    assert modifier.settings["grads_device"] == kept
    with pytest.raises(ValueError, match=r"grads_device: expected cpu, disk, .* or cuda:<index>, got 'tpu'"):
        Manager.from_recipe((PRUNING % "MFACPruningModifier") + "    grads_device: tpu\n")


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
    modifier.bind(Target(net, None, None, None, 3.0, False, one_shot=True)).step(0.0, 0.0)
    expected = copy.deepcopy(net)
    mfac.prune_step(expected, None, 0.5, criterion="magnitude", pattern=pattern)
    assert torch.equal(net[0].weight, expected[0].weight) and int((net[0].weight == 0).sum()) in (32, 33)


def test_other_work_is_left_out():
    text = (PRUNING % "GMPruningModifier") + "  - !QuantizationModifier {start_epoch: 1}\n"
    with pytest.warns(UserWarning, match="line 12: !QuantizationModifier neither prunes nor trains; it is skipped"):
        assert len(Manager.from_recipe(text).modifiers) == 2
    with pytest.raises(
        ValueError, match=r"line 12: .*: expected modifiers that prune or train, got one that mfac does not run"
    ):
        Manager.from_recipe(text, strict=True)


@pytest.mark.parametrize(
    ("final", "message"),
    [
        ("{0.5: [0.weight], 0.9: [0.weight]}", "final_sparsity: expected each name once, got '0.weight' again"),
        ("{0.5: []}", "final_sparsity: expected a number or {sparsity: .params.}, got {0.5: ..}"),
        ("{}", "final_sparsity: expected a number or"),
        ("{high: [0.weight]}", "final_sparsity: expected a number, got 'high'"),
    ],
)
def test_sparsity_by_layer_errors(final, message):
    text = (PRUNING % "GMPruningModifier").replace("0.75", final).replace("[0.weight]\n    init", "[]\n    init")
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe(text)


@pytest.mark.parametrize("name", ["corrections", "final_corrections", "correction_batches", "num_grads"])
def test_magnitude_takes_no_settings_of_gradients(name):
    with pytest.raises(ValueError, match=name):
        Manager.from_recipe((PRUNING % "MagnitudePruningModifier") + f"    {name}: 1\n")


@pytest.mark.parametrize("groups", ["0", "[x]", "[-1]", "[true]", "[0.5]"])
def test_group_errors(groups):
    text = f"modifiers:\n  - !SetLearningRateModifier {{learning_rate: 1, param_groups: {groups}}}\n"
    with pytest.raises(ValueError, match="line 2: !SetLearningRateModifier: param_groups: expected"):
        Manager.from_recipe(text)


def test_what_a_recipe_leaves_open_has_the_defaults_of_the_package():
    """And what it says counts to the letter; one line says which."""
    text = (PRUNING % "MFACPruningModifier") + "    num_grads: 64\n    damp: 1e-5\n"
    manager = Manager.from_recipe(text)
    modifier = manager.modifiers[-1]
    assert (modifier.settings["damping"], modifier.settings["num_grads"]) == (1e-5, 64)
    defaults = definitions(PrunerSettings)
    for name in ("block_size", "substeps"):
        assert modifier.settings[name] == defaults[name].default
    different = {name: modifier.settings[name] for name in ("refresh", "corrections", "update")}
    assert different == {"refresh": 4, "corrections": None, "update": "auto"}
    (line,) = manager.describe()
    assert line.startswith("MFACPruning: of the recipe damping=1e-05, num_grads=64; by default recomputations=auto, ")
    assert "block_size=512" in line and "substeps=auto" in line
    assert Manager.from_recipe(PRUNING % "MagnitudePruningModifier").describe() == []


@pytest.mark.parametrize("written", ["", "    update: joint\n"])
def test_one_shot_updates_are_joint(written):
    """There is no training that would make up for an update that is left out, however small the step."""
    torch.manual_seed(0)
    first, batches = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), [(torch.randn(4, 8), torch.randint(2, (4,)))] * 9
    second = copy.deepcopy(first)
    text = (PRUNING % "MFACPruningModifier").replace("final_sparsity: 0.75", "final_sparsity: 0.3")
    assert "0.3" in text
    text += "    num_grads: 8\n    corrections: 0\n"
    manager = Manager.from_recipe(text + written)
    manager.one_shot(first, batches, nn.functional.cross_entropy)
    assert "update=joint" in manager.describe(one_shot=True)[0]
    Manager.from_recipe(text + "    update: none\n").one_shot(second, batches, nn.functional.cross_entropy)
    kept = first[0].weight != 0
    assert not torch.equal(first[0].weight[kept], second[0].weight[kept])


@pytest.mark.parametrize(
    ("written", "batches"), [("", 8 + 1 + 1), ("    refresh: 8\n", 3 * 8), ("    refresh: 3\n", 8 + 3 + 3)]
)
def test_refresh(written, batches):
    """Of m = 8 gradients, how many are new at each of the recomputations after the first."""
    text = (PRUNING % "MFACPruningModifier") + "    num_grads: 8\n    recomputations: 3\n    corrections: 0\n" + written
    drawn = []
    stream = (drawn.append(i) or (torch.randn(4, 8), torch.randint(2, (4,))) for i in range(100))
    Manager.from_recipe(text).one_shot(nn.Sequential(nn.Linear(8, 2)), stream, nn.functional.cross_entropy)
    assert len(drawn) == batches


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("LayerPruningModifier", "removes whole layers"),
        ("pytorch.StructuredPruningModifier", "removes whole filters or channels"),
        ("ASRegModifier", "regularises activations"),
    ],
)
def test_modifiers_that_do_something_else_have_no_stand_in(name, does):
    with pytest.raises(ValueError, match=f"line 2: !{name}: expected a modifier that mfac runs, got one that {does}"):
        Manager.from_recipe(f"modifiers:\n  - !{name} {{}}")
    with pytest.raises(ValueError, match=r"got an unknown modifier$"):
        Manager.from_recipe("modifiers:\n  - !SpreadPruningModifier {}")


LATE = (PRUNING % "GMPruningModifier").replace("end_epoch: 2.0", "end_epoch: 5.0")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", r"will end at a sparsity of 50.0 %, not 75.0 %, got 5"),
        ("0.25", "__FROM_PARAM__", r"will end below the sparsity of 75.0 % that it asks for, got 5"),
        ("params: [0.weight]", "params: []", r"will end at a sparsity of 50.0 to 55.0 %, not 75.0 to 85.0 %, got 5"),
        ("start_epoch: 1.0", "start_epoch: 4.0", r"will end at a sparsity of 0.0 %, not 75.0 %, got 5"),
    ],
)
def test_an_end_after_that_of_training(old, new, message):
    text = LATE.replace(old, new)
    if "[]" in text:
        text = text.replace("final_sparsity: 0.75", "final_sparsity: {0.85: [2.weight], 0.75: [0.weight]}")
    message = (
        f"recipe line 4: !GMPruningModifier: end_epoch: expected at most the 3 epochs of training, which {message}"
    )
    with pytest.warns(UserWarning, match=message):
        Manager.from_recipe(text)
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe(text, strict=True)


def test_a_sparsity_of_one_is_said():
    text = (PRUNING % "GMPruningModifier").replace("0.75", "1.0")
    with pytest.warns(
        UserWarning, match="line 4: !GMPruningModifier: final_sparsity: expected below 1, which sets every"
    ):
        Manager.from_recipe(text)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "corrections of joint updates"),
        ("update: joint", "a correction at each recomputation"),
        ("update: none", "no corrections"),
        ("corrections: 2", "corrections=2"),
    ],
)
def test_corrections_are_described_in_words(written, said):
    (line,) = Manager.from_recipe((PRUNING % "MFACPruningModifier") + f"    {written}\n").describe()
    assert said in line and "None" not in line
