"""From a run's checkpoint to a Hugging Face folder, in one process and without the ranks that wrote it."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError
from engine.model.folder import export_huggingface
from engine.tasks.task import Task
from engine.train.archive import full_weights
from engine.train.checkpoint import STATE_FILE, newest_intact, refuse_damaged


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names, verified: itself, or the newest intact one of a run.

    Raises:
        UserError: there is none, or none that is intact.
    """
    if (path / STATE_FILE).is_file():
        refuse_damaged(path)
        return path
    newest = newest_intact(path / "checkpoints")
    if newest is None:
        raise UserError(f"run: {str(path)!r} holds no checkpoint; give a run's output folder or a step-NNNNNN folder")
    return newest


def export_checkpoint(checkpoint: Path, task: Task, output: Path) -> None:
    """Write a checkpoint of `task` as a Hugging Face folder.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    export_huggingface(full_weights(checkpoint), task.build_model().config, task.tokenizer, output)
