"""Makes a checkpoint from the files of the ranks: the steps on the file system, in an order that survives a crash.

Each step is durable (fsynced) before the next one relies on it: a rank's files before the list of them, all lists
before `state.json`, that before the rename that gives the folder its name, that before `latest` moves, and a verified
checkpoint before any older one is deleted. No function here calls a collective.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from engine.durable import FileFacts, make_folder, replace_durably, sync_folder, write_durably, written_aside
from engine.errors import UserError
from engine.train.checkpoint.folder import (
    STATE_FILE,
    RunState,
    checkpoint_name,
    checkpoint_step,
    complete_checkpoints,
    damage,
)
from engine.zero.states import Snapshot

#: folders that a killed save, or the killed deletion of a checkpoint, leaves behind
LEFTOVERS = (".partial-step-*", ".dropped-step-*")


def part_file(rank: int) -> str:
    """Name of the list of a rank's files, which is written once they are durable."""
    return f"part-{rank:05d}.json"


def partial_folder(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder / f".partial-{checkpoint_name(step)}"


def prepare(folder: Path, step: int) -> None:
    """Make the empty folder to write a checkpoint in; on rank 0, before any rank writes.

    Raises:
        OSError: the disk is full or can't be written; so for the following functions.
    """
    clean(folder)
    make_folder(partial_folder(folder, step))


def clean(folder: Path) -> None:
    """Remove what killed saves left, as far as possible."""
    for path in (path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        shutil.rmtree(path, ignore_errors=True)


def write_part(partial: Path, snapshot: Snapshot, further: Mapping[str, bytes]) -> None:
    """Write one rank's files, and then the list of them: it exists if, and only if, all of them are durable."""
    files = snapshot.write(partial)
    files |= {name: write_durably(partial / name, content) for name, content in further.items()}
    with written_aside(partial / part_file(snapshot.rank)) as aside:
        write_durably(aside, json.dumps({name: asdict(facts) for name, facts in files.items()}).encode())
        sync_folder(partial)


def has_parts(partial: Path, ranks: int) -> bool:
    """Whether the files of all ranks are durable."""
    return all((partial / part_file(rank)).is_file() for rank in range(ranks))


def commit(folder: Path, state: RunState, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Make a checkpoint of the files of all ranks, then delete the oldest ones beyond `keep`; on rank 0.

    Args:
        kept_steps: those of `RunConfig.train.save_at`, which are never deleted.
    """
    partial, final = partial_folder(folder, state.step), folder / checkpoint_name(state.step)
    files: dict[str, FileFacts] = {}
    for listed in [partial / part_file(rank) for rank in range(state.world_size)]:
        files |= {name: FileFacts(**facts) for name, facts in json.loads(listed.read_bytes()).items()}
        listed.unlink()
    write_durably(partial / STATE_FILE, replace(state, files=files).text().encode())
    sync_folder(partial)
    problem = damage(partial, hashes=False)
    if problem is not None:
        raise OSError(f"right after it was written, {problem}")
    if final.exists():
        set_aside(final)
    partial.rename(final)
    sync_folder(folder)
    replace_durably(folder / "latest", final.name.encode())
    shutil.rmtree(aside_folder(final), ignore_errors=True)
    retain(folder, keep, kept_steps)


def retain(folder: Path, keep: int, kept_steps: Collection[int] = ()) -> None:
    """Delete what is older than the newest `keep` checkpoints whose files all have their full size."""
    kept = 0
    for path in reversed(complete_checkpoints(folder)):
        if kept >= keep:
            if checkpoint_step(path) not in kept_steps:
                drop(path)
        elif is_full_size(path):
            kept += 1


def is_full_size(path: Path) -> bool:
    """Whether all files of a checkpoint exist with their full size; reads none of them."""
    try:
        return damage(path, hashes=False) is None
    except UserError:
        return False


def drop(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half deleted one is never taken for a damaged one."""
    dropped = path.with_name(f".dropped-{path.name}")
    shutil.rmtree(dropped, ignore_errors=True)
    path.rename(dropped)
    shutil.rmtree(dropped)


def aside_folder(path: Path) -> Path:
    return path.with_name(f"aside-{path.name}")


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that no resume finds it; it is kept until the run saves that step again."""
    aside = aside_folder(path)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def set_aside_from(folder: Path, step: int, start: Path) -> list[str]:
    """Set aside the checkpoints of later steps, which a run that resumes from `start` at `step` will save again.

    Returns:
        Lines for the user that tell what was done.
    """
    again = [path for path in complete_checkpoints(folder) if checkpoint_step(path) >= step]
    moved = [(path, set_aside(path)) for path in again if path.resolve() != start.resolve()]
    return [f"set {path} aside as {aside.name}, until this run saves that step again" for path, aside in moved]
