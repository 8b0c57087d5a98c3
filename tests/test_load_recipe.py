"""Recipes: reading files and text, variables, stages, errors."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mfac.recipe import Manager, load_recipe

EVERYTHING = Path(__file__).parent / "recipes" / "everything.yaml"
WORDS = [
    "eval(", ")", "&a ", "*a", "!", "- !", "{", "}", "[", "]", ": ", "\n", "\n  ", "---\n", "1e-7", "1:30",
    "re:(", "|", ">", "~", "'", '"', "#", "%", "<<: *a", "__ALL__", "__FROM_PARAM__", "modifiers:", "-1",
    ".inf", "\t", "\x85", "2:4", "True", "null", "-", "0", "lr_kwargs: {}", "final_sparsity: {0.5: [a]}", "9" *
    30,
]  # fmt: skip


@st.composite
def mutated(draw):
    """The recipe with every construct, with a few pieces of it cut out, repeated, swapped or replaced by words."""
    text = EVERYTHING.read_text()
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.just(text[start:end] * 2), st.just("")))
        text = text[:start] + piece + text[end:]
    return text


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


def test_metadata_of_stages_is_kept():
    stages = "__metadata__: {author: me}\n"
    for name in ("first", "second"):
        stages += (
            f"{name}:\n  __metadata__: {{run: {name}}}\n  modifiers:\n    - !EpochRangeModifier {{end_epoch: 1}}\n"
        )
    recipe = load_recipe(stages)
    assert recipe.metadata == {
        "__metadata__": {"author": "me"},
        "first": {"run": "first"},
        "second": {"run": "second"},
    }
    assert load_recipe(str(recipe)).metadata == recipe.metadata


@pytest.mark.parametrize(
    "entry",
    [
        "MFACPruningModifier:\n      params: [a]",
        "MFACPruningModifier: {params: [a]}",
        "MFACPruningModifier {}",
        "MFACPruningModifier",
        "[1]",
    ],
)
def test_an_entry_without_its_tag_is_named(entry):
    message = "YAML tags, `- !MFACPruningModifier`, got `MFACPruningModifier` without the `!`"
    message = r"such as `- !EpochRangeModifier`, got \[1\]" if entry == "[1]" else message
    group = f"x_modifiers:\n  - !EpochRangeModifier {{end_epoch: 1}}\n  - {entry}\n"
    with pytest.raises(ValueError, match=f"recipe line 3: x_modifiers: expected .*{message}"):
        load_recipe(group)
    with pytest.raises(ValueError, match=f"recipe line 5: x_modifiers: expected .*{message}"):
        load_recipe("a: 1\nstage:\n  " + group.replace("\n", "\n  "))


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
        (
            "s:\n  x_modifiers:\n    GPTQModifier: {sparsity: 0.5}\n",
            "line 3: x_modifiers: .*without the `!`.*another program",
        ),
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


FENCED = """# Recipes

## The baseline

```yaml
modifiers:
  - !EpochRangeModifier {end_epoch: 1}
```

    python train.py  # no recipe

```bash
ls
```

## Ours

~~~
---
end: 2
modifiers:
  - !EpochRangeModifier {end_epoch: eval(end)}
  - !SetLearningRateModifier {learning_rate: fast}
