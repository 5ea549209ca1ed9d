"""Ranks that save: with failing disks, in training, and until they are killed.

python -m torch.distributed.run --nproc_per_node=2 -m tests.train.checkpoint.durable_worker FOLDER writes checkpoints
there and RANK.json: {what was tried: what this rank got}. The other functions are for one rank, in `tests.single_rank`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.data.loading.source import Cursor
from engine.errors import RunError
from engine.train.checkpoint import commit
from engine.train.checkpoint import folder as checkpoint
from engine.train.checkpoint.saver import Saver
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero import states
from engine.zero.archive import Archive
from engine.zero.engine import ZeroEngine
from tests.zero.partition_worker import CASES
from tests.zero.resharding_worker import STATES, client, ranges, start, train

STAGES = {0: "0-fp32", 2: "2-bf16", 3: "3-bf16"}
#: seconds that a slow disk takes for each rank's file
SLOW = 0.5


def state(step: int) -> checkpoint.RunState:
    return checkpoint.RunState(step, Cursor(0, step, step), torch.distributed.get_world_size(), RunConfig().to_dict())


def engine(stage: int) -> ZeroEngine:
    """An engine after one step of torch's AdamW."""
    zero = start(CASES[STAGES[stage]], 1)
    train(zero)
    return zero


@contextmanager
def disk(before: Callable[[], None]) -> Iterator[None]:
    """Do something before each rank's file is written."""
    write = states.write_tensors

    def written(path: Path, tensors: dict[str, Tensor]) -> Any:
        before()
        return write(path, tensors)

    with mock.patch.object(states, "write_tensors", written):
        yield


def slow() -> None:
    time.sleep(SLOW)


def failing(error: Exception, rank: int) -> Callable[[], None]:
    """A disk on which one rank can't write."""

    def fail() -> None:
        if torch.distributed.get_rank() == rank:
            raise error

    return fail


@dataclass
class Outcome:
    """What one rank saw of a save."""

    said: list[str]
    raised: str
    seconds: float
    under_way: int
    """steps that were trained before the save was over"""
    left: list[str]
    """names in the folder afterwards"""


def attempt(zero: ZeroEngine, folder: Path, step: int, *, background: bool, required: bool = False) -> dict[str, Any]:
    """Save, train on, and tell what came of it."""
    said, raised, under_way = io.StringIO(), "", 0
    saver, begin = Saver(folder, 2, background=background), time.monotonic()
    try:
        with redirect_stdout(said):
            saver.save(zero, state(step), required=required)
            for _ in range(3):
                train(zero)
                saver.poll()
                under_way += saver._writer is not None
            saver.wait()
    except (RunError, ZeroDivisionError) as error:
        raised = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    left = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    return Outcome(said.getvalue().splitlines(), raised, time.monotonic() - begin, under_way, left).__dict__


def same_files(zero: ZeroEngine, folder: Path) -> dict[str, Any]:
    """One state saved while nothing else happens, in training on a slow disk, and so but without the copy."""
    for name, background in (("waiting", False), ("training", True)):
        saver = Saver(folder / name, 2, background=background)
        torch.manual_seed(torch.distributed.get_rank())
        with disk(slow) if background else disk(lambda: None):
            saver.save(zero, state(1))
            if background:
                torch.rand(1)
                trained = [train(zero) for _ in range(3)]
                assert saver._writer is not None
                assert saver._writer.status == 1, "training was over after the save"
                saver.wait()
    views = states.snapshot(zero.wrapper, copy=False)
    with mock.patch.object(states, "snapshot", return_value=views), disk(slow):
        saver = Saver(folder / "views", 2, background=True)
        saver.save(zero, state(1))
        train(zero)
        saver.wait()
    return {"trained": len(trained)}


def failures(zero: ZeroEngine, folder: Path) -> dict[str, Any]:
    """Saves after a good one, in which rank 1, or rank 0's folder, fails."""
    full, found = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), {}
    found["good"] = attempt(zero, folder, 1, background=True)
    for background in (True, False):
        with disk(failing(full, 1)):
            found[f"full {background}"] = attempt(zero, folder, 2, background=background)
            found[f"required {background}"] = attempt(zero, folder, 2, background=background, required=True)
    with mock.patch.object(commit, "prepare", side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS))):
        found["read-only"] = attempt(zero, folder, 2, background=True)
    with disk(failing(ZeroDivisionError("in a thread"), 1)):
        found["defect"] = attempt(zero, folder, 2, background=True)
    with disk(slow):
        found["slow"] = attempt(zero, folder, 2, background=True)
    return found


