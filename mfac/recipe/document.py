"""Read the text of a recipe: find its front matter and parse the YAML, within bounds that no recipe comes near.

A recipe may come from anywhere, so that a file made to exhaust time or memory must end in an error at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SUFFIXES = (".yaml", ".yml", ".md")
MAX_FILE = 2**20  # bytes; the largest recipes in use have some 20,000
MAX_ENTRIES = 1000  # of a mapping; integer keys can be chosen so that their hashes collide, for quadratic time
MAX_DIGITS = 20  # of an int: more than any quantity has; Python refuses to print those of more than 4300
_MAX_YAML = 2**18  # characters; PyYAML reads about a million per second
_MAX_NODES = 50_000  # values, with every alias expanded; one per 100 characters of a long string
_MAX_DEPTH = 32  # of lists and mappings; PyYAML recurses
_MAX_SCALAR = 10_000  # characters; PyYAML converts numbers such as 1:30:00 in quadratic time
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Item:
    """A modifier as written: its name without the `!`, its arguments, and the line it starts on."""

    name: str
    arguments: dict[str, Any]
    line: int


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is not accepted; the message is `expected ..., got ...`."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(problem=message, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """YAML without arbitrary objects, within bounds; a tag `!Name` becomes an Item, and a repeated key is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[str, int] = {}  # nodes of each finished anchor, expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._nodes
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and event.anchor in self.anchors and event.anchor not in self._sizes:
            raise _Refused(f"expected an alias of another value, got *{event.anchor} inside itself", event.start_mark)
        if is_alias:
            self._nodes += self._sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _MAX_SCALAR:
                raise _Refused(
                    f"expected strings of at most {_MAX_SCALAR} characters, got {len(event.value)}", event.start_mark
                )
            self._nodes += 1 + len(event.value) // 100
        else:
            self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise _Refused(f"expected at most {_MAX_NODES} values (aliases expanded), got more", event.start_mark)
        if self._depth > _MAX_DEPTH:
            raise _Refused(f"expected values nested at most {_MAX_DEPTH} deep, got more", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not is_alias:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        self._check_entries(mapping)
        keys = set()
        for node, _ in mapping.value:
            if node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
            if not isinstance(node, yaml.ScalarNode) or isinstance(key, (list, dict, set, Item)):
                raise _Refused(f"expected a number or a string as a key, got a {node.id}", node.start_mark)
            if key in keys:
                raise _Refused(f"expected each key once in a mapping, got {key!r:.80} again", node.start_mark)
            keys.add(key)
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self._check_entries(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # PyYAML raises many kinds for a value that does not fit its tag, such as !!int x
            kind = node.tag.rpartition(":")[2]
            raise _Refused(f"expected a value of type {kind}, got {node.value!r:.80}", node.start_mark) from error
        if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
            raise _Refused(f"expected integers of at most {MAX_DIGITS} digits, got a larger one", node.start_mark)
        return value

    @staticmethod
    def _check_entries(mapping: yaml.MappingNode) -> None:
        if len(mapping.value) > MAX_ENTRIES:
            raise _Refused(
                f"expected at most {MAX_ENTRIES} entries in a mapping, got {len(mapping.value)}", mapping.start_mark
            )


def _construct_item(loader: _Loader, suffix: str, node: yaml.Node) -> Item:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return Item(suffix, loader.construct_mapping(node, deep=True), line)
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return Item(suffix, {}, line)
    raise _Refused(f"expected `name: value` arguments after !{suffix:.80}, got a {node.id}", node.start_mark)


_Loader.add_multi_constructor("!", _construct_item)


def load_yaml(text: str, name: str) -> Any:
    r"""Parse YAML.

    Args:
        text: At most 256 Ki characters.
        name: What the text is, for the error.

    Returns:
        The value: plain Python objects, and an Item for each tag `!Name`.

    Raises:
        ValueError: If it is not valid YAML, repeats a key in a mapping, or exceeds the bounds at the head of this
            module. The message gives the line.

    Example:
        >>> load_yaml("a: &x [1, 2]\nb: *x", "recipe")
        {'a': [1, 2], 'b': [1, 2]}
    """
    if len(text) > _MAX_YAML:
        raise ValueError(f"{name}: expected at most {_MAX_YAML} characters of YAML, got {len(text)}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if not isinstance(error, yaml.MarkedYAMLError):  # a character that YAML does not allow
            raise ValueError(f"{name}: expected valid YAML, got an error: {' '.join(str(error).split())}") from error
        mark = error.problem_mark or error.context_mark
        message = error.problem
        if not isinstance(error, _Refused):
            problem = ", ".join(filter(None, (error.context, error.problem)))
            message = f"expected valid YAML, got an error: {problem:.200}"
        raise ValueError(f"{name} line {mark.line + 1}: {message}") from error
    except RecursionError:
        raise ValueError(f"{name}: expected values nested at most {_MAX_DEPTH} deep, got more") from None


def _front_matter(text: str) -> tuple[int, int] | None:
    """Return where the front matter starts and ends, without its `---` or `+++` lines; None if there is none.

    It may come after HTML comments. Each character is looked at once, or twice.
    """
    start = _SPACE.match(text).end()
    while text.startswith("<!--", start):
        end = text.find("-->", start + 4)
        if end < 0:
            return None
        start = _SPACE.match(text, end + 3).end()
    marker = text[start : start + 3]
    first = text.find("\n", start) + 1
    if marker not in ("---", "+++") or not first or text[start:first].rstrip() != marker:
        return None
    line = first
    while line < len(text):
        following = text.find("\n", line) + 1 or len(text)
        if text[line:following].rstrip() == marker:
            return first, line
        line = following
    return None


def read_document(source: str | Path, hint: str = "") -> dict[Any, Any]:
    """Read a recipe's top-level mapping.

    Args:
        source: A path ending in .yaml, .yml or .md (front matter), or the text of a recipe; at most 1 MiB.
        hint: Said in the error if there is no such file.

    Returns:
        The mapping; its modifiers are Items, its expressions are not evaluated yet.

    Raises:
        TypeError: If `source` is neither a string nor a path.
        ValueError: If there is no such file, it is too large, or it does not hold a mapping in YAML.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"recipe: expected a path or a string, got {type(source).__name__}")
    text, name = _read_text(source, hint)
    found = _front_matter(text)
    if found:  # lines above it stay, as empty ones, so that line numbers are those of the file
        text = "\n" * text.count("\n", 0, found[0]) + text[slice(*found)]
    elif name.endswith(".md"):
        raise ValueError(f"{name}: expected YAML front matter between two `---` lines, got none")
    document = load_yaml(text, name)
    if not isinstance(document, dict):
        raise ValueError(
            f"{name}: expected a recipe (a mapping that holds a list of modifiers) or a path ending in "
            f"{', '.join(SUFFIXES)}, got {text.strip()[:80]!r}"
        )
    return document


def _read_text(source: str | Path, hint: str) -> tuple[str, str]:
    """Return the text of a recipe, and what to call it in errors."""
    if isinstance(source, str) and ("\n" in source or not source.endswith(SUFFIXES)):
        if len(source) > MAX_FILE:
            raise ValueError(f"recipe: expected at most {MAX_FILE} characters, got {len(source)}")
        return source, "recipe"
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"recipe: expected a file ending in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise ValueError(f"recipe: expected an existing file, got {path}{hint}")
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"{path}: expected at most {MAX_FILE} bytes, got more")
    try:
        return data.decode("utf-8-sig"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {data[error.start]:#04x} at {error.start}") from error
