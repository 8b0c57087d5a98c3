"""Checks of arguments, and warnings.

Every error reads ``name: expected ..., got ...``; numpy scalars and 0-d tensors are numbers.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

T = TypeVar("T")


def as_number(value: Any) -> int | float | None:
    """Return a number as Python's own int or float.

    Args:
        value: Anything.

    Returns:
        The number; None if it is not one. Booleans are not numbers here; numpy scalars and 0-d tensors are.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    elif isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else value


def check_int(name: str, value: Any, low: int = 1, high: int | None = None, also: str = "") -> int:
    """Check a count.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.
        low: The smallest value.
        high: The largest value; None: no limit.
        also: What else the argument may be, for the error: ``" or None"``.

    Returns:
        The value as int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    number = as_number(value)
    if not isinstance(number, int):
        raise TypeError(f"{name}: expected an int{also}, got {value!r}")
    if number < low or (high is not None and number > high):
        wanted = f">= {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected an int {wanted}{also}, got {number}")
    return number


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Check a finite number.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.
        low: The smallest value.
        high: The largest value.

    Returns:
        The value as int or float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite or out of range.
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (low <= number <= high and abs(number) < math.inf):
        bounds = {(False, False): "a finite number", (True, False): f">= {low:g}", (False, True): f"<= {high:g}"}
        wanted = bounds.get((low > -math.inf, high < math.inf), f"in [{low:g}, {high:g}]")
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return number


def check_positive(name: str, value: Any, finite: bool = True) -> float:
    """Check a number above 0.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.
        finite: Whether infinity is refused.

    Returns:
        The value as int or float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not above 0.
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < number <= math.inf or (finite and number == math.inf):
        raise ValueError(f"{name}: expected {'a finite number ' if finite else ''}> 0, got {value!r}")
    return number


def check_sparsity(name: str, value: Any) -> float:
    """Check a sparsity, the share of zeros in [0, 1].

    Args:
        name: Of the argument, for the error.
        value: What the user gave.

    Returns:
        The value as float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].
    """
    return float(check_number(name, value, 0, 1))


def check_choice(name: str, value: T, known: Iterable[T]) -> T:
    """Check that a value is one of a few.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.
        known: The values allowed.

    Returns:
        The value.

    Raises:
        ValueError: If it is another.
    """
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    return value


def suggestion(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of an error about an unknown name: the nearest one that there is, or nothing if all are too far.

    Args:
        name: What the user gave.
        known: The known names.
        cutoff: Lowest similarity in [0, 1] that is suggested.

    Returns:
        Text to append.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_instance(name: str, value: Any, kind: type[T], wanted: str) -> T:
    """Check the type of an argument.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.
        kind: The type expected.
        wanted: The type in words, for the error: ``"a tensor"``.

    Returns:
        The value.

    Raises:
        TypeError: If it is of another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    return value


def check_module(name: str, value: Any) -> nn.Module:
    """Check a model.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.

    Returns:
        The value.

    Raises:
        TypeError: If it is not a module.
    """
    return check_instance(name, value, nn.Module, "a torch.nn.Module")


def check_function(name: str, value: Any) -> Any:
    """Check a function that may be absent.

    Args:
        name: Of the argument, for the error.
        value: What the user gave.

    Returns:
        The value.

    Raises:
        TypeError: If it is neither None nor callable.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {value!r}")
    return value


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing at the line of the user's program that called into this package.

    Args:
        message: What the user should know.
        category: Of the warning.
    """
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