def main(folder: Path) -> None:
    world = start_ranks(timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for stage in STAGES:
        zero = engine(stage)
        found[f"stage {stage}"] = same_files(zero, folder / f"stage-{stage}")
        if stage == 2:
            found |= failures(zero, folder / "failures")
        zero.model.destroy()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    end_ranks(world)


def make(folder: Path, steps: int) -> None:
    """Save a checkpoint of each step; for one rank."""
    zero = engine(2)
    saver = Saver(folder, steps, background=False)
    for step in range(1, steps + 1):
        train(zero)
        saver.save(zero, state(step))
    zero.model.destroy()


def traced_save(folder: Path) -> list[str]:
    """Save once and return the calls of fsync and rename, in order, by the names of their files; for one rank."""
    zero, events, fsync, rename, replace = engine(2), [], os.fsync, os.rename, os.replace

    def synced(handle: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def moved(move: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def traced(source: Path, target: Path) -> None:
            events.append(f"rename {Path(source).name} {Path(target).name}")
            move(source, target)

        return traced

    with mock.patch.multiple(os, fsync=synced, rename=moved(rename), replace=moved(replace)):
        Saver(folder, 2, background=False).save(zero, state(1))
    zero.model.destroy()
    return events


def save_on(folder: Path, step: int) -> list[str]:
    """Try to save once and return what was said; for one rank."""
    zero = engine(2)
    said: list[str] = attempt(zero, folder, step, background=True)["said"]
    zero.model.destroy()
    return said


def pieces(zero: ZeroEngine) -> Iterator[Tensor]:
    """The weights and states of all parameters, without padding."""
    for shard in zero.wrapper.shards():
        for tensor in (shard.tensor, *(client(zero).state[shard.tensor][name] for name in STATES)):
            yield from (view for *_, view in ranges(shard, tensor))


def mark(zero: ZeroEngine, step: int) -> None:
    """Make all weights and states tell the step."""
    for piece in pieces(zero):
        piece.fill_(step)


def marked(zero: ZeroEngine) -> set[float]:
    """What all weights and states tell."""
    return {value for piece in pieces(zero) for value in piece.unique().tolist()}


def save_until_killed(zero: ZeroEngine, folder: Path, first: int, background: bool, report: int) -> None:
    """Save step after step, telling each that is there for sure; never returns."""
    parent, saver = os.getppid(), Saver(folder, 2, background=background)
    for step in range(first, first + 10**6):
        if os.getppid() != parent:
            break
        mark(zero, step)
        saver.save(zero, state(step))
        mark(zero, -1)
        saver.wait()
        os.write(report, step.to_bytes(4, "little"))
    os._exit(1)


def kills(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kill -9 a process that saves, at random moments, and look each time at what is there; for one rank.

    Returns:
        kills; those in the middle of a save; checkpoints that were saved before the kills; seconds.
    """
    torch.set_num_threads(1)
    zero, chance, known, in_save, begin = engine(2), random.Random(seed), 0, 0, time.monotonic()
    for number in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save_until_killed(zero, folder, known + 1, number % 2 == 0, writing)
        os.close(writing)
        first = os.read(reading, 4)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = first + b"".join(iter(lambda: os.read(reading, 4096), b""))  # noqa: B023
        os.close(reading)
        in_save += any(folder.glob(".partial-*"))
        known = check(zero, folder, int.from_bytes(told[-4:], "little"))
    zero.model.destroy()
    return {"kills": count, "in_save": in_save, "saved": known, "seconds": round(time.monotonic() - begin)}


def check(zero: ZeroEngine, folder: Path, told: int) -> int:
    """Load the newest checkpoint, which must be whole, of its step, and no older than the last that was told of."""
    said = io.StringIO()
    with redirect_stdout(said):
        path = checkpoint.newest_intact(folder)
    assert path is not None
    assert not said.getvalue()
    for each in checkpoint.complete_checkpoints(folder):
        assert checkpoint.damage(each) is None
        Archive(each)
    saved = checkpoint.read_state(path)
    assert saved.step >= told
    mark(zero, -1)
    checkpoint.load(zero, path, saved)
    assert marked(zero) == {float(saved.step)}
    return saved.step


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other rank waits in a collective, for which an ordinary exit would wait too
