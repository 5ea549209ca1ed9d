"""The task of a model that is to be pruned: its own run's, or one on a labelled file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import RunConfig
from engine.errors import UserError
from launch.configure.options import parse

if TYPE_CHECKING:
    from engine.compress.folder import Source
    from engine.tasks.finetune import FineTuning

#: sections of what training has beside the plain loss of a task
METHODS = ("adapter", "regularise", "distil")
#: by a folder's problem_type, the task of a classifier's head that isn't sequence_classification
PROBLEMS = {"regression": "regression", "multi_label_classification": "multi_label"}


def task_of(model: str, source: Source, data: str | None, more: Sequence[str]) -> FineTuning:
    """The task of a model, without what only training has: adapters and regularisers.

    Args:
        model: what the user names.
        source: its folder.
        data: a run, a labelled file, or None where the model is a run.
        more: options of `zerobert train` that are to differ.

    Raises:
        UserError: data, options, or classes that aren't the model's.
    """
    from engine.compress.score import check_classes
    from engine.tasks.finetune import FineTuning
    from launch.train import build_task

    task = build_task(configuration(model, source, data, more))
    if not isinstance(task, FineTuning) or task.head != source.head:
        raise UserError(f"data: {data or model} is of another task than the model's head, {source.head}")
    check_classes(task.names, source.config)
    return task


def configuration(model: str, source: Source, data: str | None, more: Sequence[str]) -> RunConfig:
    """That of a run which would train the model on the data."""
    run = next((Path(each) for each in (data, model) if each and is_run(each)), None)
    if run is None and data is None:
        raise UserError(f"data: not given, and {model!r} is no run; give the run that trained it, or a labelled file")
    given = [] if run is None else ["--config", str(run / "config.yaml")]
    if run is None or (data is not None and Path(data) != run):
        assert data is not None
        given += [f"--labelled.train={data}"]
    if run is None:
        kind = PROBLEMS.get(source.config.problem_type or "", source.head)
        given += [f"--task={kind}"]
    given += [f"--model.init_from={source.folder}", "--output=unused", "--monitor.tensorboard=false", "--resume=never"]
    config = parse([*given, *more])
    plain = {name: type(part)() for name, part in vars(config).items() if name in METHODS}
    whole, labelled = replace(config.train, freeze=None), replace(config.labelled, augment=None)
    return replace(config, **plain, train=whole, labelled=labelled)


def is_run(path: str) -> bool:
    """Whether it is the folder of a training run."""
    return (Path(path) / "config.yaml").is_file()
