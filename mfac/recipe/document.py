"""Read the text of a recipe: find its YAML and parse it, within bounds that no recipe comes near.

A recipe may come from anywhere, so that a file made to exhaust time or memory must end in an error at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mfac.checks import warn

SUFFIXES = (".yaml", ".yml", ".md")
MAX_FILE = 2**20  # bytes; the largest recipes in use have some 20,000
MAX_ENTRIES = 1000  # of a mapping; integer keys can be chosen so that their hashes collide, for quadratic time
MAX_DIGITS = 20  # of an int: more than any quantity has; Python refuses to print those of more than 4300
_MAX_YAML = 2**18  # characters; PyYAML reads about a million per second
_MAX_NODES = 50_000  # values, with every alias expanded; one per 100 characters of a long string
_MAX_DEPTH = 32  # of lists and mappings; PyYAML recurses
_MAX_SCALAR = 10_000  # characters; PyYAML converts numbers such as 1:30:00 in quadratic time
_SPACE = re.compile(r"\s*")
_NUMBERED = re.compile(r"(.+\.md)#(\d{1,4})")  # a fenced recipe of a Markdown file
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})\s*(\S*)")


@dataclass(frozen=True)
class Item:
    """A modifier as written.

    Attributes:
        name: Its name without the `!`.
        arguments: Its arguments.
        line: The line it starts on.
        lines: The line of each argument.
    """

    name: str
    arguments: dict[str, Any]
    line: int
    lines: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def at(self, key: str) -> int:
        """Return the line of an argument or, if it has none, of the modifier."""
        return self.lines.get(key, self.line)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is not accepted; the message is `expected ..., got ...`."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(problem=message, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """YAML without arbitrary objects, within bounds; a tag `!Name` becomes an Item.

    Of a key or an anchor that is defined again, the later definition counts; there is a warning if they differ.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []  # what is said of keys that are given again
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[str, int] = {}  # nodes of each finished anchor, expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._nodes
        is_alias = isinstance(event, yaml.AliasEvent)
        if event.anchor is not None and not is_alias:  # YAML allows what PyYAML refuses
            self.anchors.pop(event.anchor, None)
            self._sizes.pop(event.anchor, None)
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
        values: dict[Any, yaml.Node] = {}
        for node, value in mapping.value:
            if node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
            if not isinstance(node, yaml.ScalarNode) or isinstance(key, (list, dict, set, Item)):
                raise _Refused(f"expected a number or a string as a key, got a {node.id}", node.start_mark)
            if key in values and not _same(values[key], value):
                lines = values[key].start_mark.line + 1, value.start_mark.line + 1
                self.repeated.append(
                    f"line {lines[1]}: {key!r:.80} is given again, with another value than in line {lines[0]}"
                )
            values[key] = value
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


def _same(one: yaml.Node, other: yaml.Node) -> bool:
    """Return whether two nodes are one, or scalars that are written alike."""
    scalars = isinstance(one, yaml.ScalarNode) and isinstance(other, yaml.ScalarNode)
    return one is other or (scalars and (one.tag, one.value) == (other.tag, other.value))


def _construct_item(loader: _Loader, suffix: str, node: yaml.Node) -> Item:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        arguments = loader.construct_mapping(node, deep=True)  # merges are expanded now
        lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
        return Item(suffix, arguments, line, lines)
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return Item(suffix, {}, line)
    raise _Refused(f"expected `name: value` arguments after !{suffix:.80}, got a {node.id}", node.start_mark)


_Loader.add_multi_constructor("!", _construct_item)


