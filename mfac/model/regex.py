"""Regular expressions for names of parameters, refused if a match could take too long.

Python's matcher tries alternatives one after the other. An expression such as ``(a+)+$`` has exponentially many ways to
match a name, and a recipe that holds it would never end. The number of ways is bounded from above by the lengths that
each part can consume, whatever the characters are: v[j] is the number of ways in which the parts so far consume j
characters. Only ``[^.]*[.]`` and the like are known to match in one way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

_MAX_WAYS = 1e7  # for one name, some tenths of a second; five `.*` in a name of 60 characters stay below
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}
_SINGLE = {"ANY", "IN", "LITERAL", "NOT_LITERAL"}


class _TooMany(Exception):
    """There are more than _MAX_WAYS."""


def compile_regex(name: str, value: str, longest: int) -> re.Pattern[str]:
    """Compile a regular expression.

    Args:
        name: Of the argument, for the error.
        value: The expression, without ``re:``.
        longest: Length of the longest string that it will be matched with.

    Returns:
        The compiled expression.

    Raises:
        ValueError: If it is not a regular expression, or one with too many ways to match a string of that length.

    Example:
        >>> bool(compile_regex("params", "layer[0-9]+[.]conv", 80).match("layer12.conv.weight"))
        True
        >>> compile_regex("params", "(a+)+$", 80)
        Traceback (most recent call last):
            ...
        ValueError: params: expected a regular expression that is quick to match, got ...
    """
    try:
        pattern = re.compile(value)
        _consume(_parser.parse(value), np.eye(1, longest + 1)[0])
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name}: expected a regular expression after re:, got {f're:{value}'!r:.200}: {error}"
        ) from None
    except _TooMany:
        raise ValueError(
            f"{name}: expected a regular expression that is quick to match, got {f're:{value}'!r:.200}, which "
            "nests or repeats repetitions"
        ) from None
    return pattern


def _consume(parts: Sequence[tuple[Any, Any]], v: np.ndarray) -> np.ndarray:
    """The ways after a sequence of parts, from those before it."""
    for index, (op, argument) in enumerate(parts):
        kind = str(op)
        if kind in _SINGLE:
            v = np.append(0, v[:-1])
        elif kind == "SUBPATTERN":
            v = _consume(argument[3], v)
        elif kind == "ATOMIC_GROUP":
            v = _consume(argument, v)
        elif kind == "BRANCH":
            v = sum(_consume(branch, v) for branch in argument[1])
        elif kind == "GROUPREF_EXISTS":
            v = _consume(argument[1], v) + _consume(argument[2] or (), v)
        elif kind == "GROUPREF":  # of any length
            v = np.cumsum(v)
        elif kind in ("ASSERT", "ASSERT_NOT"):
            v = v * max(1, _consume(argument[1], np.eye(1, len(v))[0]).sum())
        elif kind in _REPEATS:
            least, most, body = argument
            v = _repeat(least, least if _is_unique(body, parts[index + 1 :]) else most, body, v)
        if v.sum() > _MAX_WAYS:
            raise _TooMany
    return v


def _repeat(least: int, most: int, body: Any, v: np.ndarray) -> np.ndarray:
    """The ways after a repetition; one that consumes nothing ends it, so that there are as many as characters."""
    total = v if least == 0 else np.zeros_like(v)
    for count in range(1, min(most, len(v)) + 1):
        v = _consume(body, v)
        if count >= min(least, len(v)):
            total = total + v
        if not v.any():
            break
    return total


def _is_unique(body: Sequence[tuple[Any, Any]], following: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a repetition ends where it must, as what is repeated cannot match the punctuation mark that follows."""
    if len(body) != 1 or not following or str(following[0][0]) != "LITERAL":
        return False
    mark, (op, argument) = following[0][1], body[0]
    if chr(mark).isalnum() or chr(mark) == "_":  # could differ by case, or be part of a category
        return False
    if str(op) == "NOT_LITERAL":
        return argument == mark
    if str(op) != "IN":
        return str(op) == "LITERAL" and argument != mark
    negated = str(argument[0][0]) == "NEGATE"
    found = False
    for kind, value in argument[negated:]:
        if str(kind) == "CATEGORY" and str(value) not in ("CATEGORY_DIGIT", "CATEGORY_WORD"):
            return False
        found |= (str(kind) == "LITERAL" and value == mark) or (str(kind) == "RANGE" and value[0] <= mark <= value[1])
    return found == negated
