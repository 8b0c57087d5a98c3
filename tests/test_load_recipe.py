"""Recipes: reading files and text, variables, stages, errors."""

import pytest

from mfac.recipe import Manager, load_recipe


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
        ("no/such.yaml", "recipe: expected an existing file, got no/such.yaml; the tutorial's recipes are in "),
        ("just words", "expected a recipe .* got 'just words'"),
        ("a: [1", "recipe line 1: expected valid YAML, got an error: .*expected ',' or"),
        ("a: 1\nb: 2", "recipe: expected modifiers, .* got none"),
        ("modifiers: []", "recipe: expected modifiers, .* got none"),
        ("modifiers: 3", "modifiers: expected a list of modifiers .*, got 3"),
        (
            "modifiers:\n  - !EpochRangeModifier [1]",
            "recipe line 2: expected `name: value` arguments after !EpochRangeModifier, got a sequence",
        ),
        ("s:\n  x_modifiers:\n    GPTQModifier: {sparsity: 0.5}\n", "without the `!`.*another program"),
        (
            "modifiers:\n  - !MFACPrunningModifier {}",
            "line 2: !MFACPrunningModifier: expected one of .*mean 'MFACPruningModifier'",
        ),
        ("modifiers:\n  - !!python/object:os.system {}", "recipe line 2: expected valid YAML, got an error"),
        (
            "modifiers:\n  - !EpochRangeModifier {}",
            "recipe line 2: !EpochRangeModifier: end_epoch: expected a value, got none",
        ),
        (
            "modifiers:\n  - !EpochRangeModifier {end_epoch: 1, start_epoch: 2}",
            "end_epoch: expected >= start_epoch = 2, got 1",
        ),
        (
            "modifiers:\n  - !EpochRangeModifier {end_epochs: 1}",
            "argument: expected one of .*, got 'end_epochs'; did you mean 'end_epoch'",
        ),
        (
            "modifiers:\n  - !SetLearningRateModifier {learning_rate: fast}",
            "learning_rate: expected a number, got 'fast'",
        ),
    ],
)
def test_recipe_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Manager.from_recipe(text)


def test_recipe_args_errors():
    for arguments, message in [
        ("ends=1", r"recipe_args: expected variables of the recipe \(end\), got 'ends'"),
        ("end", "recipe_args: expected JSON or .*, got 'end'"),
        ("{end", "recipe_args: expected valid JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe("end: 2\nmodifiers:\n  - !EpochRangeModifier {end_epoch: eval(end)}", arguments)
