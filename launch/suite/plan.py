"""Which runs a suite makes: a cell for each model, task and setting, which is a folder as `zerobert seeds` makes it.

<output>/suite.json                        the cells
<output>/<model>/<task>/<setting>/         a cell: seeds.json and its runs, seed-N, each with its log, seed-N.log
<output>/report/                           of all of them
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.data.labelled.files import DATASETS_PREFIX
from engine.durable import write_atomically
from engine.errors import UserError
from engine.hub import hub_model
from launch.api import in_yaml
from launch.configure.options import joined
from launch.seeds.plan import Member, Record, is_finished, plan
from launch.suite.glue import GLUE, GlueData, glue_data, write_copy
from launch.suite.reading import NAME, RESERVED, Source, SuiteFile

SUITE_RECORD = "suite.json"
#: options that name files of data
DATA = ("labelled.train", "labelled.validation", "labelled.test", "data.path")


@dataclass(frozen=True)
class Cell:
    """A model, a task and a setting; the runs of its seeds."""

    model: str
    task: str
    setting: str
    record: Record
    glue: str | None = None
    members: tuple[Member, ...] = field(default=(), compare=False)
    """its runs; none of a cell that was read from suite.json"""

    @property
    def name(self) -> str:
        """Its folder below that of the suite."""
        return f"{self.model}/{self.task}/{self.setting}"


@dataclass(frozen=True)
class Suite:
    """What a call is to make."""

    output: Path
    cells: tuple[Cell, ...]
    copies: Mapping[Path, Path]
    """files of data that are to be written first, and what of"""


def plan_suite(file: SuiteFile, output: Path | None, data: Path | None, models: Sequence[str]) -> Suite:
    """All cells of a suite, each validated.

    Args:
        output: replaces the file's.
        data: replaces the file's.
        models: replace the file's: folders or names of models, or NAME=FOLDER.

    Raises:
        UserError: the first option that is wrong, with the place that it has in the file, or that the runs in the
            folder had differently; a file that is not there.
    """
    beside = file.path.parent
    where = whole(output or (beside / file.output if file.output else Path("runs") / file.path.stem))
    root = whole(data or beside / (file.data or ""))
    glue = {name: glue_of(file, name, root, where / "data" / name) for name in file.tasks}
    copies = {target: path for told in glue.values() if told is not None for target, path in told.copies.items()}
    chosen = given_models(models) or dict(file.models) or {"": Source("models", {}, {})}
    cells = []
    for model, task, setting in itertools.product(chosen, file.tasks, file.settings):
        told = glue[task]
        known = [] if told is None else [Source(f"tasks.{task}.glue", told.options, {})]
        sources = [file.base, chosen[model], *known, file.tasks[task].source, *file.settings[setting]]
        cells.append(_Planning(file, where, root, copies).cell((model, task, setting), sources))
    return Suite(where, tuple(cells), copies)


def whole(path: Path) -> Path:
    """An absolute path without detours, which is the same from every working folder."""
    return Path(os.path.abspath(path))  # noqa: PTH100  symbolic links stay


def given_models(models: Sequence[str]) -> dict[str, Source]:
    """Models of the command line by their names.

    Raises:
        UserError: two of the same name, or one that can't be a folder.
    """
    found: dict[str, Source] = {}
    for text in models:
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (name_of(text), text)
        if not NAME.fullmatch(name) or name in RESERVED or not folder or name in found:
            raise UserError(f"models: {text!r} is not allowed; give each as NAME=FOLDER, with a name of its own")
        folder = str(whole(Path(folder))) if Path(folder).exists() else folder
        found[name] = Source("models", {"model.init_from": folder}, {})
    return found


def name_of(model: str) -> str:
    """A name for a model's folder: its last part that tells anything."""
    silent = ("export", "model", *RESERVED)
    parts = [part for part in Path(model).parts if part not in silent and NAME.fullmatch(part)]
    return parts[-1].partition("@")[0] if parts else "model"


def glue_of(file: SuiteFile, name: str, root: Path, copies: Path) -> GlueData | None:
    """What the files of a GLUE task say; None for another task.

    Raises:
        UserError: no such task, or its files are not there.
    """
    task = file.tasks[name]
    if task.glue is None:
        return None
    if task.glue not in GLUE:
        raise UserError(
            f"tasks.{name}.glue: {task.glue!r} is not allowed; choose one of {', '.join(GLUE)} ({file.path})"
        )
    usual = [root / GLUE[task.glue].folder, root / task.glue]
    folder = root / task.folder if task.folder else next((path for path in usual if path.is_dir()), usual[0])
    try:
        told = glue_data(task.glue, folder, copies, dev_is_test=file.dev_is_test)
    except UserError as error:
        raise UserError(f"tasks.{name}.{error}" if str(error).startswith("folder:") else str(error)) from error
    if task.folds is None:
        return told
    others = ("labelled.validation", "labelled.test")  # each fold is both
    return replace(told, options={name: value for name, value in told.options.items() if name not in others})