---
~~~
"""


def test_fenced_recipes_of_a_markdown_file(tmp_path):
    path = tmp_path / "doc.md"
    path.write_text(FENCED)
    assert load_recipe(f"{path}#1").items[0].arguments == {"end_epoch": 1}
    assert load_recipe(f"{path}#2", "end=3").items[0].arguments == {"end_epoch": 3}
    several = (
        r"doc.md: expected the number of one of its recipes, got several: .*doc.md#1 \(line 6: The baseline\), .*#2"
    )
    with pytest.raises(ValueError, match=several):
        load_recipe(path)
    with pytest.raises(ValueError, match=r"doc.md: expected 3 fenced recipes or more, got 2"):
        load_recipe(f"{path}#3")
    with pytest.raises(ValueError, match=r"doc.md line 23: !SetLearningRateModifier: learning_rate: expected a number"):
        Manager.from_recipe(f"{path}#2")
    path.write_text(FENCED.split("## Ours")[0])
    assert load_recipe(path).items[0].arguments == {"end_epoch": 1}


def test_what_is_given_twice():
    """The later one counts, as in the original program; where they differ, that is said."""
    text = "a: &a 1\nb: 2\na: &a 1\nmodifiers:\n  - !EpochRangeModifier {end_epoch: *a}\n"
    assert load_recipe(text).items[0].arguments == {"end_epoch": 1}
    with pytest.warns(UserWarning, match="recipe line 3: 'a' is given again, with another value than in line 1"):
        assert load_recipe(text.replace("a: &a 1\nm", "a: &a 3\nm")).items[0].arguments == {"end_epoch": 3}
    text = "modifiers:\n" + 3 * "  - !GMPruningModifier {mask_type: unstructured, mask_type: [1, 4]}\n"
    with pytest.warns(
        UserWarning, match=r"recipe line 2: 'mask_type' .* line 2, and 2 such more; the later one counts"
    ):
        assert {str(item.arguments) for item in load_recipe(text).items} == {"{'mask_type': [1, 4]}"}


@pytest.mark.parametrize(
    ("argument", "line"),
    [("damp: x", 4), ("num_grads: 1.5", 4), ("mask_type: 5:4", 4), ("dampp: 1", 4), ("params: [1]", 4)],
)
def test_errors_give_file_and_line_of_the_argument(tmp_path, argument, line):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"modifiers:\n  - !MFACPruningModifier\n    end_epoch: 1\n    {argument}\n    final_sparsity: 0.5\n"
        + ("" if "params" in argument else "    params: __ALL__\n")
    )
    with pytest.raises(ValueError, match=f"{path} line {line}: !MFACPruningModifier: "):
        Manager.from_recipe(path)


def test_a_recipe_written_back_means_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = load_recipe(EVERYTHING, "num_epochs=7")
        again = load_recipe(str(recipe))
        assert [(i.name, i.arguments) for i in again.items] == [(i.name, i.arguments) for i in recipe.items]
        assert again.metadata == recipe.metadata
        first, second = Manager.from_recipe(EVERYTHING, "num_epochs=7"), Manager.from_recipe(str(recipe))
    assert [repr(a) for a in first.modifiers] == [repr(b) for b in second.modifiers]


def test_every_construct_runs_to_the_end():
    """And reaches the sparsities that it asks for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager = Manager.from_recipe(EVERYTHING)
    assert sorted(str(w.message).split("!")[-1] for w in caught) == [
        "DistillationModifier neither prunes nor trains; it is skipped",
        "QuantizationModifier neither prunes nor trains; it is skipped",
        "use_gradient_buffering and grad_sampler_kwargs have no effect: gradients come from the batches given to "
        "Manager.apply",
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    session = manager.apply(model, optimizer, batches, F.cross_entropy)
    rates, sparsities = [], {}
    for step in range(48):
        inputs, targets = batches[step % 8]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        session.step((step + 1) / 8)
        rates.append(optimizer.param_groups[0]["lr"])
        sparsities[(step + 1) / 8] = [float((model[i].weight == 0).float().mean()) for i in (0, 2)]
    assert rates[6] == 0.05 and rates[23] == pytest.approx(0.08) and rates[-1] == pytest.approx(0.001)
    assert sparsities[0.5][0] == round(64 * 0.25 * (1 - 0.75 ** (1 / 3))) / 64
    assert sparsities[2.0] == [0.25, 0.4375]  # the second: 7/8 of the way, in blocks of 4
    assert sum(sparsities[6.0]) / 2 == 0.75
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert session.sparsity == pytest.approx(96 / 144)


@settings(
    max_examples=int(os.environ.get("MFAC_FUZZ", "60")),
    deadline=1000 if "MFAC_FUZZ" in os.environ else None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_text_gives_another_error(data):
    """MFAC_FUZZ=10000 runs as many cases; a recipe is an error of its own kind, within a second, or loads."""
    text = data.draw(mutated())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Manager.from_recipe(text)
        except ValueError as error:
            assert len(str(error)) < 3000
