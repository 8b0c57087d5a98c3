"""Read a recipe (SparseML's format) into a list of modifiers with plain arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mfac.recipe.expression import evaluate

_SUFFIXES = (".yaml", ".yml", ".md")
_FRONT_MATTER = re.compile(r"\s*(?:<!--.*?-->\s*)*(---|\+\+\+)[ \t]*\n(.*?\n)\1[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """One modifier as written: `name` without the `!`, its arguments, and the line it starts on."""

    name: str
    arguments: dict[str, Any]
    line: int


@dataclass(frozen=True)
class Recipe:
    """A recipe whose variables are filled in: its modifiers in order, and what `__metadata__` held."""

    items: list[Item]
    metadata: Any = None


class _Loader(yaml.SafeLoader):
    """YAML without arbitrary objects; a tag `!Name` becomes an Item."""


def _construct_item(loader: _Loader, suffix: str, node: yaml.Node) -> Item:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return Item(suffix, loader.construct_mapping(node, deep=True), line)
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return Item(suffix, {}, line)
    raise ValueError(f"recipe line {line}: !{suffix} must be followed by `name: value` arguments")


_Loader.add_multi_constructor("!", _construct_item)


def tutorial_recipes() -> Path:
    """Return the folder of the tutorial's recipes: in the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def _read_text(source: str | Path) -> tuple[str, str]:
    # Gives the text of `source` and a name for it.
    if isinstance(source, str) and ("\n" in source or not source.endswith(_SUFFIXES)):
        return source, "recipe"
    path = Path(source)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a recipe file must end in {', '.join(_SUFFIXES)}, got {path}")
    if not path.is_file():
        raise ValueError(f"no recipe file at {path}; the tutorial's are in {tutorial_recipes()}")
    return path.read_text(encoding="utf-8"), str(path)


def _parse(text: str, name: str) -> dict[str, Any]:
    # Gives the top-level mapping of a recipe's YAML or front matter.
    found = _FRONT_MATTER.match(text)
    if found:  # keep the lines above, as empty ones, so that line numbers stay right
        text = "\n" * text.count("\n", 0, found.start(2)) + found.group(2)
    elif name.endswith(".md"):
        raise ValueError(f"{name}: no YAML front matter between two `---` lines")
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ValueError(
            f"expected a recipe (a mapping that holds a list of modifiers) or a path ending in "
            f"{', '.join(_SUFFIXES)}, got {text.strip()[:80]!r}"
        )
    return document


def _parse_arguments(recipe_args: str | dict[str, Any] | None) -> dict[str, Any]:
    # Takes a dict, JSON or `k=v,k=v`.
    if recipe_args is None or isinstance(recipe_args, dict):
        return recipe_args or {}
    text = recipe_args.strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"recipe_args is not valid JSON: {error}") from error
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError(f"recipe_args must be JSON or `name=value,name=value`, got {text!r}")
    return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}


def _is_group(key: Any) -> bool:
    return isinstance(key, str) and "modifiers" in key


def _variables(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a recipe or stage that are neither modifier groups, nor stages, nor `__metadata__`."""
    return {
        key: value
        for key, value in mapping.items()
        if not _is_group(key) and not _is_stage(value) and key != "__metadata__"
    }


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and any(map(_is_group, value))


def _lookup(variables: dict[str, Any]) -> Callable[[str], Any]:
    """Return the function that gives a variable's value, evaluated."""
    underway: list[str] = []

    def get(name: str) -> Any:
        if name in underway:
            raise ValueError(f"recipe variables refer to each other in a circle: {' -> '.join([*underway, name])}")
        if name not in variables:
            raise ValueError(f"unknown recipe variable {name!r}; the recipe defines {sorted(map(str, variables))}")
        underway.append(name)
        try:
            return evaluate(variables[name], get)
        finally:
            underway.pop()

    return get


def _items(mapping: dict[str, Any], variables: dict[str, Any]) -> list[Item]:
    # Gives the modifiers of the groups of a recipe or a stage, with their arguments evaluated.
    lookup = _lookup(variables)
    items = []
    for key, group in mapping.items():
        if not _is_group(key):
            continue
        if isinstance(group, dict) and any(str(name).endswith("Modifier") for name in group):
            raise ValueError(
                f"{key} holds `{next(iter(group))}:` without the `!` of a YAML tag: this recipe is written for "
                f"another program (LLM Compressor), not in SparseML's format"
            )
        if not isinstance(group, list) or not all(isinstance(item, Item) for item in group):
            raise ValueError(f"{key} must be a list of modifiers such as `- !EpochRangeModifier`, got {group!r:.80}")
        items += [Item(item.name, evaluate(item.arguments, lookup), item.line) for item in group]
    return items


def load_recipe(source: str | Path, recipe_args: str | dict[str, Any] | None = None) -> Recipe:
    r"""Read a recipe: find its YAML, fill in variables and `eval(...)`, list its modifiers.

    Args:
        source: A path ending in .yaml, .yml or .md (front matter), or the text of a recipe.
        recipe_args: Values that override the recipe's variables: a dict, JSON, or `name=value,name=value`.

    Returns:
        The recipe. Nothing of it has been checked against the known modifiers yet.

    Raises:
        ValueError: If there is no such file, the text is not a recipe, an expression is wrong, or `recipe_args` names
            a variable that the recipe does not have.

    Example:
        >>> text = "epochs: 3\nmodifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}"
        >>> load_recipe(text, "epochs=5").items
        [Item(name='EpochRangeModifier', arguments={'start_epoch': 0, 'end_epoch': 5}, line=3)]
    """
    document = _parse(*_read_text(source))
    stages = [value for value in document.values() if _is_stage(value)]
    parts = [document, *stages]
    overrides = _parse_arguments(recipe_args)
    known = {name for part in parts for name in _variables(part)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"recipe_args names {unknown[0]!r}, but the recipe's variables are {sorted(map(str, known))}")
    items = []
    for part in parts:
        items += _items(part, {**_variables(document), **_variables(part), **overrides})
    if not items:
        raise ValueError("the recipe holds no modifiers: a top-level key such as `modifiers` must list them")
    return Recipe(items, document.get("__metadata__"))
