"""Read a recipe (SparseML's format) into a list of modifiers with plain arguments."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mfac.checks import suggestion
from mfac.recipe.document import MAX_DIGITS, MAX_ENTRIES, MAX_FILE, Item, dump_yaml, line_at, load_yaml, read_document
from mfac.recipe.expression import Scope

_UNTAGGED = re.compile(r"\w+Modifier\b")  # a modifier whose `!` was forgotten


@dataclass(frozen=True)
class Recipe:
    """A recipe whose variables are filled in: its modifiers in order, and what `__metadata__` holds."""

    items: list[Item]
    metadata: Any = None
    name: str = "recipe"  # in errors: the file, if it is one

    def __str__(self) -> str:
        """Return YAML that means the same, its variables filled in."""
        metadata = {} if self.metadata is None else {"__metadata__": self.metadata}
        return dump_yaml({**metadata, "modifiers": self.items})


def tutorial_recipes() -> Path:
    """Return the folder of the tutorial's recipes: in the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def _parse_arguments(recipe_args: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return `recipe_args` as a dict."""
    if recipe_args is None or isinstance(recipe_args, dict):
        return recipe_args or {}
    if not isinstance(recipe_args, str):
        raise TypeError(f"recipe_args: expected a dict, a string or None, got {type(recipe_args).__name__}")
    text = recipe_args.strip()
    if len(text) > MAX_FILE:
        raise ValueError(f"recipe_args: expected at most {MAX_FILE} characters, got {len(text)}")
    if text.startswith("{"):
        try:
            return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"recipe_args: expected valid JSON, got an error: {error}") from error
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if len(pairs) > MAX_ENTRIES:
        raise ValueError(f"recipe_args: expected at most {MAX_ENTRIES} variables, got {len(pairs)}")
    arguments: dict[str, Any] = {}
    for key, equals, value in pairs:
        key = key.strip()
        if not (key and equals):
            raise ValueError(f"recipe_args: expected JSON or `name=value,name=value`, got {text!r:.80}")
        if key in arguments:
            raise ValueError(f"recipe_args: expected each variable once, got {key!r:.80} again")
        arguments[key] = load_yaml(value, "recipe_args")
    return arguments


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, refusing a repeated key."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"recipe_args: expected each variable once, got {key!r:.80} again")
        result[key] = value
    return result


def _integer(text: str) -> int:
    """Return an int of JSON, refusing a huge one."""
    if len(text.removeprefix("-")) > MAX_DIGITS:
        raise ValueError(f"recipe_args: expected integers of at most {MAX_DIGITS} digits, got one of {len(text)}")
    return int(text)


def _is_group(key: Any) -> bool:
    return isinstance(key, str) and "modifiers" in key


def _is_stage(key: Any, value: Any) -> bool:
    return key != "__metadata__" and isinstance(value, dict) and any(map(_is_group, value))


def _variables(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Return the entries of a recipe or stage that are neither modifier groups, nor stages, nor `__metadata__`."""
    return {
        key: value
        for key, value in mapping.items()
        if not _is_group(key) and not _is_stage(key, value) and key != "__metadata__"
    }


def _metadata(document: dict[Any, Any], stages: dict[Any, dict]) -> Any:
    """Return what `__metadata__` holds; if stages have some, a dict of each, and of the recipe's as `__metadata__`."""
    holders = {"__metadata__": document, **stages}
    found = {name: holder["__metadata__"] for name, holder in holders.items() if "__metadata__" in holder}
    return found if found.keys() - {"__metadata__"} else document.get("__metadata__")


def _refuse_entry(entry: Any, where: str) -> NoReturn:
    """Refuse an entry of a group that is not a modifier."""
    written = next(iter(entry), "") if isinstance(entry, dict) else entry
    match = _UNTAGGED.match(written) if isinstance(written, str) else None
    if match:
        name = match[0][:80]
        raise ValueError(f"{where}: expected modifiers as YAML tags, `- !{name}`, got `{name}` without the `!`")
    raise ValueError(f"{where}: expected a list of modifiers such as `- !EpochRangeModifier`, got {entry!r:.80}")


def _items(mapping: dict[Any, Any], scope: Scope, name: str, root: yaml.Node, path: tuple = ()) -> list[Item]:
    """Return the modifiers of a recipe, or of the stage that `path` leads to, with their arguments evaluated."""
    items = []
    for key, group in mapping.items():
        if not _is_group(key):
            continue
        where = f"{name} line {line_at(root, (*path, key))}: {key}"
        if isinstance(group, dict) and any(str(entry).endswith("Modifier") for entry in group):
            raise ValueError(
                f"{where}: expected modifiers as YAML tags, got `{next(iter(group))}:` without the `!`; this "
                f"recipe is written for another program (LLM Compressor), not in SparseML's format"
            )
        if not isinstance(group, list):
            _refuse_entry(group, where)
        for index, item in enumerate(group):
            if not isinstance(item, Item):
                _refuse_entry(item, f"{name} line {line_at(root, (*path, key, index))}: {key}")
            arguments: dict[str, Any] = {}
            for argument, value in item.arguments.items():
                try:
                    arguments[argument] = scope.evaluate(value)
                except ValueError as error:
                    where = f"{name} line {item.at(argument)}: !{item.name:.80}"
                    raise ValueError(f"{where}: {argument}: {error}") from error
            items.append(Item(item.name, arguments, item.line, item.lines))
    return items


def load_recipe(source: str | Path, recipe_args: str | dict[str, Any] | None = None) -> Recipe:
    r"""Read a recipe: parse its YAML, fill in variables and `eval(...)`, list its modifiers.

    The file or text may come from a stranger: nothing in it is executed, and one made to exhaust time or memory is
    refused at once. Of a key that occurs twice in a mapping, the later one counts, and there is a warning if they
    differ.

    Args:
        source: A path ending in .yaml, .yml or .md (front matter, or a fenced recipe: `FILE.md#2` is the second), or
            the text of a recipe; at most 1 MiB.
        recipe_args: Values that override the recipe's variables: a dict, JSON, or `name=value,name=value`.

    Returns:
        The recipe. Its modifiers and their arguments have not been checked yet.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there is no such file, the text is not a recipe or exceeds a bound, an expression is wrong, or
            `recipe_args` names a variable that the recipe does not have.

    Example:
        >>> text = "epochs: 3\nmodifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}"
        >>> load_recipe(text, "epochs=5").items
        [Item(name='EpochRangeModifier', arguments={'start_epoch': 0, 'end_epoch': 5}, line=3)]
    """
    overrides = _parse_arguments(recipe_args)
    document, recipe, root = read_document(source, f"; the tutorial's recipes are in {tutorial_recipes()}")
    stages = {key: value for key, value in document.items() if _is_stage(key, value)}
    known = {name for part in (document, *stages.values()) for name in _variables(part)}
    for name in overrides:
        if name not in known:
            variables = ", ".join(sorted(map(str, known))) or "none"
            raise ValueError(
                f"recipe_args: expected variables of the recipe ({variables:.200}), got {name!r:.80}"
                f"{suggestion(str(name), map(str, known))}"
            )
    scope = Scope({**_variables(document), **overrides})
    items = _items(document, scope, recipe, root)
    for key, stage in stages.items():
        items += _items(stage, Scope({**_variables(stage), **overrides}, outer=scope), recipe, root, (key,))
    if not items:
        raise ValueError(f"{recipe}: expected modifiers, listed under a top-level key such as `modifiers`, got none")
    return Recipe(items, _metadata(document, stages), recipe)
