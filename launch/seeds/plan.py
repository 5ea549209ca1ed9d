"""Which runs the command makes, where, and with which options; and the record of that in their folder.

<output>/seeds.json           seeds, folds and options of all runs
<output>/seed-N/              a run; fold-N or seed-N-fold-M with folds
<output>/report/              of all of them
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.config import TASKS, RunConfig
from engine.durable import write_atomically
from engine.errors import UserError
from launch.configure.options import parse_given

RECORD = "seeds.json"
#: options of the training that this command gives itself
OWN = ("--output", "--seed", "--resume")
#: options that change no score, and may differ between two calls: sections, and fields
FREE_SECTIONS = ("monitor", "fault", "zero")
FREE_FIELDS = (
    "train.micro_batch", "train.zero_stage", "train.threads", "train.keep", "train.async_save", "train.save_interval",
    "train.save_at", "train.log_interval", "train.kernels", "train.audit", "train.profile", "train.verify_update",
    "data.workers",
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One of the runs."""

    folder: Path
    options: list[str]
    """of its training"""
    name: str
    log: Path | None = None
    """the file that gets what it prints; None: it prints where this command prints"""

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended with a report."""
        return is_finished(self.folder)


@dataclass(frozen=True)
class Record:
    """What a folder of seeds holds."""

    task: str
    metric: str
    """the score that chooses the best weights"""
    seeds: list[int]
    folds: int | None
    options: dict[str, Any]
    """configuration that all runs share, by dotted name"""

    @property
    def names(self) -> list[str]:
        """The folders of the runs."""
        if self.folds is None:
            return [f"seed-{seed}" for seed in self.seeds]
        folds = [f"fold-{fold}" for fold in range(1, self.folds + 1)]
        return folds if len(self.seeds) == 1 else [f"seed-{seed}-{fold}" for seed in self.seeds for fold in folds]

    def write(self, output: Path) -> None:
        """Keep it in the folder of the runs."""
        write_atomically(output / RECORD, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


def is_finished(run: Path) -> bool:
    """Whether a run has ended with a report, whose text is written last."""
    return (run / "report" / "report.txt").is_file()


def read_record(output: Path) -> Record | None:
    """The record of a folder of seeds; None where the folder has none.

    Raises:
        UserError: it isn't what was written.
    """
    path = output / RECORD
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: it is no record of seeds ({error}); remove it") from error


def plan(
    arguments: Sequence[str], seeds: int | Sequence[int] | None, folds: int | None
) -> tuple[Path, Record, list[Member]]:
    """The folder, what it will hold, and its runs.

    Args:
        arguments: options of the training.
        seeds: number of seeds, the training's own and those after it; or the seeds, which are in range; None: the
            training's own.
        folds: number of folds; None: none.

    Raises:
        UserError: the first option that is wrong, or that another call for this folder had differently.
    """
    config, given = parse_given(list(arguments))
    task = TASKS.get(config.task)
    if not task.metrics:
        raise UserError(f"task: {config.task!r} is not allowed; seeds compares scores that only fine-tuning reports")
    if config.resume not in ("never", "auto"):
        raise UserError(f"resume: {config.resume!r} is not allowed; leave it out, since each run goes on by itself")
    if fold := next((name for name in ("labelled.folds", "labelled.fold") if name in given), None):
        raise UserError(f"{fold}: given beside seeds; give --folds before the -- instead")
    if folds and config.labelled.test:
        raise UserError(f"labelled.test: {config.labelled.test!r} is not allowed; each fold is the test of its run")
    metric = config.part(task.section).metric
    if metric is None:
        raise UserError(f"{task.section}.metric: name the score by which runs are compared: {', '.join(task.metrics)}")
    numbers = list(seeds) if isinstance(seeds, Sequence) else [config.seed + number for number in range(seeds or 1)]
    output = Path(config.output)
    if (output / "config.yaml").exists():
        raise UserError(f"output: {output} is the folder of a single run; give another --output")
    record = Record(config.task, metric, numbers, folds, shared_options(config))
    check_same_options(output, record)
    members = [
        Member(output / name, [*without_own(arguments), f"--output={output / name}", "--resume=auto", *own], name)
        for name, own in zip(record.names, _own_options(record), strict=True)
    ]
    if folds or not isinstance(seeds, Sequence):
        parse_given(members[-1].options)  # its seed, and folds
    return output, record, members


def _own_options(record: Record) -> list[list[str]]:
    """What each run has to itself, in the order of their names."""
    folds = (
        [[]]
        if record.folds is None
        else [[f"--labelled.folds={record.folds}", f"--labelled.fold={fold + 1}"] for fold in range(record.folds)]
    )
    return [[f"--seed={seed}", *fold] for seed in record.seeds for fold in folds]


def without_own(arguments: Sequence[str]) -> list[str]:
    """The options of the training without those that each run gets from this command."""
    return without(arguments, OWN)


def without(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """Options without those of some names, such as --seed, and their values."""
    kept, dropping = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("--"):
            dropping = name in names and not equals
            if name in names:
                continue
        if not dropping:
            kept.append(argument)
    return kept


def shared_options(config: RunConfig) -> dict[str, Any]:
    """The options that change scores, by dotted name, as JSON has them."""
    values: dict[str, Any] = {}
    for section, fields in json.loads(json.dumps(config.to_dict())).items():
        if isinstance(fields, dict):
            values |= {f"{section}.{name}": value for name, value in fields.items() if section not in FREE_SECTIONS}
        elif f"--{section}" not in OWN:
            values[section] = fields
    return {name: value for name, value in values.items() if name not in FREE_FIELDS}


def check_same_options(output: Path, record: Record) -> None:
    """Refuse to mix runs of different settings in one report.

    Raises:
        UserError: names the first option that the runs in the folder had differently.
    """
    before = read_record(output)
    if before is None:
        return
    if before.folds != record.folds:
        raise UserError(
            f"folds: {record.folds} is not what the runs in {output} have ({before.folds}); give another --output"
        )
    check_options("runs", output, before.options, record.options)
    missing = sorted(set(before.seeds) - set(record.seeds))
    if missing and record.folds is None:
        print(f"note: seed(s) {', '.join(map(str, missing))} of an earlier call are not in this report", flush=True)


def check_options(what: str, output: Path, before: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse runs of other options beside those that a folder has.

    Args:
        what: what the folder has.
        before: options of those; a name that isn't there is not compared.

    Raises:
        UserError: names the first option that they had differently.
    """
    for name, value in options.items():
        old = before.get(name, value)
        if old != value:
            raise UserError(
                f"{name}: {value!r} is not what the {what} in {output} have ({old!r}); put it back, or give another "
                "--output"
            )
