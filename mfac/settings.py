"""Settings: keyword arguments that are named, documented, checked and given their defaults once.

A group of settings is a :class:`typing.TypedDict` whose fields are annotated with a :class:`Setting`. An entry point
takes them as ``**settings: Unpack[Group]``, so that type checkers and editors know them, and is decorated with
:func:`accepts`, which checks them, fills in the defaults, and gives the function the signature and the docstring that
``help()`` shows. The groups are in :mod:`mfac.gradients.settings` and :mod:`mfac.pruning.settings`.
"""

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

import torch

from mfac.checks import check_choice, check_int, suggestion

Check = Callable[[str, Any], Any]  # takes name and value; returns the value as it is used, or raises
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        default: Its value where the user gives none.
        check: Takes name and value; returns the value as it is used, or raises TypeError or ValueError.
        doc: What it means, for the docstrings.
    """

    default: Any
    check: Check
    doc: str


def one_of(known: Iterable[str]) -> Check:
    """Return the check of a string that is one of a few."""
    return lambda name, value: check_choice(name, value, known)


def count_from(least: int = 1, most: int | None = None) -> Check:
    """Return the check of an int."""
    return lambda name, value: check_int(name, value, least, most)


def checked_later(name: str, value: Any) -> Any:
    """Pass a value on that is checked elsewhere, as by :class:`mfac.Schedule`, or where the model's device is known."""
    return value


def optional(check: Check) -> Check:
    """Return a check that None passes too."""
    return lambda name, value: None if value is None else check(name, value)


def check_flag(name: str, value: Any) -> bool:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


@functools.cache
def definitions(settings: type) -> dict[str, Setting]:
    """Return the settings of a group, by name.

    Args:
        settings: The class.

    Returns:
        Name -> definition.
    """
    hints = get_type_hints(settings, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def accepts(settings: type, **defaults: Any) -> Callable[[Decorated], Decorated]:
    """Give a function or class whose last parameter is ``**settings`` its checks, signature and documentation.

    The settings arrive complete and checked. ``help()`` and completion show each of them with its default, and the
    line ``settings: ...`` in the section Args of the docstring is replaced by what the settings mean.

    Args:
        settings: A group.
        defaults: Defaults that differ for this entry point.

    Returns:
        The decorator.
    """
    known = {
        name: dataclasses.replace(setting, default=defaults.get(name, setting.default))
        for name, setting in definitions(settings).items()
    }
    hints = get_type_hints(settings)

    def decorate(target: Any) -> Any:
        function = target.__init__ if isinstance(target, type) else target
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known and name not in signature.parameters:
                    hint = suggestion(name, [*known, *signature.parameters])
                    raise TypeError(f"{target.__name__}() got an unexpected keyword argument {name!r}{hint}")
            others = {name: value for name, value in given.items() if name not in known}
            checked = {
                name: setting.check(name, given[name]) if name in given else setting.default
                for name, setting in known.items()
            }
            with torch.inference_mode(False):  # tensors made here are used outside of the caller's inference mode
                return function(*args, **others, **checked)

        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=setting.default, annotation=hints[name])
            for name, setting in known.items()
        ]
        call.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        if isinstance(target, type):
            target.__init__ = call  # type: ignore[misc]
            target.__doc__ = _documented(target.__doc__ or "", known)
            return target
        call.__doc__ = _documented(function.__doc__ or "", known)
        return call

    return decorate


def _documented(doc: str, known: Mapping[str, Setting]) -> str:
    """Return a docstring with the line ``settings: ...`` replaced by an entry for each setting."""
    match = re.search(r"^( *)settings: .*\n", doc, re.MULTILINE)
    if match is None:
        return doc
    indent = match[1]
    entries = [
        textwrap.fill(
            f"{name}: {setting.doc} Default: ``{setting.default!r}``.",
            116,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, setting in known.items()
    ]
    return doc[: match.start()] + "\n".join(entries) + "\n" + doc[match.end() :]
