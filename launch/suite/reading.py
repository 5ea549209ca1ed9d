"""Reads the YAML file of a suite: options shared by all, models, tasks, settings, a grid, seeds.

Options are those of `zerobert train`, nested or dotted, as in a recipe. What stands where is kept for messages.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from engine.config import require
from engine.errors import UserError
from launch.cli import CommandParser
from launch.configure.options import build_parser as training_parser
from launch.configure.options import flat
from launch.configure.recipe import STANDARD, Kind, Reader, line_of, read_nodes, scalar

SUITE = Kind("suite", "tasks: {rte: {glue: rte}}", "give a suite, such as those in launch/recipes/suites")
KEYS = ("data", "output", "dev", "base", "models", "tasks", "settings", "grid", "seeds")
#: keys of a task that are no options of its training
TASK_KEYS = ("glue", "folder", "folds")
#: options that the runs of a suite get from the suite
OWN = ("output", "seed", "resume", "config", "debug", "labelled.folds", "labelled.fold")
#: names of models, tasks and settings, which are folders too
NAME = re.compile(r"\w[\w.=,+@-]*")
#: folders of a suite that are no models
RESERVED = ("report", "submit", "logs", "data")
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Source:
    """Options from one place of the file."""

    place: str
    """such as tasks.rte"""
    values: Mapping[str, Any]
    """by dotted name"""
    lines: Mapping[str, int]
    """of each"""

    def where(self, name: str) -> str:
        """Where an option stands, for a message."""
        return f"{self.place}, line {self.lines[name]}" if name in self.lines else self.place


@dataclass(frozen=True)
class TaskPart:
    """A task of the file."""

    source: Source
    glue: str | None
    """its name in GLUE, from which the rest follows"""
    folder: str | None
    """of its files"""
    folds: int | None


@dataclass(frozen=True)
class SuiteFile:
    """A suite as its file has it."""

    path: Path
    data: str | None
    """folder that the files of data are in, relative to the file's own; None: that one"""
    output: str | None
    dev_is_test: bool
    """whether GLUE's development examples are the test, and a tenth of the training examples chooses"""
    base: Source
    models: Mapping[str, Source]
    tasks: Mapping[str, TaskPart]
    settings: Mapping[str, tuple[Source, ...]]
    seeds: tuple[int, ...]


def read_suite(path: str) -> SuiteFile:
    """The suite that a file holds.

    Raises:
        UserError: the first thing that is wrong, with its key and line.
    """
    return FileReader(path).read()


