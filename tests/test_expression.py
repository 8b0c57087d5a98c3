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
        ("missing", "variable: expected one of a, b, names, got 'missing'"),
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
