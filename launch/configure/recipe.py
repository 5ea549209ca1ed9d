"""Reads recipes, the YAML files of --config, strictly: nothing in them is ignored or misread.

A plain scalar is read by the type of its field: a text field takes it literally (`label: no`, `output: 5`), a boolean
field takes YAML 1.1's words too (`on`, `off`), and numbers are those of YAML 1.2's core schema (`1e-4`, and `010` is
ten).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from engine.config import RunConfig, extra_sections
from engine.errors import UserError

NULLS = ("", "~", "null", "Null", "NULL")
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = {"inf": math.inf, "nan": math.nan}
#: prefix of YAML's standard tags
STANDARD = "tag:yaml.org,2002:"
IMPLICIT = {f"{STANDARD}{kind}" for kind in ("str", "seq", "map")}

#: entries of a mapping: key, node of the key, node of the value
Entries = list[tuple[str, yaml.Node, yaml.Node]]


def field_types() -> Mapping[str, tuple[type, ...]]:
    """Every dotted field of a run and the plain types that it takes; a section takes `dict`."""
    return _field_types(tuple(extra_sections().items()))


@cache
def _field_types(extra: tuple[tuple[str, type], ...]) -> Mapping[str, tuple[type, ...]]:
    types: dict[str, tuple[type, ...]] = {"debug": (bool,)}
    own = {name: kind for name, kind in get_type_hints(RunConfig).items() if name != "extra"}
    for name, kind in (own | dict(extra)).items():
        if is_dataclass(kind):
            types[name] = (dict,)
            hints = get_type_hints(kind)
            types |= {f"{name}.{entry.name}": _types(hints[entry.name]) for entry in fields(kind)}
        else:
            types[name] = _types(kind)
    return types


def _types(hint: Any) -> tuple[type, ...]:
    """The plain types in a field's annotation; a Literal of strings counts as str."""
    inner = get_args(hint)
    if not inner:
        return (hint,)
    flat = (_types(part) if isinstance(part, type) or get_args(part) else (type(part),) for part in inner)
    return tuple(kind for kinds in flat for kind in kinds)


@dataclass(frozen=True)
class Kind:
    """What a YAML file is, for messages."""

    field: str
    """the option that names it"""
    example: str
    """what could stand in it"""
    remedy: str
    """where no such file is there"""


RECIPE = Kind("config", "train: {steps: 1000}", "give a recipe, such as those in launch/recipes")


def read_recipe(path: str) -> dict[str, Any]:
    """The fields of a recipe, nested as the file nests them.

    Raises:
        UserError: the file can't be read or isn't a recipe: a key twice, an empty section, a list, several documents.
    """
    values = Reader(path).section(read_nodes(path, RECIPE), "")
    if "config" in values:
        raise UserError(f"config: {path} names another recipe; give both on the command line, --config twice")
    return values


def read_nodes(path: str, kind: Kind) -> yaml.MappingNode:
    """The fields of a YAML file, whose scalars are not interpreted yet.

    Raises:
        UserError: the file can't be read, is no YAML, or no single mapping.
    """
    root = _compose(path, _text(path, kind), kind)
    if not isinstance(root, yaml.MappingNode):
        held = "a list" if isinstance(root, yaml.SequenceNode) else f"only {root.value[:60]!r}"
        raise UserError(f"{kind.field}: {path} holds {held}, and no fields; write fields such as {kind.example}")
    return root


def _text(path: str, kind: Kind) -> str:
    file = Path(path)
    if file.is_dir():
        inside = file / "config.yaml"
        remedy = f"give {inside}" if inside.is_file() else "give a YAML file"
        raise UserError(f"{kind.field}: {path!r} is a folder; {remedy}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{kind.field}: {path} is not UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{kind.field}: {path!r} can't be read ({reason}); {kind.remedy}") from error


def _compose(path: str, text: str, kind: Kind) -> yaml.Node:
    """The YAML nodes of a file, whose scalars are not interpreted yet."""
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.BaseLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}, line {mark.line + 1}"
        tab = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else "; correct it"
        raise UserError(f"{kind.field}: the recipe is not YAML ({where}: {error.problem}){tab}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{kind.field}: the recipe is not YAML ({path}: {error}); correct it") from error
    documents = [document for document in documents if document is not None]
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        raise UserError(f"{kind.field}: {path} holds {len(documents)} documents, the second from line {line}; keep one")
    if not documents or (isinstance(documents[0], yaml.ScalarNode) and documents[0].value in NULLS):
        raise UserError(f"{kind.field}: {path} is empty; write fields such as {kind.example}, or leave it out")
    return documents[0]


