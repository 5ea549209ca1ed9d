"""From a run's files to a Hugging Face folder, in one process and without the ranks that wrote them.

What is exported is the content of a checkpoint, or of the run's own export of its best weights, and nothing else:
today's data and options may be others than those of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.config import TASKS
from engine.errors import UserError
from engine.model.folder import (
    CONFIG_FILE,
    ORIGIN_FILE,
    WEIGHTS_FILE,
    described,
    export_huggingface,
    is_intact,
    read_config,
    read_origin,
    tokenizer_files,
)
from engine.model.roundtrip import RoundTrip
from engine.train.checkpoint.folder import STATE_FILE, RunState, newest_intact, read_state, refuse_damaged
from engine.zero.archive import full_weights


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
        what = "is an exported model already" if (path / WEIGHTS_FILE).is_file() else "holds no checkpoint"
        raise UserError(f"run: {str(path)!r} {what}; give a run's output folder or a step-NNNNNN folder")
    return newest


def best_of(run: Path) -> dict[str, Any] | None:
    """What a run's own export tells of its best weights: metric, value and step; None where it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "export" / ORIGIN_FILE
    origin = read_origin(path.parent)
    if origin is None and path.is_file():
        raise UserError(f"run: {path} is damaged; export the last checkpoint with --weights last")
    return (origin or {}).get("best")


def export_best(run: Path, output: Path, *, check: bool = True) -> RoundTrip | None:
    """Write the best weights of a run, which its own export holds; what they were compared with, if `check`.

    Raises:
        UserError: a file of that is missing or damaged, or what was written isn't the model.
    """
    folder = run / "export"
    if not is_intact(folder):
        raise UserError(f"run: {folder / WEIGHTS_FILE} is not what was written there; take --weights last")
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"run: {folder / WEIGHTS_FILE} cannot be read ({error}); take --weights last") from error
    origin = read_origin(folder)
    return export_huggingface(weights, _config(folder), tokenizer_files(folder), output, origin, check=check)


def export_checkpoint(checkpoint: Path, output: Path, *, check: bool = True) -> tuple[RunState, RoundTrip | None]:
    """Write a checkpoint as a Hugging Face folder.

    Returns:
        The state of the checkpoint, and what the folder was compared with, if `check`.

    Raises:
        UserError: a file of the checkpoint is missing or damaged, an earlier version saved it, or what was written
            isn't the model.
    """
    state = read_state(checkpoint)
    if state.facts is None:
        raise UserError(
            f"run: {checkpoint} was saved by an earlier version, without its labels and tokenizer; go on with that run "
            "(--resume auto) for a step or more, then export it"
        )
    origin = {"step": state.step, "best": None, "facts": state.facts}
    config = _config(checkpoint)
    if config.architectures is None:  # an earlier version saved it
        config = described(config, TASKS.get(state.config["task"]).load().export_class(config))
    weights, tokenizer = full_weights(checkpoint), tokenizer_files(checkpoint)
    return state, export_huggingface(weights, config, tokenizer, output, origin, check=check)


def _config(folder: Path) -> Any:
    try:
        return read_config(folder / CONFIG_FILE)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"run: {folder / CONFIG_FILE} cannot be read ({error}); restore it") from error
