"""What is compared: finished runs of the same task on the same examples, alone or in folders of seeds, as pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UserError
from engine.tasks.outcomes import Outcomes, read_outcomes
from launch.seeds.plan import is_finished, read_record

#: facts that tell the examples of a report, in the order in which runs report on them
EXAMPLES = ("test examples", "validation examples")
TOKENIZER = "tokenizer's rules and pieces"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    task: str
    facts: Mapping[str, Any]
    outcomes: Outcomes


@dataclass(frozen=True)
class Compared:
    """Pairs of runs on the same examples."""

    pairs: list[tuple[Run, Run]]
    seeds: bool
    """whether they are the runs of two folders of seeds"""

    @property
    def same_examples(self) -> bool:
        """Whether all pairs are of the same examples."""
        return len({(pair[0].outcomes.truth, _fingerprint(pair[0])) for pair in self.pairs}) == 1

    @property
    def measures(self) -> list[str]:
        """Scores that all runs tell of single examples, the main one first."""
        runs = [run for pair in self.pairs for run in pair]
        return [name for name in runs[0].outcomes.scores if all(name in run.outcomes.scores for run in runs)]


def load(first: Path, second: Path) -> Compared:
    """Read two runs, or two folders of seeds.

    Raises:
        UserError: one is no finished run, or they are of different tasks or examples, or only one is a folder of seeds.
    """
    records = [read_record(folder) for folder in (first, second)]
    if all(record is None for record in records):
        found = Compared([(read_run(first), read_run(second))], seeds=False)
    else:
        for folder, record in zip((first, second), records, strict=True):
            if record is None:
                raise UserError(f"{folder}: it is no folder of zerobert seeds and the other is; give two of a kind")
        names = [record.names for record in records if record is not None]
        shared = [name for name in names[0] if name in names[1]]
        if len(shared) < 2:
            raise UserError(f"{second}: it shares fewer than two seeds or folds with {first}; run both with the same")
        found = Compared([(read_run(first / name), read_run(second / name)) for name in shared], seeds=True)
    for pair in found.pairs:
        check_pair(*pair)
    if not found.measures:
        raise UserError(f"{second}: its report has no score of single examples in common with {first}'s")
    return found


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        UserError: it isn't one.
    """
    from engine.model.folder import read_origin

    if not (folder / "config.yaml").is_file():
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder}: it {what}; give the output folder of a finished run")
    task = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("task", "pretrain")
    if not is_finished(folder):
        raise UserError(f"{folder}: the run ({task}) has no report; finish it, or give a fine-tuning run that is over")
    facts = (read_origin(folder / "export") or {}).get("facts") or {}
    return Run(folder, task, facts, read_outcomes(folder / "report"))


def check_pair(first: Run, second: Run) -> None:
    """Refuse to compare what isn't comparable.

    With the same tokenizer the examples are compared by their fingerprints, texts included; else by what is right of
    each.

    Raises:
        UserError: other tasks or examples.
    """
    if first.task != second.task:
        raise UserError(f"{second.folder}: its task is {second.task} and that of {first.folder} is {first.task}")
    same = first.outcomes.truth == second.outcomes.truth
    if same and first.facts.get(TOKENIZER) == second.facts.get(TOKENIZER) is not None:
        own, other = (_fingerprint(run) for run in (first, second))
        same = own == other
    if not same:
        raise UserError(
            f"{second.folder}: it is scored on other examples ({len(second.outcomes)}) than {first.folder} "
            f"({len(first.outcomes)}); give both the same labelled.test"
        )


def _fingerprint(run: Run) -> str | None:
    """That of the examples that a run reports on."""
    return next((run.facts[name] for name in EXAMPLES if run.facts.get(name)), None)
