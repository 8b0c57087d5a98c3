"""Expressions in recipes: results and errors."""

import pytest

from mfac.recipe import Manager, load_recipe


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
        ("missing", r"variable: expected one that the recipe defines \(a, b, names\), got 'missing'"),
        ("a", "variable: expected acyclic references, got a -> b -> a"),
        ("__import__('os').getcwd()", "expected only numbers, variable names, .*, got Call"),
        ("(lambda: 1)()", "expected only numbers, variable names, .*, got Call"),
        ("a.b", "expected only numbers, variable names, .*, got Attribute"),
        ("[1][0]", "expected only numbers, variable names, .*, got Subscript"),
        ("1 / 0", r"eval\(1 / 0\): expected a computable expression, got an error: division by zero"),
        ("9 ** 9 ** 9", "expected exponents from -100 to 100, got 387420489"),
        ("9 ** 99 * 9", "expected numbers of at most 1e.15, got a larger one"),
        ("1 +", "expected a valid expression, got an error: invalid syntax"),
        ("'1' * 3", "expected numbers, got '1'"),
        ("names", "end_epoch: expected a number, got"),
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


def test_a_recipe_without_variables():
    message = r"line 2: !SetLearningRateModifier: learning_rate: variable: expected .* \(there is none\), got 'final'"
    with pytest.raises(ValueError, match=message):
        load_recipe("modifiers:\n  - !SetLearningRateModifier {learning_rate: eval(final)}")


STAGED = """
end: 100
half: eval(end / 2)
stage:
  end_of_all: eval(end)
  end: 75
  after: eval(end + 1)
  modifiers:
    - !Any {end: eval(end), all: eval(end_of_all), half: eval(half), after: eval(after)}
"""


def test_variables_of_a_stage():
    """They shadow those of the recipe, but a bare name in a variable is the recipe's, as are the names in its own."""
    assert load_recipe(STAGED).items[0].arguments == {"end": 75, "all": 100, "half": 50, "after": 76}
    text = "rate: 0.5\nstage:\n  rate: eval(rate)\n  modifiers:\n    - !Any {rate: eval(rate)}\n"
    assert load_recipe(text).items[0].arguments == {"rate": 0.5}
    with pytest.raises(ValueError, match="variable: expected acyclic references, got b -> c -> b"):
        load_recipe("a: 1\nstage:\n  b: eval(c)\n  c: eval(b)\n  modifiers:\n    - !Any {x: eval(b)}\n")
    with pytest.raises(ValueError, match=r"variable: expected .* \(a, b\), got 'bb'; did you mean 'b'"):
        load_recipe("a: 1\nstage:\n  b: 2\n  modifiers:\n    - !Any {x: eval(bb)}\n")
