"""Checkpoints: everything that an exact resume needs, complete or absent, whatever the layout it is resumed in.

A checkpoint is written into a hidden folder, which gets its name `step-NNNNNN` by one rename after every rank
has written its part; the file `latest` moves after that. A crash at any moment leaves the older ones intact.

    <output>/checkpoints/
        latest                       name of the newest checkpoint
        step-000100/
            state.json               format, step, cursor, layout, the run's configuration, versions, sizes of the files
            index.json               where the ranges of every parameter lie; see `engine.train.archive`
            rank-NNNNN.safetensors   fp32 weights and optimizer states that rank N wrote
            rng-rank-N.pt            random generators of rank N

Any number of ranks resumes at any ZeRO stage: parameters are saved under their names and without ZeRO's padding, and
the cursor counts samples. Only the random generators belong to a rank; another number of ranks seeds new ones.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

import engine
from engine import dist
from engine.data.source import Cursor
from engine.errors import UserError
from engine.train.archive import first_line
from engine.train.zero import ZeroEngine

STATE_FILE = "state.json"
#: of the folder's files; 1 was DeepSpeed's own
FORMAT = 2
#: configuration that a resume can't change, because states or data order depend on it
FIXED_FIELDS = (
    "task",
    "seed",
    "model",
    "data.sequence_length",
    "data.short_sequence_probability",
    "data.mask_probability",
    "data.whole_word_masking",
    "labelled.train",
    "optim.name",
    "train.precision",
)


@dataclass(frozen=True)
class RunState:
    """Where a run stands after an optimizer step."""

    step: int
    cursor: Cursor
    world_size: int
    config: dict[str, Any]
    best: float | None = None
    """best value so far of the task's metric"""
    micro_batch: int = 0
    version: str = engine.__version__
    format: int = FORMAT
    files: dict[str, int] = field(default_factory=dict)
    """bytes of every other file of the checkpoint"""


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save(zero: ZeroEngine, folder: Path, state: RunState, keep: int) -> Path:
    """Write a checkpoint, then drop the oldest beyond `keep`; collective.

    Args:
        zero: the engine whose states are saved.
        folder: the run's `checkpoints` folder.
        state: where the run stands.
        keep: checkpoints to keep, the new one included.
    """
    final = folder / checkpoint_name(state.step)
    partial = folder / f".partial-{final.name}"
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    zero.save_states(partial)
    torch.save(dist.rng_state(), partial / f"rng-rank-{rank}.pt")
    dist.barrier()
    if rank == 0:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / STATE_FILE).write_text(json.dumps(asdict(replace(state, files=sizes)), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        move_latest(folder, final.name)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def move_latest(folder: Path, name: str) -> None:
    """Point `latest` at a checkpoint, in one rename."""
    pointer = folder / ".latest"
    pointer.write_text(name)
    pointer.rename(folder / "latest")


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `resume` asks for: never, auto or a path.

    Raises:
        UserError: the path is no checkpoint, or `never` would mix a new run with an older one's checkpoints.
    """
    present = complete_checkpoints(folder)
    if resume == "never":
        if present:
            raise UserError(
                f"output: {str(folder.parent)!r} holds {present[-1].name} of an earlier run; "
                "pass --resume auto to go on, or another --output"
            )
        return None
    if resume == "auto":
        return present[-1] if present else None
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise UserError(f"resume: {resume!r} is no checkpoint (no {STATE_FILE}); give auto or a step-NNNNNN folder")
    return path


def read_state(path: Path) -> RunState:
    """The state of a checkpoint.

    Raises:
        UserError: state.json can't be read, or is of a format of another version.
    """
    try:
        values = json.loads((path / STATE_FILE).read_text())
        found = values.get("format", 1)
        if found == FORMAT:
            return RunState(**{**values, "cursor": Cursor(**values["cursor"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"resume: {path / STATE_FILE} is damaged ({error}); resume from another checkpoint") from error
    raise UserError(
        f"resume: {path} is of checkpoint format {found} and this version reads format {FORMAT}; "
        f"use the version that wrote it ({values.get('version')})"
    )


def lookup(config: dict[str, Any], name: str) -> Any:
    """The value of a dotted field."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check_resumable(state: RunState, path: Path, config: dict[str, Any]) -> None:
    """Refuse a resume with a configuration that contradicts the checkpoint, or from a damaged one.

    Raises:
        UserError: names the field and both values, or the file that is missing or cut off.
    """
    for file, size in state.files.items():
        found = (path / file).stat().st_size if (path / file).is_file() else 0
        if found != size:
            raise UserError(
                f"resume: {path} is damaged ({file} has {found} bytes of {size}); resume from another checkpoint"
            )
    for name in FIXED_FIELDS:
        saved, given = lookup(json.loads(json.dumps(state.config)), name), lookup(json.loads(json.dumps(config)), name)
        if saved != given:
            raise UserError(f"{name}: {given!r} differs from {saved!r} in {path}; set it back, or use another --output")


def load(zero: ZeroEngine, path: Path, state: RunState) -> None:
    """Put model, optimizer and random generators back as they were; collective.

    Another number of ranks than the saved one can't have their generators: it gets new ones, which depend on the step.

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    zero.load_states(path)
    rank = torch.distributed.get_rank()
    if zero.world_size != state.world_size:
        dist.seed_everything(state.config["seed"], rank, state.step)
        return
    try:
        rng = torch.load(path / f"rng-rank-{rank}.pt", weights_only=False)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(f"resume: {path} is damaged ({first_line(error)}); resume from another checkpoint") from error
    dist.set_rng_state(rng)
