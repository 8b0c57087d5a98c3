"""The arithmetic allowed in a recipe's `eval(...)`, and the variables it refers to.

A small interpreter over Python's syntax tree, because it must bound the work: of a number, of an expression, of nested
variables and of all expressions together. A general evaluator would need a wrapper around each of its operators and
functions, and still leave nesting and the total unbounded.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from mfac.checks import suggestion
from mfac.recipe.document import MAX_DIGITS

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
_MAX_NUMBER = 10**15  # no quantity of a recipe is larger; bounds the operands of `**`
_MAX_EXPONENT = 100
_MAX_DIGITS = 20  # of round(number, digits), which computes 10**digits
_MAX_CHARS = 1000  # of an expression; bounds the nesting that Python's parser has to follow
_MAX_DEPTH = 50  # of lists, dicts and variables in one another; far below Python's recursion limit
_MAX_WORK = 100_000  # values visited and characters parsed for one recipe; well below a second


def _number(value: Any, text: str) -> int | float:
    """Return `value` if it is a number of reasonable size, else raise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"eval({text}): expected numbers, got {value!r:.80}")
    if not -_MAX_NUMBER <= value <= _MAX_NUMBER:
        raise ValueError(f"eval({text}): expected numbers of at most {_MAX_NUMBER:.0e}, got a larger one")
    return value


def _expression(value: Any) -> str | None:
    """Return what stands in `eval(...)` if that is the whole of a string."""
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("eval(") and value.endswith(")"):
            return value[len("eval(") : -1].strip()
    return None


