"""`zerobert export`: a run's checkpoint as a Hugging Face folder, on a machine of any kind, without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.train.quiet import silence_libraries
from launch.cli import CommandParser


def main(arguments: list[str]) -> int:
    """Gather a checkpoint's ZeRO partitions into whole fp32 weights and write them."""
    parser = CommandParser(prog="zerobert export", description=__doc__)
    parser.add_argument("run", type=str, help="output folder of a run, or one of its step-NNNNNN folders")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    values = parser.parse_args(arguments)
    silence_libraries()
    checkpoint = find_checkpoint(Path(values.run))
    export_checkpoint(checkpoint, Path(values.output))
    print(f"exported {checkpoint} to {values.output}")
    return 0


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run.

    Raises:
        UserError: there is none.
    """
    from engine.train.checkpoint import STATE_FILE, complete_checkpoints

    if (path / STATE_FILE).is_file():
        return path
    present = complete_checkpoints(path / "checkpoints")
    if not present:
        raise UserError(f"run: {str(path)!r} holds no checkpoint; give a run's output folder or a step-NNNNNN folder")
    return present[-1]


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write one checkpoint as a Hugging Face folder."""
    from engine.config import from_dict
    from engine.export import export_huggingface
    from engine.train.checkpoint import read_state
    from launch.train import build_task

    task = build_task(from_dict(read_state(checkpoint).config))
    export_huggingface(full_weights(checkpoint), task.build_model().config, task.tokenizer, output)


def full_weights(checkpoint: Path) -> dict[str, Any]:
    """The fp32 weights of a checkpoint of any ZeRO stage, gathered from its partitions.

    Raises:
        UserError: a file is missing or damaged.
    """
    from engine.train.quiet import import_deepspeed

    import_deepspeed()
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        if not any(checkpoint.glob("*zero_pp_rank_*optim_states.pt")):
            states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
            return {name: tensor.float() for name, tensor in states["module"].items()}
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name))
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"run: {checkpoint} is damaged ({first}); export another checkpoint") from error