class FileReader:
    """One file; nodes become values."""

    kind: ClassVar[Kind] = SUITE
    keys: ClassVar[tuple[str, ...]] = KEYS
    own: ClassVar[tuple[str, ...]] = OWN
    """options that the runs get from the file's other parts"""

    def __init__(self, path: str) -> None:
        self.path = path
        self.parser: CommandParser = training_parser()
        self.root = dict(self.mapping(read_nodes(path, self.kind), ""))

    def read(self) -> SuiteFile:
        """All of it."""
        self.check_keys()
        dev = self.text("dev") or "validation"
        require(dev in ("validation", "test"), "dev", dev, f"choose validation or test ({self.path})")
        return SuiteFile(
            path=Path(self.path),
            data=self.text("data"),
            output=self.text("output"),
            dev_is_test=dev == "test",
            base=self.options(self.root.get("base"), "base"),
            models={name: self.model(node, f"models.{name}") for name, node in self.named("models")},
            tasks=self.tasks(),
            settings=self.settings(),
            seeds=self.seeds(),
        )

    def check_keys(self) -> None:
        """Refuse a key that the file doesn't have.

        Raises:
            UserError: names it, with its line.
        """
        for key in self.root:
            if key not in self.keys:
                near = difflib.get_close_matches(key, self.keys, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"choose of {', '.join(self.keys)}"
                raise self.fail(self.kind.field, self.root[key], f"no such key {key!r}; {remedy}")

    def fail(self, place: str, node: yaml.Node, problem: str) -> UserError:
        """The error of a place, with its line."""
        return UserError(f"{place}: {problem} (line {line_of(node)} of {self.path})")

    def mapping(self, node: yaml.Node, place: str) -> list[tuple[str, yaml.Node]]:
        """The entries of a mapping, each key once.

        Raises:
            UserError: it is something else, or empty.
        """
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise self.fail(place, node, "names must stand under it, and what belongs to each; indent them")
        return [(key, value) for key, _, value in Reader(self.path, self.kind.field).entries(node, place)]

    def text(self, key: str) -> str | None:
        """The text of a key; None without it."""
        node = self.root.get(key)
        return None if node is None else self.scalar(node, key)

    def scalar(self, node: yaml.Node, place: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.fail(place, node, "it takes one text")
        return str(node.value)

    def number(self, node: yaml.Node, place: str, least: int) -> int:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        value = None if text is None else scalar(text, plain=True, kinds=(int,))
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**32:
            raise self.fail(place, node, f"{text!r} is not allowed; give a whole number of at least {least}")
        return value

    def named(self, key: str) -> list[tuple[str, yaml.Node]]:
        """The entries of a part whose keys become folders; none without it."""
        if key not in self.root:
            return []
        entries = self.mapping(self.root[key], key)
        for name, node in entries:
            if not NAME.fullmatch(name) or name in RESERVED:
                raise self.fail(
                    key, node, f"{name!r} is not allowed as a name; it becomes a folder: give letters, digits and . _ -"
                )
        return entries

    def options(self, node: yaml.Node | None, place: str) -> Source:
        """Options of a training.

        Raises:
            UserError: no mapping, an unknown field or a value of another type, or one that the suite gives itself.
        """
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
            return Source(place, {}, {})
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(place, node, "options must stand under it, such as {train: {epochs: 3}}; correct it")
        reader = Reader(self.path, place)
        nested = reader.section(node, "")
        for name in self.own:
            if name in reader.lines:
                where = f"{place}, line {reader.lines[name]} of {self.path}"
                raise UserError(f"{name}: the {self.kind.field} gives it to each run; delete it ({where})")
        try:
            values = flat(self.parser, nested)
        except UserError as error:
            name = str(error).partition(":")[0]
            line = f", line {reader.lines[name]}" if name in reader.lines else f", line {line_of(node)}"
            raise UserError(f"{error} ({place}{line} of {self.path})") from error
        return Source(place, values, reader.lines)

    def model(self, node: yaml.Node, place: str) -> Source:
        """A model: its folder or name, or options."""
        if isinstance(node, yaml.ScalarNode) and node.value:
            return Source(place, {"model.init_from": node.value}, {"model.init_from": line_of(node)})
        return self.options(node, place)

    def tasks(self) -> dict[str, TaskPart]:
        entries = self.named("tasks")
        if not entries:
            raise UserError(f"tasks: {self.path} has none; write such as tasks: {{rte: {{glue: rte}}}}")
        return {name: self.task(node, f"tasks.{name}") for name, node in entries}

    def task(self, node: yaml.Node, place: str) -> TaskPart:
        entries = dict(self.mapping(node, place))
        assert isinstance(node, yaml.MappingNode)
        rest = [(key, value) for key, value in node.value if getattr(key, "value", None) not in TASK_KEYS]
        options = yaml.MappingNode(node.tag, rest, node.start_mark, node.end_mark)
        glue, folder = (
            self.scalar(entries[key], f"{place}.{key}") if key in entries else None for key in ("glue", "folder")
        )
        if folder is not None and glue is None:
            raise self.fail(place, entries["folder"], "a folder goes with glue: NAME; else give labelled.train")
        folds = self.number(entries["folds"], f"{place}.folds", 2) if "folds" in entries else None
        return TaskPart(self.options(options, place), glue, folder, folds)

    def settings(self) -> dict[str, tuple[Source, ...]]:
        """The named settings, each with every combination of the grid."""
        named = {name: self.options(node, f"settings.{name}") for name, node in self.named("settings")}
        combined: dict[str, tuple[Source, ...]] = {}
        grid: list[tuple[str, Source | None]] = [*self.grid()] or [("", None)]
        for name, own in named.items() or [("", None)]:
            for suffix, varied in grid:
                both = sorted(own.values.keys() & varied.values.keys()) if own and varied else []
                if own and both:
                    raise UserError(f"{both[0]}: the grid varies it; delete one ({own.where(both[0])} of {self.path})")
                sources = tuple(source for source in (own, varied) if source is not None)
                combined[",".join(filter(None, (name, suffix))) or "default"] = sources
        return combined

    def grid(self) -> list[tuple[str, Source]]:
        """Every combination of the grid's values, by a name that tells them."""
        if "grid" not in self.root:
            return []
        axes = self.mapping(self.root["grid"], "grid")
        lasts = [field.rpartition(".")[2] for field, _ in axes]
        shown = [last if lasts.count(last) == 1 else field for (field, _), last in zip(axes, lasts, strict=True)]
        found: dict[str, Source] = {}
        for nodes in itertools.product(*(self.values_of(field, node) for field, node in axes)):
            pairs = list(zip(shown, nodes, strict=True))
            name = ",".join(f"{field}={_name_of(node)}" for field, node in pairs)
            if name in found or not NAME.fullmatch(name):
                what = "twice" if name in found else "no name of a folder; give it as a named setting"
                raise self.fail("grid", nodes[-1], f"{name} is {what}")
            keys = [yaml.ScalarNode(f"{STANDARD}str", field, start_mark=node.start_mark) for field, node in axes]
            options = yaml.MappingNode(f"{STANDARD}map", list(zip(keys, nodes, strict=True)), nodes[0].start_mark)
            found[name] = self.options(options, "grid")
        return list(found.items())

    def values_of(self, field: str, node: yaml.Node) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail("grid", node, f"{field} takes a list of values, such as [2e-5, 5e-5]")
        return list(node.value)

    def seeds(self) -> tuple[int, ...]:
        """Seeds from a number of them, from 1, or from a list."""
        node = self.root.get("seeds")
        if node is None:
            return SEEDS
        if not isinstance(node, yaml.SequenceNode):
            return tuple(range(1, 1 + self.number(node, "seeds", 1)))
        seeds = tuple(self.number(item, "seeds", 0) for item in node.value)
        if not seeds or len(set(seeds)) < len(seeds):
            raise self.fail("seeds", node, f"{list(seeds)} is not allowed; give different seeds, at least one")
        return seeds


def _name_of(node: yaml.Node) -> str:
    """A grid's value in the name of a setting."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    inner: Iterable[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else ()
    return "-".join(_name_of(item) for item in inner)
