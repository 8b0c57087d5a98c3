"""Recipes made to exhaust time or memory: each ends in an error, in bounded time and memory.

The cases run in one process of their own, this file as a script, which is limited in memory and processor time. It
prints a line for each case as soon as it is done.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mfac
from mfac.recipe import Manager

MODULUS = sys.hash_info.modulus
PRUNING = "modifiers:\n  - !MagnitudePruningModifier {params: [a], final_sparsity: 0.5}\n"
MEMORY = 512 * 2**20  # bytes that all cases together may take beyond those of the imports
SECONDS = 10  # of processor time per case; each takes less than one on an idle machine
NESTED = "nested at most .* deep, got more"
NODES = "expected at most 50000 values"


def expression(text):
    return f"modifiers:\n  - !EpochRangeModifier\n    end_epoch: {json.dumps(f'eval({text})')}\n"


def doubling(levels):
    variables = "".join(f"v{i}: eval(v{i + 1} + v{i + 1})\n" for i in range(levels))
    return f"{variables}v{levels}: 1\n" + expression("v0")


def aliases(item, levels=10, width=10):
    lines = [f"a0: &a0 [{item}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\n{PRUNING}"


def merges(levels=30):
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels)]
    return "\n".join(lines) + f"\n{PRUNING}"


# Name: (expression, pattern of the error).
EXPRESSIONS = {
    "round": ("round(5, -30000000)", "round.*: expected at most 20 digits, got -30000000"),
    "round, float": ("round(5, -3e7)", "expected at most 20 digits, got -30000000.0"),
    "power": ("9**9**9", "expected exponents .*, got 387420489"),
    "powers": ("**".join(["2"] * 200), "expected exponents .*, got"),
    "powers in brackets": ("(" * 50 + "9" + "**99)" * 50, "expected numbers of at most .*, got a larger one"),
    "negative exponent": ("2 ** -1000000", "expected exponents .*, got -1000000"),
    "huge exponent": ("2 ** 1e308", "expected numbers of at most .*, got a larger one"),
    "huge number": ("9" * 900, "expected numbers of at most .*, got a larger one"),
    "infinity": ("1e999", "expected numbers of at most .*, got a larger one"),
    "no number": ("1e999 - 1e999", "expected numbers of at most .*, got a larger one"),
    "complex": ("(-8) ** 0.5", "expected numbers, got"),
    "zero": ("1 // 0", "division|modulo by zero"),
    "remainder": ("1 % 0", "modulo by zero"),
    "zero to a negative power": ("0 ** -1", "got an error: "),
    "brackets": ("(" * 100_000 + "1" + ")" * 100_000, "1000 characters, got|10000 characters, got"),
    "fewer brackets": ("(" * 450 + "1" + ")" * 450, "got an error: "),
    "minus signs": ("-" * 990 + "1", "got an error: |end_epoch: expected"),
    "long": ("+".join(["1"] * 2000), "expected at most 1000 characters, got 3999"),
    "strings": ("'a' * 1000000000", "expected numbers, got 'a'"),
    "sum of strings": ("'a' + 'b'", "expected numbers"),
    "attribute": ("(1).__class__", "expected only numbers"),
    "comprehension": ("[x for x in (1, 2)]", "expected only numbers"),
    "keywords": ("round(1, ndigits=2)", "expected only numbers"),
    "starred": ("max(*params)", "expected only numbers"),
    "no arguments": ("max()", "got an error: "),
    "comparison": ("1 < 2", "expected only numbers"),
    "truth": ("True", "expected numbers, got True"),
    "bits": ("1 << 1000000000", "expected only numbers"),
    "f-string": ("f'{1:1000000000}'", "expected only numbers"),
}
# Name: (recipe, recipe_args, pattern of the error). The recipe is a string, or (suffix, contents of a file).
CASES = {f"expression: {name}": (expression(text), None, message) for name, (text, message) in EXPRESSIONS.items()}
CASES |= {
    # Variables.
    "doubling numbers": (doubling(200), None, NESTED),
    "doubling numbers, less deep": (doubling(45).replace("v45: 1", "v45: []"), None, "expected numbers, got .."),
    "doubling lists": ("".join(f"v{i}: ['eval(v{i + 1})', 'eval(v{i + 1})']\n" for i in range(18)) + "v18: [1]\n"
                              + expression("v0"), None, "expected at most 100000 values"),
    "long chain": ("".join(f"v{i}: eval(v{i + 1})\n" for i in range(900)) + "v900: 1\n" + expression("v0"), None,
                   NESTED),
    "many expressions": (f"modifiers:\n  - !Any {{a: [{', '.join(['eval(%s)' % ('1+' * 400 + '1')] * 200)}]}}\n", None,
                         "expected at most 100000 values"),
    "many stages": ("a: [" + "1, " * 900 + "1]\n" + "".join(
        f"s{i}:\n  modifiers:\n    - !Any {{x: eval(a)}}\n" for i in range(900)), None,
        "expected at most 100000 values"),
    "list as a key": ("k: [1]\nmodifiers:\n  - !Any {a: {eval(k): 1}}\n", None, "line 3: .*keys, got .1"),
    "keys that become equal": ("k: 1\nmodifiers:\n  - !Any {a: {eval(k): 1, 1: 2}}\n", None,
                               "different .* keys, got 1"),
    # Front matter.
    "comments": ((".md", "<!-- a -->\n" * 90_000 + "text"), None, "expected YAML front matter between .*, got none"),
    "unclosed comments": ((".md", "<!-- a\n" * 140_000), None, "expected YAML front matter between .*, got none"),
    "one unclosed comment": ((".md", "<!-- a -->\n" * 50_000 + "<!-- " + "- " * 200_000), None, "front matter"),
    "dashes": ((".md", "---\n" + "--- \t x\n" * 100_000), None, "front matter"),
    "spaces": ((".md", " " * 500_000 + "<!---->" + "\n" * 500_000), None, "front matter"),
    "not closed": ((".md", "---\n" + PRUNING), None, "expected YAML front matter between .*, got none"),
    "nothing between": ((".md", "---\n---\n"), None, "expected a recipe"),
    # YAML.
    "aliases": (aliases("1"), None, f"line 6: {NODES}"),
    "aliases of text": (aliases("x" * 9000, 4), None, NODES),
    "aliases within modifiers": (f"a: &a [{'1, ' * 400}]\nmodifiers: [!Any {{b: [{'*a, ' * 400}]}}]\n", None, NODES),
    "alias of itself": (f"a: &a [*a]\n{PRUNING}", None, r"line 1: expected an alias of another value, got \*a"),
    "chain of aliases": ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300))
                         + "modifiers: [!Any {x: *a299}]\n", None, NESTED),
    "merges": (merges(), None, NODES),
    "wide merges": ("".join(f"a{i}: &a{i} {{{', '.join(f'k{i}x{j}: 1' for j in range(200))}}}\n" for i in range(6))
                    + "b: {<<: [*a0, *a1, *a2, *a3, *a4, *a5]}\n" + PRUNING, None, "at most 1000 entries"),
    "merge of itself": (f"a: &a {{<<: *a}}\n{PRUNING}", None, "alias of another value"),
    "brackets": ("a: " + "[" * 100_000, None, f"line 1: .*{NESTED}"),
    "closed brackets": ("a: " + "[" * 100_000 + "]" * 100_000, None, NESTED),
    "braces": ("a: " + "{" * 100_000, None, NESTED),
    "dashes in a line": ("- " * 100_000 + "1\n", None, NESTED),
    "indentation": ("".join(" " * i + "a:\n" for i in range(600)), None, NESTED),
    "many values": ("a: [" + "1," * 60_000 + "1]\n", None, NODES),
    "many entries": ("".join(f"k{i}: 1\n" for i in range(5000)), None, "line 1: expected at most 1000 entries"),
    "equal hashes": ("".join(f"{i * MODULUS}: 1\n" for i in range(5000)), None, "at most 1000 entries"),
    "long text": ("a: " + "x" * 20_000 + f"\n{PRUNING}", None, "line 1: expected strings of at most 10000"),
    "escapes": ('a: "' + "\\x41" * 60_000 + '"\n', None, "expected strings of at most 10000"),
    "base 60": ("a: 1" + ":59" * 80_000 + "\n", None, "expected strings of at most 10000"),
    "base 60, float": ("a: 1" + ":59" * 3000 + ".5\n", None, "line 1: expected a value of type float"),
    "digits": ("a: " + "9" * 9000 + "\n", None, "line 1: expected a value of type int|expected modifiers"),
    "hexadecimal": ("modifiers:\n  - !EpochRangeModifier {end_epoch: 0x" + "f" * 5000 + "}\n", None,
                    "line 2: expected integers of at most 20 digits, got a larger one"),
    "huge params": ("modifiers:\n  - !MagnitudePruningModifier {final_sparsity: 0.5, params: 0x" + "f" * 5000 + "}\n",
                    None, "line 2: expected integers of at most 20 digits"),
    "huge modifiers": ("modifiers: [0x" + "f" * 5000 + "]\n", None, "line 1: expected integers of at most 20 digits"),
    "huge group": ("modifiers: -0x" + "f" * 5000 + "\n", None, "line 1: expected integers of at most 20 digits"),
    "huge param_groups": ("modifiers:\n  - !SetLearningRateModifier {learning_rate: 1, param_groups: [1" + "0" * 20
                          + "]}\n", None, "line 2: expected integers of at most 20 digits"),
    "huge float": ("modifiers:\n  - !MFACPruningModifier {params: [a], final_sparsity: 0.5, num_grads: 1.0e+300}\n",
                   None, r"num_grads: expected an int, got 1e\+300"),
    "substeps": ("modifiers:\n  - !MFACPruningModifier {params: [a], final_sparsity: 0.5, substeps: 1000000000}\n",
                 None, "substeps: expected an int 1 to 10000 or 'auto', got 1000000000"),
    "recomputations": ("modifiers:\n  - !MFACPruningModifier {params: [a], final_sparsity: 0.5, "
                       "recomputations: 1000000000}\n", None,
                       "recomputations: expected an int 1 to 10000 or 'auto', got"),
    "infinite": ("modifiers:\n  - !MFACPruningModifier {params: [a], final_sparsity: 0.5, num_grads: .inf}\n", None,
                 "num_grads: expected an int, got inf"),
    "no such date": ("a: 2024-99-99\n" + PRUNING, None, "line 1: expected a value of type timestamp"),
    "wrong tags": ("a: !!int x\n" + PRUNING, None, "line 1: expected a value of type int, got 'x'"),
    "binary": ("a: !!binary ä\n" + PRUNING, None, "line 1: expected"),
    "objects": ("a: !!python/name:os.system\n" + PRUNING, None, "line 1: expected valid YAML"),
    "list as a key of YAML": ("? [1]\n: 2\n" + PRUNING, None, "line 1: expected a number or a string as a key"),
    "mapping as a key": ("{a: 1}: 2\n", None, "line 1: expected a number or a string as a key"),
    "modifier as a key": ("? !Any\n: 2\n", None, "line 1: expected a number or a string as a key"),
    "empty mapping as a key": ("? !!map x\n: 2\n", None, "line 1: expected"),
    "two documents": ("a: 1\n---\nb: 2\n", None, "expected valid YAML"),
    "nothing": ("\n", None, "expected a recipe .*, got ''"),
    "null": ("--- null\n", None, "expected a recipe .*, got"),
    "null modifiers": ("modifiers:\n", None, "modifiers: expected a list of modifiers .*, got None"),
    "null modifier": ("modifiers: [~]\n", None, "line 1: modifiers: expected a list of modifiers .*, got None"),
    "null argument": ("modifiers:\n  - !EpochRangeModifier {end_epoch: }\n", None,
                      "end_epoch: expected a number, got None"),
    "control characters": ("a: \x00\n", None, "expected valid YAML"),
    "names in an error": (f"a: &a [{'x, ' * 2000}]\nmodifiers:\n  - !EpochRangeModifier {{end_epoch: *a}}\n", None,
                          r"end_epoch: expected a number, got \['x'"),
    # Sizes.
    "text of 2 MB": ("\n" * 2_000_000, None, "recipe: expected at most 1048576 characters, got 2000000"),
    "fences": ((".md", "```\nmodifiers: !\n```\n" * 40_000), None,
               "expected the number of one of its recipes, got several"),
    "open fences": ((".md", "```a\nmodifiers: !\n" * 40_000), None, "expected YAML front matter .*, got none"),
    "scheduler": ("modifiers:\n  - !LearningRateModifier {lr_class: MultiStepLR, init_lr: 1, "
                  "lr_kwargs: {milestones: x}}\n", None, "lr_kwargs: expected numbers .*, got 'x' for milestones"),
    "value": (f"modifiers:\n  - !SetParamModifier {{params: a, val: {'[' * 20}1{']' * 20}, end_epoch: x}}\n", None,
              "end_epoch: expected a number"),
    "file of 2 MB": ((".yaml", "#\n" * 1_000_000), None, "expected at most 1048576 bytes, got more"),
    "YAML of 1 MB": ((".yaml", "#\n" * 500_000), None, "expected at most 262144 characters of YAML, got 1000000"),
    "not UTF-8": ((".yaml", "a: \udcff"), None, "expected UTF-8 text, got byte 0xff at 3"),
    # Arguments.
    "JSON": ("a: 1\n" + PRUNING, '{"a":' * 100_000, "recipe_args: expected valid JSON, got an error"),
    "JSON, less deep": ("a: 1\nmodifiers: [!Any {x: eval(a)}]\n", '{"a": ' + "[" * 300 + "]" * 300 + "}", NESTED),
    "JSON, many digits": ("a: 1\n" + PRUNING, '{"a": %s}' % ("9" * 5000), 
                          "recipe_args: expected integers of at most 20 digits, got one of 5000"),
    "JSON, key twice": ("a: 1\n" + PRUNING, '{"a": 1, "a": 2}', "expected each variable once, got 'a' again"),
    "dict, huge integer": ("a: 1\nmodifiers: [!Any {x: eval(a)}]\n", {"a": 16**5000}, "integers of at most 20 digits"),
    "arguments of 2 MB": ("a: 1\n" + PRUNING, "a=1," * 500_000, "recipe_args: expected at most 1048576 characters"),
    "many arguments": ("a: 1\n" + PRUNING, "a=1," * 2000, "recipe_args: expected at most 1000 variables"),
    "argument twice": ("a: 1\n" + PRUNING, "a=1,a=2", "recipe_args: expected each variable once, got 'a' again"),
    "argument nested": ("a: 1\n" + PRUNING, "a=" + "[" * 100_000, f"recipe_args line 1: .*{NESTED}"),
    "argument no YAML": ("a: 1\n" + PRUNING, "a=[", "recipe_args line 1: expected valid YAML"),
}  # fmt: skip


def run(folder):
    """Load each recipe; print [name, kind of the error, its text] as JSON, one a line."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name, (recipe, arguments, _) in CASES.items():
        seconds = int(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        if isinstance(recipe, tuple):
            suffix, text = recipe
            recipe = folder / f"recipe{suffix}"
            recipe.write_text(text, errors="surrogateescape")
        try:
            Manager.from_recipe(recipe, arguments)
            outcome = ["no error", ""]
        except Exception as error:
            outcome = [type(error).__name__, str(error)]
        print(json.dumps([name, *outcome]), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    child = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(mfac.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return {name: (kind, text) for name, kind, text in lines}, child.stderr


def test_variables_are_evaluated_once():
    """2^40 additions would take days."""
    recipe = doubling(40)
    assert Manager.from_recipe(recipe).epochs == 2**40


@pytest.mark.parametrize("name", CASES)
def test_hostile_recipes_are_refused(outcomes, name):
    found, stderr = outcomes
    assert name in found, f"the process ended before: {stderr[-500:]}"
    kind, text = found[name]
    assert kind == "ValueError", text
    assert len(text) < 2000
    with pytest.raises(ValueError, match=CASES[name][2]):
        raise ValueError(text)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
