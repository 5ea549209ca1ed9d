"""What is refused of an ablation before its first run: switches that change nothing, sizes that the data lacks."""

from __future__ import annotations

from pathlib import Path

from engine.data.labelled.answers.files import read_questions
from engine.data.labelled.files import damage_as_user_error, open_records
from engine.data.labelled.tables import Columns
from engine.data.labelled.tagged.files import read_tagged
from engine.data.text.textfile import text_lines
from engine.errors import UserError
from launch.ablate.reading import ALL, BASE, parts_of
from launch.configure.options import parse
from launch.suite.plan import Cell, Suite


def check_ablation(suite: Suite) -> None:
    """Refuse what would compare a setting with itself, and what most runs would refuse.

    Raises:
        UserError: names the switch or the size.
    """
    first: dict[tuple[object, ...], str] = {}
    counts: dict[str, int] = {}
    for cell in suite.cells:
        found = parts_of(cell.setting)
        assert found is not None
        switch, size = found
        options = sorted((name, repr(value)) for name, value in cell.record.options.items())
        same = first.setdefault((cell.model, cell.task, size, *options), switch)
        if same != switch:
            raise UserError(
                f"switches.{switch}: of {cell.task} its options are those of {same}, or change no score; give it others"
            )
        if size != ALL and switch == BASE:
            counts.setdefault(cell.task, 0)
            counts[cell.task] = counts[cell.task] or _count(suite, cell)
            _check_size(int(size), counts[cell.task], cell)


def _check_size(size: int, count: int, cell: Cell) -> None:
    if size > count:
        path = cell.record.options["labelled.train"]
        raise UserError(
            f"sizes: {size} is not allowed; {path} has {count} training examples: give at most that, or {ALL}"
        )


def _count(suite: Suite, cell: Cell) -> int:
    """The examples of a task's training file, of which some may be held out; of answers their contexts.

    Raises:
        UserError: it can't be read.
    """
    config = parse(cell.members[0].options)
    labelled, path = config.labelled, str(config.labelled.train)
    if (bare := suite.copies.get(Path(path))) is not None:  # its copy, with a header, may not be there yet
        return sum(1 for _ in text_lines(bare))
    if config.task == "question_answering":
        return len({question.context for question in read_questions(path)})
    if config.task == "token_classification":
        return len(read_tagged(path, labelled.text, labelled.label))
    with damage_as_user_error(path):
        return sum(1 for _ in open_records(path, Columns(labelled.text, None, ""))[0])
