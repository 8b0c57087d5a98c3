"""The arithmetic allowed in a recipe's `eval(...)`: a small interpreter over Python's syntax tree."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

_EVAL = re.compile(r"\s*eval\((.*)\)\s*", re.DOTALL)
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable] = {"abs": abs, "float": float, "int": int, "max": max, "min": min, "round": round}
_LARGEST = 10**15  # no quantity of a recipe is larger; bounds the work that `**` can ask for


def _number(value: Any, text: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"eval({text}): expected numbers, got {value!r}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"eval({text}): a number is larger than {_LARGEST:.0e}")
    return value


def _evaluate(node: ast.AST, text: str, lookup: Callable[[str], Any]) -> int | float:
    def number(child: ast.AST) -> int | float:
        return _number(_evaluate(child, text, lookup), text)

    match node:
        case ast.Constant():
            return _number(node.value, text)
        case ast.Name():
            return lookup(node.id)
        case ast.UnaryOp(op=ast.USub()):
            return -number(node.operand)
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            left, right = number(node.left), number(node.right)
            if isinstance(op, ast.Pow) and abs(right) > 100:
                raise ValueError(f"eval({text}): the exponent {right} is larger than 100")
            return _OPERATORS[type(op)](left, right)
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*[number(argument) for argument in node.args])
    raise ValueError(
        f"eval({text}): only numbers, variable names, + - * / // ** %, and {', '.join(_FUNCTIONS)} are allowed"
    )


def evaluate(value: Any, lookup: Callable[[str], Any]) -> Any:
    """Return `value` with `eval(...)` replaced by its result; a string counts only if `eval(...)` is the whole of it.

    Args:
        value: A value read from YAML: strings are looked at, lists and dicts are searched.
        lookup: Gives the value of a variable; a bare variable name passes anything through, also lists and strings.

    Returns:
        The value, of the same structure.

    Raises:
        ValueError: If an expression is not arithmetic, or cannot be computed.

    Example:
        >>> evaluate(["eval(2 * end + 1)", "as it is"], {"end": 3}.get)
        [7, 'as it is']
    """
    if isinstance(value, list):
        return [evaluate(item, lookup) for item in value]
    if isinstance(value, dict):
        return {evaluate(key, lookup): evaluate(item, lookup) for key, item in value.items()}
    found = _EVAL.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    text = found.group(1).strip()
    try:
        tree = ast.parse(text, mode="eval").body
        result = _evaluate(tree, text, lookup)
    except (SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"eval({text}) cannot be computed: {error}") from error
    return result if isinstance(tree, ast.Name) else _number(result, text)
