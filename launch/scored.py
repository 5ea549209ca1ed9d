"""The task whose examples score a model: that of its run, of another run, or of a labelled file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.tasks.finetune import FineTuning

#: sections of what training has beside the plain loss of a task
METHODS = ("adapter", "regularise", "distil", "prune")
#: tasks of heads on texts by problem_type of config.json
OF_TEXTS = {
    "single_label_classification": "sequence_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}


class Scored(Protocol):
    """A model that is to be scored, opened."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        ...

    @property
    def head(self) -> str:
        """One of `Architecture.export_classes`."""
        ...


def scored_task(
    given: str, model: Scored, data: str | None, options: Sequence[str] = (), *, file_is_test: bool = False
) -> FineTuning:
    """The task of a model, without what only training has: adapters, regularisers, teachers.

    Args:
        given: what the user names the model by.
        data: a run, a labelled file, or None where the model is a run. A file takes the place of the training examples.
        options: of `zerobert train`, such as "--labelled.text=review"; what they say counts.
        file_is_test: a file's rows are those that score the model too, all of them.

    Raises:
        UserError: neither a run nor a file, options, another task, or classes that aren't the model's.
    """
    from engine.compress.score import check_classes
    from engine.tasks.finetune import FineTuning
    from launch.train import build_task

    task = build_task(_configuration(given, model, data, options, file_is_test))
    if not isinstance(task, FineTuning) or task.head != model.head:
        raise UserError(f"data: {data or given} is of another task than the model's head, {model.head}")
    check_classes(task.names, model.config)
    return task


def _configuration(
    given: str, model: Scored, data: str | None, options: Sequence[str], file_is_test: bool
) -> RunConfig:
    """That of a run which would train the model on the data."""
    from launch.configure.options import parse

    check_data(given, data)
    run = next((Path(each) for each in (data, given) if each and is_run(each)), None)
    told = [f"--task={task_of(model)}"] if run is None else ["--config", str(run / "config.yaml")]
    if data is not None and not is_run(data):
        told.append(f"--labelled.train={data}")
        told += [f"--labelled.validation={data}", "--labelled.test=null"] if file_is_test else []
    told += [f"--model.init_from={model.folder}", "--output=unused", "--monitor.tensorboard=false", "--resume=never"]
    config = parse([*told, *options])
    plain = {name: type(part)() for name, part in vars(config).items() if name in METHODS}
    whole, labelled = replace(config.train, freeze=None), replace(config.labelled, augment=None)
    return replace(config, **plain, train=whole, labelled=labelled)


def check_data(given: str, data: str | None) -> None:
    """Refuse data that aren't there, without opening a model.

    Raises:
        UserError: neither a run nor a file, or nothing where the model is no run.
    """
    if data is None and not is_run(given):
        raise UserError(f"data: not given, and {given!r} is no run; give the run that it is of, or a labelled file")
    if data is not None and not is_run(data) and not Path(data).is_file():
        raise UserError(f"data: {data!r} is neither a run's folder nor a file; give one of these")


def task_of(model: Scored) -> str:
    """The task of a model's head."""
    if model.head != "sequence_classification":
        return model.head
    single = "regression" if model.config.num_labels == 1 else "single_label_classification"
    return OF_TEXTS[model.config.problem_type or single]


def is_run(path: str) -> bool:
    """Whether it is the folder of a training run."""
    return (Path(path) / "config.yaml").is_file()
