"""What is asked of a model, and what it answered; without torch, so that a command line can ask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import architecture_of
from engine.config.data import Pooling
from engine.errors import require

#: of a column, so that a CSV file and a message can hold it as it is
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class LabelledProbe:
    """A classifier of a model's frozen vectors."""

    name: str
    """of the ability"""
    train: str
    """labelled examples, see `engine.data.labelled.files.read_examples`"""
    test: str
    """further ones, all of which are asked"""
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    pooling: Pooling = "mean"
    """what a text's vector is: the mean of its tokens' last states, or the first token's"""
    examples: int = 2000
    """training examples that are learned from, at most; drawn by the seed"""


@dataclass(frozen=True)
class Request:
    """The questions, the same for every model of a study."""

    store: Path | None = None
    """prepared text whose held-out words are asked for; None: no such questions"""
    templates: bool = True
    """whether minimal pairs of grammar are asked that are made of templates"""
    pairs: tuple[Path, ...] = ()
    """further minimal pairs: files of BLiMP's format, or folders of them"""
    labelled: tuple[LabelledProbe, ...] = ()
    items: int = 500
    """questions of an ability, at most; probes ask all of their test examples"""
    context: int = 64
    """tokens that a held-out word is seen in, special tokens included"""
    length: int = 128
    """tokens that are read of a labelled text or pair"""
    seed: int = 0
    """of the choice of questions and of examples"""

    def validate(self) -> None:
        """
        Raises:
            UserError: a number out of range, a name that no column can have or that is there twice, or nothing asked.
        """
        require(self.items >= 2, "items", self.items, "give at least 2 questions of an ability")
        require(self.context >= 8, "context", self.context, "give at least 8 tokens")
        require(self.length >= 8, "length", self.length, "give at least 8 tokens")
        require(self.seed >= 0, "seed", self.seed, "give 0 or more")
        names = [probe.name for probe in self.labelled]
        for probe in self.labelled:
            check_name(probe.name, "labelled")
            require(names.count(probe.name) == 1, "labelled", probe.name, "two probes have that name; rename one")
            require(probe.examples >= 2, f"{probe.name}: examples", probe.examples, "give at least 2 training examples")
        asked = self.store is not None or self.templates or self.pairs or self.labelled
        require(bool(asked), "templates", self.templates, "nothing is asked; give a store, pairs or labelled examples")


@dataclass(frozen=True)
class Asked:
    """An ability as it was measured."""

    name: str
    items: int
    """questions"""
    chance: float | None
    """share of right answers of a guess; None where a guess is right hardly ever"""
    discontinuous: str
    """the column that counts right answers"""
    continuous: tuple[str, ...]
    """columns that change smoothly"""


@dataclass(frozen=True)
class Scores:
    """What a model answered."""

    abilities: tuple[Asked, ...] = ()
    columns: Mapping[str, float] = field(default_factory=dict)
    """by the names of columns: acc_, prob_, logp_, perhaps brier_, and items_ of each ability"""

    def __or__(self, other: Scores) -> Scores:
        """Both.

        Raises:
            UserError: an ability of the same name in both.
        """
        for ability in other.abilities:
            known = ability.name in {own.name for own in self.abilities}
            require(not known, "name", ability.name, "two abilities have that name; rename a probe or a file of pairs")
        return Scores((*self.abilities, *other.abilities), {**self.columns, **other.columns})


def scored(name: str, items: int, chance: float | None, accuracy: float, **continuous: float) -> Scores:
    """The scores of one ability.

    Args:
        continuous: by the beginnings of their columns' names: prob, logp, brier.
    """
    smooth = {f"{kind}_{name}": value for kind, value in continuous.items()}
    columns = {f"acc_{name}": accuracy, **smooth, f"items_{name}": float(items)}
    return Scores((Asked(name, items, chance, f"acc_{name}", tuple(smooth)),), columns)


def check_positions(field: str, wanted: int, config: Any, folder: Path) -> None:
    """
    Raises:
        UserError: a model has fewer positions than tokens are wanted.
    """
    most = architecture_of(config).positions(config)
    remedy = f"{folder} has {most} positions: give at most that, the same for all models of a study"
    require(wanted <= most, field, wanted, remedy)


def check_name(name: str, field: str) -> None:
    """
    Raises:
        UserError: no column can have that name.
    """
    require(bool(_NAME.fullmatch(name)), field, name, "give a name of letters, digits, _, . and -")