class Reader:
    """Converts the YAML nodes of one file into values."""

    def __init__(self, path: str, root: str = "config") -> None:
        self.path, self.root = path, root
        self.lines: dict[str, int] = {}
        """line of each field that was read, by its dotted name"""
        self.trail: list[int] = []
        """ids of the mappings around the current node, by which a mapping that contains itself is recognised"""

    def fail(self, name: str, node: yaml.Node, problem: str) -> UserError:
        """The error of a field, with its line."""
        return UserError(f"{name}: {problem} (line {line_of(node)} of {self.path})")

    def section(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        """The fields of a mapping; dotted keys are the same as nested ones."""
        values: dict[str, Any] = {}
        entries = self.entries(node, prefix)
        self.trail.append(id(node))
        for key, key_node, value in entries:
            name = f"{prefix}.{key}" if prefix else key
            inner: Any = values
            *sections, last = key.split(".")
            for section in sections:
                inner = inner.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise self.fail(name, key_node, f"{section} has a value of its own; give one of the two")
            fields_of = self.value(value, name)
            if not isinstance(fields_of, dict):
                self.once(name, key_node)
            inner[last] = {**inner.get(last, {}), **fields_of} if isinstance(fields_of, dict) else fields_of
        self.trail.pop()
        return values

    def once(self, name: str, node: yaml.Node) -> None:
        """Record a field, and refuse it if it was given already, nested or dotted."""
        if name in self.lines:
            raise self.twice(name, self.lines[name], line_of(node))
        self.lines[name] = line_of(node)

    def twice(self, name: str, first: int, second: int) -> UserError:
        """The error of a key that is given twice."""
        section = field_types().get(name) == (dict,)
        remedy = "join the two sections" if section else "delete one"
        return UserError(f"{name}: given twice in {self.path}, in line {first} and line {second}; {remedy}")

    def entries(self, node: yaml.MappingNode, prefix: str) -> Entries:
        """A mapping's own entries, each key once, and those of the mappings that `<<` merges into it."""
        if id(node) in self.trail:
            raise self.fail(prefix or self.root, node, "it contains itself; write the fields out")
        self.trail.append(id(node))
        seen: dict[str, tuple[str, yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(prefix or self.root, key, "a list or a mapping can't be a field's name; correct it")
            if key.value == "<<" and key.style is None:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            name = f"{prefix}.{key.value}" if prefix else key.value
            if key.value in seen:
                raise self.twice(name, line_of(seen[key.value][1]), line_of(key))
            seen[key.value] = (key.value, key, value)
        for mapping in merged:
            if not isinstance(mapping, yaml.MappingNode):
                raise self.fail(prefix or self.root, mapping, "<< merges mappings only; correct it")
            for entry in self.entries(mapping, prefix):
                seen.setdefault(entry[0], entry)
        self.trail.pop()
        return list(seen.values())

    def value(self, node: yaml.Node, name: str) -> Any:
        """The value of a field, or of a section."""
        if node.tag not in IMPLICIT:
            tag = node.tag.replace(STANDARD, "!!")
            raise self.fail(name, node, f"tags such as {tag} aren't read; leave it out")
        kinds = field_types().get(name)
        if kinds == (dict,) and not isinstance(node, yaml.MappingNode):
            if isinstance(node, yaml.ScalarNode) and node.value in NULLS:
                raise self.fail(name, node, "nothing stands under it; indent its fields under it, or delete it")
            raise self.fail(name, node, "its fields must stand under it, such as {steps: 1000}; correct it")
        if isinstance(node, yaml.MappingNode):
            return self.section(node, name)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{name}[]") for item in node.value]
        assert isinstance(node, yaml.ScalarNode)
        converted = scalar(node.value, plain=node.style is None, kinds=kinds or ())
        if converted is None and kinds is not None and NoneType not in kinds:
            raise self.fail(name, node, "null is not allowed; give a value, or delete it")
        return converted


def line_of(node: yaml.Node) -> int:
    """The line that a node begins at, from 1."""
    return int(node.start_mark.line) + 1


def scalar(text: str, *, plain: bool, kinds: tuple[type, ...]) -> Any:
    """The value of a scalar for a field that takes `kinds`.

    Args:
        text: the scalar as the file has it.
        plain: whether it is written without quotes.
        kinds: the plain types that the field takes.
    """
    if not plain:
        return text
    if text in NULLS:
        return None
    if bool in kinds and text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    number = next(_numbers(text), None)
    if str in kinds and (number is None or not {int, float} & set(kinds)):
        return text
    if number is not None:
        return number
    return TRUTHS.get(text.lower(), text) if not kinds else text


def _numbers(text: str) -> Iterator[int | float]:
    """Yields the number that a plain scalar stands for, if it is one."""
    if INTEGER.fullmatch(text):
        yield int(text, 0 if text[1:2] in ("x", "o") else 10)
    elif NUMBER.fullmatch(text):
        yield float(text)
    elif text.lower().lstrip("+-")[:1] == "." and text.lower().lstrip("+-")[1:] in SPECIAL:
        sign = -1 if text.startswith("-") else 1
        yield sign * SPECIAL[text.lower().lstrip("+-")[1:]]
