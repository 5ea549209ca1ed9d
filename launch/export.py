"""`zerobert export`: a run's checkpoint as a Hugging Face folder, on a machine of any kind, without ranks."""

from __future__ import annotations

from pathlib import Path

from engine.train.quiet import silence_libraries
from launch.cli import CommandParser


def main(arguments: list[str]) -> int:
    """Put whole fp32 weights together from the ranks' files and write them."""
    parser = CommandParser(prog="zerobert export", description=__doc__)
    parser.add_argument("run", type=str, help="output folder of a run, or one of its step-NNNNNN folders")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    values = parser.parse_args(arguments)
    silence_libraries()
    from engine.config import from_dict
    from engine.export import export_checkpoint, find_checkpoint
    from engine.train.checkpoint import read_state
    from launch.train import build_task

    checkpoint = find_checkpoint(Path(values.run))
    task = build_task(from_dict(read_state(checkpoint).config))
    export_checkpoint(checkpoint, task, Path(values.output))
    print(f"exported {checkpoint} to {values.output}")
    return 0
