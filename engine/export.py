"""From a run's checkpoint to a Hugging Face folder, in one process and without the ranks that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.model.folder import export_huggingface
from engine.tasks.task import Task
from engine.train.checkpoint import STATE_FILE, complete_checkpoints
from engine.train.quiet import import_deepspeed


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run.

    Raises:
        UserError: there is none.
    """
    if (path / STATE_FILE).is_file():
        return path
    present = complete_checkpoints(path / "checkpoints")
    if not present:
        raise UserError(f"run: {str(path)!r} holds no checkpoint; give a run's output folder or a step-NNNNNN folder")
    return present[-1]


def export_checkpoint(checkpoint: Path, task: Task, output: Path) -> None:
    """Write a checkpoint of `task` as a Hugging Face folder.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    export_huggingface(full_weights(checkpoint), task.build_model().config, task.tokenizer, output)


def full_weights(checkpoint: Path) -> dict[str, Any]:
    """The fp32 weights of a checkpoint of any ZeRO stage, gathered from its partitions.

    Raises:
        UserError: a file is missing or damaged.
    """
    import_deepspeed()
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        if any(checkpoint.glob("*zero_pp_rank_*optim_states.pt")):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name))
        states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in states["module"].items()}
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"run: {checkpoint} is damaged ({first}); export another checkpoint") from error
