"""Reads the YAML file of a ladder: sizes, token budgets, rules of rate and batch, and options shared by all runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml

from engine.config import ARCHITECTURES, Objective, require
from engine.errors import UserError
from engine.scaling.probes.request import LabelledProbe
from engine.scaling.sizes import Proportions
from launch.configure.recipe import Kind, scalar
from launch.suite.plan import whole
from launch.suite.reading import FileReader, Source

LADDER = Kind(
    "ladder", "sizes: {from: 1e6, to: 1e8, count: 5}", "give a ladder, such as launch/recipes/ladder_tiny.yaml"
)
KEYS = (
    "output", "base", "sizes", "tokens", "tokens_per_parameter", "architectures", "objectives", "seeds", "proportions",
    "rules", "warmup", "decay", "flops", "held_out", "abilities",
)  # fmt: skip
#: options that the runs of a ladder get from its other keys
OWN = (
    "task", "output", "seed", "resume", "branch_from", "config", "debug", "model.size", "model.architecture",
    "model.hidden_size", "model.layers", "model.heads", "model.init_from", "data.objective", "optim.learning_rate",
    "optim.schedule", "optim.warmup", "optim.decay", "train.global_batch", "train.steps", "train.epochs",
    "train.save_at",
)  # fmt: skip
RULES = ("learning_rate", "global_batch")
ABILITY_KEYS = ("blimp", "labelled", "questions")
#: of a labelled probe, its files
FILES = ("train", "test")


@dataclass(frozen=True)
class Rule:
    """A power law of the parameters: value (N / at)^exponent."""

    value: float
    at: float
    exponent: float

    def __call__(self, parameters: float) -> float:
        return float(self.value * (parameters / self.at) ** self.exponent)


@dataclass(frozen=True)
class Sizes:
    """Sizes by their parameters: named ones, or a geometric range whose end may follow from the ladder's FLOPs."""

    targets: tuple[float, ...] = ()
    begin: float = 0.0
    end: float | None = None
    count: int = 0


@dataclass(frozen=True)
class LadderFile:
    """A ladder as its file has it."""

    path: Path
    output: str | None
    base: Source
    sizes: Sizes
    budgets: tuple[float, ...]
    """of tokens, rising: the same for all sizes, or a parameter"""
    per_parameter: bool
    architectures: tuple[str, ...]
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    proportions: Proportions
    rules: Mapping[str, Rule]
    warmup: float
    """share of the smallest budget's steps"""
    decay: float
    """share of each budget's steps"""
    flops: float | None
    """of all runs together; the largest size follows"""
    held_out: Mapping[str, str]
    """prepared stores by the name of the set"""
    abilities: Mapping[str, Any]
    """see `ABILITY_KEYS`"""


def read_ladder(path: str) -> LadderFile:
    """The ladder that a file holds.

    Raises:
        UserError: the first thing that is wrong, with its key and line.
    """
    return LadderReader(path).ladder()


