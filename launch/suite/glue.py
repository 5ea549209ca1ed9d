"""The tasks of GLUE (Wang et al. 2019): what each is, and its files as usual downloads have them.

A folder holds train, dev (or validation; of MNLI the matched one) and perhaps test, in a format of
`engine.data.labelled.files`. Columns have the names of the TSV files of gluebenchmark.com, or those of `datasets`.
CoLA's TSV files have no header there; copies with one are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.data.labelled.files import FORMATS, damage_as_user_error, open_records
from engine.data.labelled.tables import Columns
from engine.data.text.textfile import COMPRESSIONS, text_lines
from engine.durable import write_atomically
from engine.errors import UserError

PAIR = ("sentence1", "sentence2", "label")


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE."""

    folder: str
    """its folder in the usual download"""
    metric: str
    """the one score that is reported and chosen by"""
    columns: tuple[tuple[str, str | None, str], ...]
    """text, second text and label, by the names that files may have"""
    task: str = "sequence_classification"
    dev: tuple[str, ...] = ("dev", "validation")
    in_average: bool = True
    """WNLI is left out of averages, as by Devlin et al. (2019)"""


_SINGLE = (("sentence", None, "label"),)
GLUE = {
    "cola": GlueTask("CoLA", "matthews", _SINGLE),
    "sst2": GlueTask("SST-2", "accuracy", _SINGLE),
    "mrpc": GlueTask("MRPC", "accuracy", (("#1 String", "#2 String", "Quality"), PAIR)),
    "stsb": GlueTask("STS-B", "pearson", (("sentence1", "sentence2", "score"), PAIR), "regression"),
    "qqp": GlueTask(
        "QQP", "accuracy", (("question1", "question2", "is_duplicate"), ("question1", "question2", "label"))
    ),
    "mnli": GlueTask(
        "MNLI",
        "accuracy",
        (("sentence1", "sentence2", "gold_label"), ("premise", "hypothesis", "label"), PAIR),
        dev=("dev_matched", "validation_matched"),
    ),
    "qnli": GlueTask("QNLI", "accuracy", (("question", "sentence", "label"),)),
    "rte": GlueTask("RTE", "accuracy", (PAIR,)),
    "wnli": GlueTask("WNLI", "accuracy", (PAIR,), in_average=False),
}
#: names of CoLA's columns in a file without a header: source, label, the author's mark, sentence
COLA_HEADER = "source\tlabel\tmark\tsentence\n"


@dataclass(frozen=True)
class GlueData:
    """What a task's files say."""

    options: dict[str, object]
    """of a training, by dotted name"""
    copies: dict[Path, Path]
    """files that are to be written, with a header, and what of; see `write_copy`"""


def glue_data(name: str, folder: Path, copies: Path, *, dev_is_test: bool) -> GlueData:
    """The options of a training on a task of GLUE.

    Args:
        folder: of its files.
        copies: where files with a header are to go, where they have none.
        dev_is_test: whether the development examples are the test, unless there is a labelled test.

    Raises:
        UserError: no such folder or file, or columns that the task doesn't have.
    """
    known = GLUE[name]
    train, dev = find(folder, ("train",)), find(folder, known.dev)
    bare = {path for path in (train, dev) if name == "cola" and lacks_header(path)}
    columns = known.columns[0] if train in bare else columns_of(train, known)
    test = next(iter(found(folder, ("test",))), None)
    labelled = test if test is not None and first_label(test, columns) not in (None, "-1") else None
    made = {path: copies / f"{path.name.partition('.')[0]}.tsv" if path in bare else path for path in (train, dev)}
    text, pair, label = columns
    options: dict[str, object] = {
        "task": known.task, "labelled.metric": known.metric, "labelled.train": str(made[train]), "labelled.text": text,
        "labelled.text_pair": pair, "labelled.label": label,
    }  # fmt: skip
    if labelled is None and dev_is_test:
        options["labelled.test"] = str(made[dev])
    else:
        options["labelled.validation"] = str(made[dev])
        options |= {} if labelled is None else {"labelled.test": str(labelled)}
    return GlueData(options, {made[path]: path for path in bare})


def found(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Files of these names in a format of labelled examples."""
    suffixes = [suffix + packed for suffix in FORMATS for packed in ("", *COMPRESSIONS)]
    return [path for name in names for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()]


def find(folder: Path, names: tuple[str, ...]) -> Path:
    """The one file of these names.

    Raises:
        UserError: there is none, or several.
    """
    paths = found(folder, names)
    if not folder.is_dir():
        raise UserError(f"folder: {str(folder)!r} is not there; give that of the task's files, or --data")
    if len(paths) != 1:
        have = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"folder: {folder} must have one file {' or '.join(names)} (.tsv, .jsonl, ...), and has {have}")
    return paths[0]


def columns_of(path: Path, known: GlueTask) -> tuple[str, str | None, str]:
    """The columns of a file, by the first names that it has.

    Raises:
        UserError: it has others.
    """
    failure: UserError | None = None
    for columns in known.columns:
        try:
            first_label(path, columns, strict=True)
        except UserError as error:
            failure = failure or error
            continue
        return columns
    assert failure is not None
    raise failure


def first_label(path: Path, columns: tuple[str, str | None, str], *, strict: bool = False) -> str | None:
    """The label of a file's first example; None where the file has no such columns, unless `strict`, or no examples.

    Raises:
        UserError: `strict`, and it has no such columns.
    """
    try:
        with damage_as_user_error(str(path)):
            records, _ = open_records(str(path), Columns(*columns))
            for _, record in records:
                return str(record[columns[2]])
    except UserError:
        if strict:
            raise
    return None


def lacks_header(path: Path) -> bool:
    """Whether a file of CoLA begins with an example.

    Raises:
        UserError: it can't be read.
    """
    with damage_as_user_error(str(path)):
        first = next(iter(text_lines(path)), "") if ".tsv" in path.suffixes else "sentence"
    return first.rstrip("\r\n").rpartition("\t")[2] != "sentence"


def write_copy(target: Path, source: Path) -> None:
    """Write a file of CoLA with a header.

    Raises:
        UserError: it can't be read.
    """
    with damage_as_user_error(str(source)):
        text = "".join(text_lines(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, COLA_HEADER + text)