class Scope:
    """The variables of a recipe or of one of its stages, evaluated when they are used.

    A variable that holds a number or a string is evaluated once. All the work for a recipe, including its stages, is
    counted together and bounded.

    Args:
        variables: Values by name, as read: numbers, strings (also `eval(...)`), lists and dicts.
        outer: The scope around this one; its variables are visible unless shadowed. A variable here that is only the
            name of one there, `eval(name)`, has the value of that one even if the name is shadowed.

    Example:
        >>> scope = Scope({"end": 3, "half": "eval(end / 2)", "names": ["a", "b"]})
        >>> scope.evaluate({"at": "eval(half + 1)", "params": "eval(names)", "text": "as it is"})
        {'at': 2.5, 'params': ['a', 'b'], 'text': 'as it is'}
    """

    def __init__(self, variables: Mapping[Any, Any], outer: Scope | None = None) -> None:
        self._variables, self._outer = dict(variables), outer
        self._work = outer._work if outer else itertools.count(1)
        self._known: dict[str, Any] = {}  # scalar variables evaluated so far; lists are copied, and counted, anew
        self._underway: list[str] = []

    def evaluate(self, value: Any) -> Any:
        """Return `value` with `eval(...)` replaced by its result.

        Args:
            value: A value as read: lists and dicts are searched; a string counts if `eval(...)` is the whole of it.

        Returns:
            A copy of the same structure. A bare variable name gives the variable's value, also a list or a string;
            any other expression gives a number.

        Raises:
            ValueError: If an expression is not arithmetic, refers to an unknown variable or to itself, cannot be
                computed, or if the work for the recipe exceeds its bound.
        """
        try:
            return self._walk(value, 0)
        except RecursionError:
            raise ValueError("recipe: expected simpler expressions, got some nested too deeply") from None

    def _walk(self, value: Any, depth: int) -> Any:
        self._spend(1)
        if depth > _MAX_DEPTH:
            raise ValueError(f"recipe: expected values and variables nested at most {_MAX_DEPTH} deep, got more")
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:  # only from a dict of `recipe_args`
            raise ValueError(f"recipe: expected integers of at most {MAX_DIGITS} digits, got a larger one")
        if isinstance(value, list):
            return [self._walk(item, depth + 1) for item in value]
        if isinstance(value, dict):
            result: dict[Any, Any] = {}
            for key, item in value.items():
                key = self._walk(key, depth + 1)
                if isinstance(key, (list, dict)) or key in result:
                    raise ValueError(f"recipe: expected different numbers or strings as keys, got {key!r:.80}")
                result[key] = self._walk(item, depth + 1)
            return result
        text = _expression(value)
        return value if text is None else self._evaluate(text, depth)

    def _spend(self, amount: int) -> None:
        """Count work, and refuse to go beyond the bound."""
        for total in itertools.islice(self._work, amount):
            if total > _MAX_WORK:
                raise ValueError(f"recipe: expected at most {_MAX_WORK} values (variables filled in), got more")

    def _evaluate(self, text: str, depth: int) -> Any:
        shown = text if len(text) <= 80 else text[:80] + "..."
        if len(text) > _MAX_CHARS:
            raise ValueError(f"eval({shown}): expected at most {_MAX_CHARS} characters, got {len(text)}")
        self._spend(len(text))
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: deep nesting
            reason = str(error) or "nesting that is too deep"
            raise ValueError(f"eval({shown}): expected a valid expression, got an error: {reason}") from error
        try:
            result = self._compute(tree, shown, depth)
        except (ArithmeticError, TypeError, RecursionError) as error:
            raise ValueError(f"eval({shown}): expected a computable expression, got an error: {error}") from error
        return result if isinstance(tree, ast.Name) else _number(result, shown)

    def _compute(self, node: ast.AST, text: str, depth: int) -> Any:
        def number(child: ast.AST) -> int | float:
            value = self._compute(child, text, depth)
            if isinstance(value, str):  # YAML 1.1 reads 1e-7 as a string
                with contextlib.suppress(ValueError):
                    value = float(value)
            return _number(value, text)

        match node:
            case ast.Constant():
                return _number(node.value, text)
            case ast.Name():
                return self._variable(node.id, depth)
            case ast.UnaryOp(op=ast.USub()):
                return -number(node.operand)
            case ast.BinOp(op=op) if type(op) in _OPERATORS:
                left, right = number(node.left), number(node.right)
                if isinstance(op, ast.Pow) and abs(right) > _MAX_EXPONENT:
                    raise ValueError(
                        f"eval({text}): expected exponents from -{_MAX_EXPONENT} to {_MAX_EXPONENT}, got {right}"
                    )
                return _OPERATORS[type(op)](left, right)
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
                arguments = [number(argument) for argument in node.args]
                if name == "round" and any(abs(digits) > _MAX_DIGITS for digits in arguments[1:]):
                    raise ValueError(f"eval({text}): expected at most {_MAX_DIGITS} digits, got {arguments[1]}")
                return _FUNCTIONS[name](*arguments)
        raise ValueError(
            f"eval({text}): expected only numbers, variable names, + - * / // ** %, and {', '.join(_FUNCTIONS)}, got "
            f"{type(node).__name__}"
        )

    def _variable(self, name: str, depth: int) -> Any:
        if name in self._known:
            return self._known[name]
        if name in self._underway:
            circle = " -> ".join([*self._underway, name])
            raise ValueError(f"variable: expected acyclic references, got {circle:.200}")
        outer = self._outer
        if name not in self._variables:
            if outer is not None and name in outer._variables:
                return outer._variable(name, depth)
            known = sorted(map(str, {**self._variables, **(outer._variables if outer else {})}))
            raise ValueError(
                f"variable: expected one that the recipe defines ({', '.join(known) or 'there is none':.200}), got "
                f"{name!r:.80}{suggestion(name, known)}"
            )
        self._underway.append(name)
        try:
            value = self._variables[name]
            bare = _expression(value)
            if outer is not None and bare is not None and bare in outer._variables:
                value = outer._variable(bare, depth + 1)
            else:
                value = self._walk(value, depth + 1)
        finally:
            self._underway.pop()
        if not isinstance(value, (list, dict)):
            self._known[name] = value
        return value
