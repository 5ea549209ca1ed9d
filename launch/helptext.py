"""The --help of every command: examples as they are written, and types and defaults in words."""

from __future__ import annotations

from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

WORDS: dict[object, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null"}


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of descriptions, and says types and defaults without Python's notation."""

    def _get_help_string(self, action: Action) -> str:
        if not action.help or action.help == SUPPRESS or "help" in action.dest:
            return super()._get_help_string(action) or ""
        hint = getattr(action, "_typehint", None) or action.type
        told = ["required"] if action.required and action.option_strings else []
        told += [words(hint)] if hint is not None and not is_choice(hint) else []
        default = action.default
        optional = default is None and NoneType in get_args(hint)
        if action.nargs != 0 and default != SUPPRESS and (optional or default not in (None, [], "")):
            told.append(f"default: {value(default)}")
        return action.help + (f" ({', '.join(told)})" if told else "")

    def _expand_help(self, action: Action) -> str:
        return super()._expand_help(action).replace("%%", "%")

    def _format_args(self, action: Action, default_metavar: str) -> str:
        hint = getattr(action, "_typehint", None)
        if hint is bool or is_choice(hint):
            return super()._format_args(action, default_metavar)
        return super()._format_args(action, default_metavar) if get_origin(hint) is not tuple else "[A,B]"


def is_choice(hint: Any) -> bool:
    """Whether an annotation is a choice of words or of true and false, which the option's own notation shows."""
    return hint is bool or get_origin(hint) is Literal


def words(hint: Any) -> str:
    """An annotation in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return either(map(words, inner))
    if origin in (list, tuple):
        return f"a list of {words(inner[0])}s" if origin is list else f"a list of {len(inner)} {words(inner[0])}s"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)).replace("_", " "))


def either(kinds: Iterable[str]) -> str:
    """Choices in a sentence."""
    return " or ".join(kinds)


def value(default: Any) -> str:
    """A default as one would write it."""
    if isinstance(default, bool) or default is None:
        return str(default).lower() if default is not None else "null"
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)
