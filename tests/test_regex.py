"""Regular expressions for names: those that would take too long are refused, others are not."""

import time

import pytest

from mfac.model.names import NameTable
from mfac.model.regex import compile_regex

LONG = "model.language_model.layers.31.self_attn.q_proj.weight"
SLOW = ["(a+)+$", "(a*)*$", "(a|a)*$", "(.|.)+x", "(a?){60}x", "a?" * 40 + "x", "(.|.)" * 40 + "x", ".*" * 12 + "x",
        "((a{1,9})b?){1,9}" * 4, "(?:a+?)+?$", "(?=(a+)+$)b", "(a+)+" + "x" * 200, "(x(a+)+)?$", "(a)(\\1*)*b",
        "(a)?(?(1)(a+)+|b)$", r"([\w.]+[.])*x", r"([^x]+[.])*x", r"(\D+[.])*x", "([+-/]+[.])*x"]  # fmt: skip
QUICK = ["layers", ".*[.]layers[.](3|31)[.].*", "(?:[a-z_]+[.])*layers", ".*layers.*attn.*q.*weight.*", "model.{0,40}x",
         "(model|encoder|decoder)[.](language_model|vision)[.]layers[.][0-9]+[.](self_attn|mlp)[.].*weight$",
         "(?!.*bias)model", "(?P<a>m)odel.*(?P=a)odel", "[^.]*[.]" * 6, "(layers[0-9]?[.]){2}", "x{1000000}",
         "(){99999}", r"(\w+[.])*layers[.]\d+[.].*", "[a-z_/]+[.]" * 6, "[^./]+[.]" * 6, "",
         "(?i)MODEL(?#comment)"]  # fmt: skip


@pytest.mark.parametrize("value", SLOW)
def test_slow_ones_are_refused(value):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"params: expected a regular expression that is quick to match, got 're:"):
        compile_regex("params", value, 60)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("value", QUICK)
def test_quick_ones_are_not(value):
    assert compile_regex("params", value, len(LONG)).pattern == value


@pytest.mark.parametrize("value", ["(", "*", "(?P<a", "a{99999999999999999999}", "(" * 4000 + ")" * 4000])
def test_not_a_regular_expression(value):
    with pytest.raises(ValueError, match="exclude: expected a regular expression after re:, got 're:"):
        compile_regex("exclude", value, 60)


def test_short_names_allow_more():
    assert NameTable(["a", "aa", "ab"]).find("re:(a+)+$") == ["a", "aa"]
    with pytest.raises(ValueError, match=r"sparsity: expected .* quick to match, got 're:\(a\+\)\+\$', which nests"):
        NameTable(["a", "a" * 40]).find("re:(a+)+$", "sparsity")
    assert NameTable([]).find("re:a") == []