class LadderReader(FileReader):
    """One file; nodes become values."""

    kind: ClassVar[Kind] = LADDER
    keys: ClassVar[tuple[str, ...]] = KEYS
    own: ClassVar[tuple[str, ...]] = OWN

    def ladder(self) -> LadderFile:
        """All of it."""
        self.check_keys()
        per_parameter, budgets = self.budgets()
        decay, warmup = self.share("decay", 0.2), self.share("warmup", 0.25)
        together = f"with decay {decay:g} nothing is left of the smallest budget; lower one of the two ({self.path})"
        require(warmup + decay <= 1.0, "warmup", warmup, together)
        sizes = self.sizes()
        flops = self.real(self.root["flops"], "flops") if "flops" in self.root else None
        remedy = "the largest size follows from flops; leave one of the two out"
        require(flops is None or (sizes.count > 0 and sizes.end is None), "sizes", "to", f"{remedy} ({self.path})")
        require(flops is not None or sizes.count == 0 or sizes.end is not None, "sizes", "from and count alone",
                f"give to, or flops of the whole ladder ({self.path})")  # fmt: skip
        return LadderFile(
            path=Path(self.path),
            output=self.text("output"),
            base=self.options(self.root.get("base"), "base"),
            sizes=sizes,
            budgets=budgets,
            per_parameter=per_parameter,
            architectures=self.choices("architectures", ARCHITECTURES.names, "bert"),
            objectives=self.choices("objectives", get_args(Objective), "mlm"),
            seeds=self.seeds() if "seeds" in self.root else (1, 2),
            proportions=self.proportions(),
            rules=self.rules(),
            warmup=warmup,
            decay=decay,
            flops=flops,
            held_out={
                name: self.path_of(self.scalar(node, f"held_out.{name}")) for name, node in self.named("held_out")
            },
            abilities=self.abilities(),
        )

    def real(self, node: yaml.Node, place: str, most: float = math.inf) -> float:
        """A positive number.

        Raises:
            UserError: it is none, or above `most`.
        """
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        value = None if text is None else scalar(text, plain=True, kinds=(float,))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most or value == math.inf:
            limit = "" if most == math.inf else f" of at most {most:g}"
            raise self.fail(place, node, f"{text!r} is not allowed; give a positive number{limit}")
        return float(value)

    def share(self, key: str, default: float) -> float:
        return self.real(self.root[key], key, 1.0) if key in self.root else default

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        node = self.root.get(key)
        if node is None:
            return default
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(key, node, "it takes a list of numbers, such as [5, 10, 20]")
        return tuple(self.real(item, key) for item in node.value)

    def budgets(self) -> tuple[bool, tuple[float, ...]]:
        """Whether token budgets are those of a parameter, and the budgets."""
        given = [key for key in ("tokens", "tokens_per_parameter") if key in self.root]
        if len(given) != 1:
            raise UserError(
                f"tokens: give token budgets of all sizes, or else tokens_per_parameter, such as [5, 10, 20, 40], and "
                f"not both ({self.path})"
            )
        budgets = self.numbers(given[0], ())
        rises = all(one < other for one, other in pairwise(budgets))
        require(rises, given[0], list(budgets), f"give rising numbers ({self.path})")
        return given[0] == "tokens_per_parameter", budgets

    def choices(self, key: str, allowed: tuple[str, ...], default: str) -> tuple[str, ...]:
        node = self.root.get(key)
        if node is None:
            return (default,)
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        given = tuple(self.scalar(item, key) for item in items)
        for name in given:
            require(name in allowed, key, name, f"choose of {', '.join(allowed)} ({self.path})")
        require(bool(given) and len(set(given)) == len(given), key, list(given), f"give each once ({self.path})")
        return given

    def part(self, key: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
        """The entries of a part with given keys; none without it."""
        if key not in self.root:
            return {}
        entries = dict(self.mapping(self.root[key], key))
        for name, node in entries.items():
            if name not in known:
                raise self.fail(f"{key}.{name}", node, f"no such key; choose of {', '.join(known)}")
        return entries

    def sizes(self) -> Sizes:
        node = self.root.get("sizes")
        if node is None:
            raise UserError(f"sizes: {self.path} has none; write such as {LADDER.example}")
        if isinstance(node, yaml.SequenceNode):
            return Sizes(targets=self.numbers("sizes", ()))
        entries = self.part("sizes", ("from", "to", "count"))
        for name in ("from", "count"):
            if name not in entries:
                raise self.fail("sizes", node, f"{name} is missing; write such as {LADDER.example}")
        begin, count = self.real(entries["from"], "sizes.from"), self.number(entries["count"], "sizes.count", 2)
        end = self.real(entries["to"], "sizes.to") if "to" in entries else None
        require(end is None or end > begin, "sizes.to", end, f"give more than sizes.from, {begin:g} ({self.path})")
        return Sizes(begin=begin, end=end, count=count)

    def proportions(self) -> Proportions:
        usual, entries = Proportions(), self.part("proportions", ("width_per_layer", "head_width"))
        width = self.real(entries["width_per_layer"], "proportions.width_per_layer") if "width_per_layer" in entries \
            else usual.width_per_layer  # fmt: skip
        head = self.number(entries["head_width"], "proportions.head_width", 4) if "head_width" in entries \
            else usual.head_width  # fmt: skip
        return Proportions(width, head)

    def rules(self) -> dict[str, Rule]:
        if "rules" not in self.root:
            raise UserError(
                f"rules: {self.path} has none; rate and batch must go with the size: write such as "
                "rules: {learning_rate: {value: 1e-3, at: 1e7, exponent: -0.25}, global_batch: 256}"
            )
        found = {name: self.rule(name, node) for name, node in self.part("rules", RULES).items()}
        for name in RULES:
            remedy = f"give a number, or value, at and exponent ({self.path})"
            require(name in found, f"rules.{name}", None, remedy)
        return found

    def rule(self, name: str, node: yaml.Node) -> Rule:
        """A number for all sizes, or value, at and exponent."""
        place = f"rules.{name}"
        if isinstance(node, yaml.ScalarNode):
            return Rule(self.real(node, place), 1.0, 0.0)
        entries = dict(self.mapping(node, place))
        if set(entries) != {"value", "at", "exponent"}:
            raise self.fail(place, node, "give value, at (parameters) and exponent, or one number for all sizes")
        text = self.scalar(entries["exponent"], f"{place}.exponent")
        exponent = scalar(text, plain=True, kinds=(float,))
        if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not -2 <= exponent <= 2:
            raise self.fail(f"{place}.exponent", entries["exponent"], f"{text!r} is not allowed; give -2 to 2")
        value, at = (self.real(entries[key], f"{place}.{key}") for key in ("value", "at"))
        return Rule(value, at, float(exponent))

    def abilities(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, node in self.part("abilities", ABILITY_KEYS).items():
            if name == "questions":
                found[name] = self.number(node, "abilities.questions", 20)
            elif name == "labelled":
                entries = self.mapping(node, "abilities.labelled")
                found[name] = {probe: self.probe(own, f"abilities.labelled.{probe}") for probe, own in entries}
            else:
                items = node.value if isinstance(node, yaml.SequenceNode) else [node]
                found[name] = [self.path_of(self.scalar(item, "abilities.blimp")) for item in items]
        return found

    def probe(self, node: yaml.Node, place: str) -> dict[str, Any]:
        """The fields of a `LabelledProbe` but its name."""
        known = [each.name for each in fields(LabelledProbe) if each.name != "name"]
        found: dict[str, Any] = {}
        for key, value in self.mapping(node, place):
            if key not in known:
                raise self.fail(f"{place}.{key}", value, f"no such key; choose of {', '.join(known)}")
            text = self.scalar(value, f"{place}.{key}")
            number = key == "examples"
            found[key] = (
                self.number(value, f"{place}.{key}", 2) if number else self.path_of(text) if key in FILES else text
            )
        for key in FILES:
            if key not in found:
                raise self.fail(place, node, f"{key} is missing; give a file of labelled examples")
        return found

    def path_of(self, text: str) -> str:
        """A path beside the file."""
        return str(whole(Path(self.path).parent / text))
