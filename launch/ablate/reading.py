"""Reads the YAML file of an ablation: a suite's file with switches and sizes in place of settings.

A setting of the suite is a switch, or none of them, at a size: base,n=200 or r_drop,n=all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import yaml

from engine.errors import UserError
from launch.configure.recipe import Kind
from launch.suite.reading import OWN, FileReader, Source, SuiteFile

ABLATION = Kind(
    "ablation",
    "switches: {r_drop: {regularise.r_drop: 1.0}}",
    "give an ablation, such as those in launch/recipes/ablations",
)
#: the runs without a switch
BASE = "base"
ALL = "all"
SIZE = ",n="
LIMIT = "labelled.limit"


def setting_of(switch: str, size: str) -> str:
    """The name of the setting of a switch at a size."""
    return f"{switch}{SIZE}{size}"


def parts_of(setting: str) -> tuple[str, str] | None:
    """The switch and the size of a setting; None of one that is no ablation's."""
    switch, between, size = setting.rpartition(SIZE)
    return (switch, size) if between and (size == ALL or size.isdecimal()) else None


def read_ablation(path: str) -> SuiteFile:
    """The ablation that a file holds, as a suite.

    Raises:
        UserError: the first thing that is wrong, with its key and line.
    """
    return AblationReader(path).read()


class AblationReader(FileReader):
    """One file."""

    kind: ClassVar[Kind] = ABLATION
    keys: ClassVar[tuple[str, ...]] = (
        "data", "output", "dev", "base", "models", "tasks", "switches", "sizes", "seeds",
    )  # fmt: skip
    own: ClassVar[tuple[str, ...]] = (*OWN, LIMIT)

    def read(self) -> SuiteFile:
        """All of it."""
        file = super().read()
        single = [name for name, task in file.tasks.items() if len(file.seeds) * (task.folds or 1) < 2]
        if single:
            raise UserError(
                f"seeds: a single run of {single[0]} tells nothing of chance; give at least 2 ({file.path})"
            )
        return file

    def settings(self) -> dict[str, tuple[Source, ...]]:
        """At each size the base, and each switch."""
        switches = {BASE: Source(BASE, {}, {})}
        for name, node in self.named("switches"):
            if name == BASE:
                raise self.fail("switches", node, f"{BASE!r} is what all are compared with; give another name")
            switches[name] = self.options(node, f"switches.{name}")
        if len(switches) == 1:
            raise UserError(f"switches: {self.path} has none; write such as {ABLATION.example}")
        return {setting_of(name, size): (own, limit) for size, limit in self.sizes() for name, own in switches.items()}

    def sizes(self) -> Iterator[tuple[str, Source]]:
        """Each size and its option; all examples have none."""
        node = self.root.get("sizes")
        if node is None:
            yield ALL, Source("sizes", {}, {})
            return
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail("sizes", node, "it takes a list of numbers of training examples, such as [50, 200, all]")
        seen: set[str] = set()
        for item in node.value:
            every = isinstance(item, yaml.ScalarNode) and item.value == ALL
            size = ALL if every else str(self.number(item, "sizes", 1))
            if size in seen:
                raise self.fail("sizes", item, f"{size} is there twice; delete one")
            seen.add(size)
            yield size, Source("sizes", {} if every else {LIMIT: int(size)}, {})