def _parse(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """Return what :func:`load_yaml` returns, and the node that it was made of, which knows its lines."""
    if len(text) > _MAX_YAML:
        raise ValueError(f"{name}: expected at most {_MAX_YAML} characters of YAML, got {len(text)}")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
        if loader.repeated:
            more = f", and {len(loader.repeated) - 1} such more" if len(loader.repeated) > 1 else ""
            warn(f"{name} {loader.repeated[0]}{more}; the later one counts")
        return value, node
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


def line_at(node: yaml.Node, path: Sequence[Any]) -> int:
    """Return the line of a value of a document.

    Args:
        node: The document's node.
        path: The keys and indices that lead to the value.

    Returns:
        Its line; that of the last value on the way there whose line is known.
    """
    for step in path:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[step]
        else:  # of a key that is given twice the later value counts
            node = next((value for key, value in reversed(node.value) if key.value == str(step)), node)
    return node.start_mark.line + 1


def load_yaml(text: str, name: str) -> Any:
    r"""Parse YAML.

    Args:
        text: At most 256 Ki characters.
        name: What the text is, for the error.

    Returns:
        The value: plain Python objects, and an Item for each tag `!Name`.

    Raises:
        ValueError: If it is not valid YAML, or exceeds the bounds at the head of this module. The message gives the
            line.

    Example:
        >>> load_yaml("a: &x [1, 2]\nb: *x", "recipe")
        {'a': [1, 2], 'b': [1, 2]}
    """
    return _parse(text, name)[0]


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


@dataclass(frozen=True)
class _Fenced:
    """A fenced block of a Markdown file that holds a recipe: where its text is, and the heading above it."""

    start: int
    end: int
    line: int
    heading: str


def _fenced(text: str) -> Iterator[_Fenced]:
    """Find the fenced blocks that hold recipes; each line is looked at once."""
    fence, heading, start, first, at = "", "", 0, 0, 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        match = _FENCE.match(line)
        if fence and match and match[1].startswith(fence) and not match[2]:
            if "modifiers" in text[start:at] and "!" in text[start:at]:
                yield _Fenced(start, at, first, heading)
            fence = ""
        elif not fence and match:
            fence, start, first = match[1], at + len(line), number + 1
        elif not fence and line.startswith("#"):
            heading = line.strip("# \r\n")
        at += len(line)


def _only(text: str, span: tuple[int, int]) -> str:
    """Return a part of a text after as many empty lines as there are lines before it: line numbers stay."""
    return "\n" * text.count("\n", 0, span[0]) + text[slice(*span)]


def _find_yaml(text: str, name: str, number: int | None) -> str:
    """Return the YAML of a recipe's text: its front matter, the only fenced recipe or that of a number, or all."""
    front = _front_matter(text) if number is None else None
    if front:
        return _only(text, front)
    if not name.endswith(".md"):
        return text
    blocks = list(_fenced(text))
    if number is None and len(blocks) > 1:
        found = ", ".join(f"{name}#{i} (line {block.line}: {block.heading:.60})" for i, block in enumerate(blocks, 1))
        raise ValueError(f"{name}: expected the number of one of its recipes, got several: {found:.1500}")
    if not 1 <= (number or 1) <= len(blocks):
        wanted = "YAML front matter between two `---` lines" if number is None else f"{number} fenced recipes or more"
        raise ValueError(f"{name}: expected {wanted}, got {len(blocks) or 'none'}")
    block = blocks[(number or 1) - 1]
    inner = _front_matter(text[block.start : block.end])
    return _only(text, (block.start + inner[0], block.start + inner[1]) if inner else (block.start, block.end))


def read_document(source: str | Path, hint: str = "") -> tuple[dict[Any, Any], str, yaml.Node]:
    """Read a recipe's top-level mapping.

    Args:
        source: A path ending in .yaml, .yml or .md (front matter, or a fenced recipe: ``FILE.md#2`` is the second), or
            the text of a recipe; at most 1 MiB.
        hint: Said in the error if there is no such file.

    Returns:
        The mapping, whose modifiers are Items and whose expressions are not evaluated yet, what to call the recipe in
        errors, and the mapping's node for :func:`line_at`.

    Raises:
        TypeError: If `source` is neither a string nor a path.
        ValueError: If there is no such file, it is too large, it holds several recipes, or not a mapping in YAML.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"recipe: expected a path or a string, got {type(source).__name__}")
    numbered = _NUMBERED.fullmatch(str(source)) if len(str(source)) < _MAX_SCALAR else None
    text, name = _read_text(numbered[1] if numbered else source, hint)
    text = _find_yaml(text, name, int(numbered[2]) if numbered else None)
    document, node = _parse(text, name)
    if not isinstance(document, dict):
        raise ValueError(
            f"{name}: expected a recipe (a mapping that holds a list of modifiers) or a path ending in "
            f"{', '.join(SUFFIXES)}, got {text.strip()[:80]!r}"
        )
    return document, name, node


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


class _Dumper(yaml.SafeDumper):
    """YAML in which an Item is a tag with arguments, and nothing is an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(Item, lambda dumper, item: dumper.represent_mapping(f"!{item.name}", item.arguments))


def dump_yaml(value: Any) -> str:
    """Return YAML that :func:`load_yaml` reads as the same value.

    Args:
        value: Plain Python objects and Items.

    Returns:
        The text.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
