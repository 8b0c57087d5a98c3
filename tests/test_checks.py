"""The checks of arguments: values that pass, and the one form of the errors."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mfac import checks, reestimate_batchnorm
from mfac.gradients.stream import BatchStream


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_numbers_of_all_kinds(value):
    assert checks.as_number(value) == 3 and type(checks.as_number(value)) is int
    assert checks.check_int("n", value, high=3) == checks.check_number("n", value, 3, 3) == 3


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), "3", None, torch.ones(1)])
def test_not_numbers(value):
    assert checks.as_number(value) is None


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: checks.check_int("n", 2.0), TypeError, "n: expected an int, got 2.0"),
        (lambda: checks.check_int("n", True, also=" or None"), TypeError, "n: expected an int or None, got True"),
        (lambda: checks.check_int("n", 0), ValueError, "n: expected an int >= 1, got 0"),
        (lambda: checks.check_int("n", 4, low=0, high=3), ValueError, "n: expected an int 0 to 3, got 4"),
        (lambda: checks.check_number("x", "1"), TypeError, "x: expected a number, got '1'"),
        (lambda: checks.check_number("x", float("nan")), ValueError, "x: expected a finite number, got nan"),
        (lambda: checks.check_number("x", -1, low=0), ValueError, "x: expected >= 0, got -1"),
        (lambda: checks.check_number("x", 1, high=0), ValueError, "x: expected <= 0, got 1"),
        (lambda: checks.check_sparsity("s", 1.5), ValueError, r"s: expected in \[0, 1\], got 1.5"),
        (lambda: checks.check_choice("c", "z", ("x", "y")), ValueError, "c: expected one of x, y, got 'z'"),
        (lambda: checks.check_choice("c", None, ("x", "y")), ValueError, "c: expected one of x, y, got None"),
        (lambda: checks.check_instance("i", 3, str, "a string"), TypeError, "i: expected a string, got int"),
        (lambda: checks.check_module("m", nn.Linear), TypeError, "m: expected a torch.nn.Module, got type"),
        (lambda: checks.check_function("f", 3), TypeError, "f: expected a function or None, got 3"),
    ],
)
def test_errors(check, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        check()


def test_values_are_returned():
    layer = nn.Linear(2, 2)
    assert checks.check_module("m", layer) is checks.check_instance("m", layer, nn.Linear, "a Linear") is layer
    assert checks.check_function("f", print) is print and checks.check_function("f", None) is None
    assert checks.check_choice("c", "x", iter("xy")) == "x"
    assert checks.check_sparsity("s", 1) == 1.0 and isinstance(checks.check_sparsity("s", 1), float)


def test_warnings_point_at_the_caller():
    """However deep within the package they arise."""
    stream = BatchStream([torch.ones(4, 2)], seed=0, announce=2)
    model = nn.Sequential(nn.BatchNorm1d(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reestimate_batchnorm(model, stream, 2, forward=lambda model, batch: (model(batch), None))
    assert [w.filename for w in caught] == [__file__]