@dataclass(frozen=True)
class _Planning:
    """What all cells share."""

    file: SuiteFile
    output: Path
    root: Path
    copies: Mapping[Path, Path]

    def cell(self, names: tuple[str, str, str], sources: Sequence[Source]) -> Cell:
        """A cell, validated; an empty name of its model is made from the model."""
        options: dict[str, Any] = {}
        for source in sources:
            options = joined(options, dict(source.values))
        options = {name: located(name, value, self.root, self.file.path.parent) for name, value in options.items()}
        names = (names[0] or name_of(str(options.get("model.init_from") or "model")), *names[1:])
        folder, task = self.output.joinpath(*names), self.file.tasks[names[1]]
        arguments = [f"--{name}={in_yaml(value)}" for name, value in options.items()]
        try:
            _, record, members = plan([*arguments, f"--output={folder}"], self.file.seeds, task.folds)
            check_files(options, self.copies)
        except UserError as error:
            place = _place(str(error), sources) or "/".join(names)
            raise UserError(f"{error} ({place} of {self.file.path})") from error
        named = [
            replace(member, name=f"{'/'.join(names)}/{member.name}", log=folder / f"{member.name}.log")
            for member in members
        ]
        return Cell(*names, record, task.glue, tuple(named))


def located(name: str, value: Any, root: Path, beside: Path) -> Any:
    """A path of data below its root; that of a model or of a DeepSpeed JSON beside the suite's file if it is there."""
    if not isinstance(value, str):
        return value
    if name in DATA:
        return value if value.startswith(DATASETS_PREFIX) else str(whole(root / value))
    if name in ("model.init_from", "deepspeed_config") and (beside / value).exists():
        return str(whole(beside / value))
    return value


def check_files(options: Mapping[str, Any], copies: Mapping[Path, Path]) -> None:
    """Refuse at once what every run would refuse.

    Raises:
        UserError: data or a model that is not there.
    """
    for name in (*DATA, "model.init_from"):
        path = options.get(name)
        if not path or path.startswith(DATASETS_PREFIX) or Path(path) in copies or Path(path).exists():
            continue
        if name != "model.init_from" or hub_model(path) is None:
            raise UserError(f"{name}: {path!r} is not there; correct it")


def _place(message: str, sources: Sequence[Source]) -> str | None:
    """Where the option that a message begins with stands; the last source counts."""
    name = message.partition(":")[0]
    return next((source.where(name) for source in reversed(sources) if name in source.values), None)


def chosen_cells(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Cells whose name, or a part of it, fits a pattern; all of them without patterns.

    Raises:
        UserError: a pattern that fits none.
    """
    for pattern in patterns:
        if not any(_fits(cell, pattern) for cell in cells):
            raise UserError(f"only: {pattern!r} fits no cell; give such as {cells[0].name}, or a part")
    return [cell for cell in cells if not patterns or any(_fits(cell, pattern) for pattern in patterns)]


def _fits(cell: Cell, pattern: str) -> bool:
    names = (cell.name, cell.model, cell.task, cell.setting)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def write_cells(output: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Keep the cells in the suite's folder, beside those of earlier calls that have a finished run; all of them."""
    names = {cell.name for cell in cells}
    earlier = [cell for cell in read_cells(output) if cell.name not in names and finished_runs(output, cell)]
    told = [
        {"model": cell.model, "task": cell.task, "setting": cell.setting, "glue": cell.glue,
         "record": asdict(cell.record)}
        for cell in (*cells, *earlier)
    ]  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / SUITE_RECORD, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return [*cells, *earlier]


def read_cells(output: Path) -> list[Cell]:
    """The cells of a suite's folder; none where there is no suite.

    Raises:
        UserError: the file isn't what was written.
    """
    path = output / SUITE_RECORD
    if not path.is_file():
        return []
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return [
            Cell(each["model"], each["task"], each["setting"], Record(**each["record"]), each["glue"]) for each in told
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: it is no record of a suite ({error!r}); remove it") from error


def finished_runs(output: Path, cell: Cell) -> list[str]:
    """Names of a cell's runs that have a report."""
    return [name for name in cell.record.names if is_finished(output / cell.name / name)]


def prepare(suite: Suite, cells: Sequence[Cell]) -> tuple[list[Cell], list[Member]]:
    """Write what the runs need; all cells of the folder, and the runs that are missing of those that are wanted."""
    for target, source in suite.copies.items():
        write_copy(target, source)
    everything = write_cells(suite.output, suite.cells)
    return everything, [member for cell in cells for member in cell.members if not member.is_finished]
