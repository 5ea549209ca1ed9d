"""The task whose examples score a model: that of a run, or of a labelled file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.predict.model import ModelFolder
    from engine.tasks.task import Task

#: tasks of heads on texts by problem_type of config.json
OF_TEXTS = {
    "single_label_classification": "sequence_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}


def scored_task(data: str, model: ModelFolder, options: Sequence[str] = ()) -> Task:
    """The task of a run or of a labelled file, whose every row is then an example of training and of the test alike.

    Args:
        data: the folder of a run, or a file of labelled examples.
        model: what is to be scored; of a file it tells the task and the tokenizer.
        options: of `zerobert train`, such as "--labelled.text=review"; what they say counts.

    Raises:
        UserError: neither a run nor a file, or one that doesn't fit.
    """
    from engine.dist import World
    from engine.train.start import with_hub_model
    from launch.configure.options import parse
    from launch.train import build_task

    path = Path(data)
    if (path / "config.yaml").is_file():
        given = ["--config", str(path / "config.yaml"), *options]
    elif path.is_file():
        files = [f"--labelled.{name}={path}" for name in ("train", "validation")]
        given = [f"--task={task_of(model)}", f"--model.init_from={model.folder}", *files, *options]
    else:
        raise UserError(f"data: {data!r} is neither a run's folder nor a file; give one of these")
    return build_task(with_hub_model(parse(given), None, World()))


def task_of(model: ModelFolder) -> str:
    """The task of a model's head."""
    if model.head != "sequence_classification":
        return model.head
    single: Any = "regression" if model.config.num_labels == 1 else "single_label_classification"
    return OF_TEXTS[model.config.problem_type or single]
