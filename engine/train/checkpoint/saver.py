"""Asynchronous, atomic saves: a checkpoint is whole or absent, and is written while training goes on.

1. Every rank copies its states into host memory; training waits for this only.
2. A thread of each rank writes its files into a hidden folder and, once they are durable, a list of them.
3. Rank 0's thread waits for the lists of all ranks and makes a checkpoint of the files (see
`engine.train.checkpoint.commit`).

Threads call no collective: the ranks agree at step boundaries, in `Saver.poll`, while a save is in progress. At most
one save is in progress at a time.
"""

from __future__ import annotations

import errno
import functools
import io
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from engine import dist
from engine.errors import RunError
from engine.train.checkpoint import commit
from engine.train.checkpoint.folder import RunState, checkpoint_name, generators_file
from engine.train.log import say
from engine.zero import states
from engine.zero.engine import ZeroEngine

DONE, WRITING, FAILED = range(3)
REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space or raise the quota there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}
#: seconds between two checks for the other ranks' files
PATIENCE = 0.02
#: seconds that rank 0 waits for the other ranks' files once its own run is over
GRACE = 30.0


class Failure(NamedTuple):
    """Why a rank couldn't save, in a form that can be sent between ranks."""

    cause: str
    remedy: str
    is_defect: bool


class Saver:
    """Saves a run's checkpoints, one after the other; every method is collective.

    A failed save is reported and the run goes on, to save again at the next interval; if it was `required` the run
    ends. Older checkpoints stay as they are.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        background: bool,
        meaning: Mapping[str, bytes] | None = None,
        kept_steps: Collection[int] = (),
    ) -> None:
        """
        Args:
            folder: the run's `checkpoints` folder; what a killed save left there is removed.
            keep: number of newest checkpoints to keep, at least 1.
            background: go on with training while threads write, at the cost of a copy in host memory; see
                `states.snapshot`.
            meaning: further files of every checkpoint (model description, tokenizer) by name; written by rank 0.
            kept_steps: steps whose checkpoints are kept beside those.
        """
        self._folder, self._background = folder, background
        self._commit = functools.partial(commit.commit, keep=keep, kept_steps=kept_steps)
        self._writer: PartWriter | None = None
        self._newest: int | None = None
        self._rank, self._ranks = dist.place()
        self._meaning = dict(meaning or {}) if self._rank == 0 else {}
        if self._rank == 0:
            commit.clean(folder)

    def resume(self, start: Path, step: int) -> list[str]:
        """Resume from the checkpoint `start` of `step`: set aside later ones, whose steps the run will save again.

        Returns:
            On rank 0, lines for the user that tell what was done.
        """
        if start.resolve() == (self._folder / checkpoint_name(step)).resolve():
            self._newest = step
        return commit.set_aside_from(self._folder, step, start) if self._rank == 0 else []

    def save(self, zero: ZeroEngine, state: RunState, *, required: bool = False) -> None:
        """Begin to save, after waiting for the end of an earlier save; do nothing if that step is saved already.

        Args:
            zero: the engine, after an optimizer step.
            state: step, cursor and configuration of the run.
            required: whether the run must not go on without this save.

        Raises:
            RunError: this save, if it fails at once, or the earlier one was required and failed.
        """
        self.wait()
        if state.step == self._newest:
            return
        writer = PartWriter(self._folder, self._commit, state, is_main=self._rank == 0, required=required)
        if self._rank == 0:
            writer.attempt(lambda: commit.prepare(self._folder, state.step))
        if any(dist.gather_objects(writer.failure)):
            self._fail(writer)
            return
        writer.take(states.snapshot(zero.wrapper, zero.base, copy=self._background), self._meaning)
        writer.start()
        self._writer = writer
        if not self._background:
            self.wait()

    def poll(self) -> None:
        """Check at a step boundary whether the save in progress has ended; without one it costs nothing.

        Raises:
            RunError: the save was required and failed.
        """
        writer = self._writer
        if writer is None:
            return
        worst = dist.maximum(writer.status)
        if worst == WRITING:
            return
        writer.end()
        self._writer = None
        if worst == FAILED:
            self._fail(writer)
        else:
            self._newest = writer.state.step

    def wait(self) -> None:
        """Wait for the end of the save in progress, if any; errors as for `poll`."""
        while self._writer is not None:
            self._writer.join(timeout=0.05)  # not longer, since the others may wait for this rank in `poll`
            self.poll()

    def _fail(self, writer: PartWriter) -> None:
        failures = dist.gather_objects(writer.failure)  # all threads have ended, so none writes to the folder any more
        if self._rank == 0:
            shutil.rmtree(commit.partial_folder(self._folder, writer.state.step), ignore_errors=True)
        if writer.defect is not None:
            raise writer.defect
        rank, failure = next((rank, one) for rank, one in enumerate(failures) if one)
        name = checkpoint_name(writer.state.step)
        told = f"{name} was not saved in {self._folder} (rank {rank}: {failure.cause}); {failure.remedy}"
        if writer.required or any(one.is_defect for one in failures if one):
            raise RunError(f"{told}, then --resume auto goes on from an older checkpoint")
        say(f"warning: {told}; older checkpoints are intact, and the next save tries again")


class PartWriter(threading.Thread):
    """Writes one rank's files of a checkpoint; on rank 0 also commits the checkpoint once all ranks' are durable.

    The interpreter waits for it before it exits, so that a run which fails still completes its save.
    """

    def __init__(
        self, folder: Path, commit: Callable[[Path, RunState], None], state: RunState, *, is_main: bool, required: bool
    ) -> None:
        super().__init__(name=f"save-{state.step}")
        self.folder, self.state, self.is_main, self.required = folder, state, is_main, required
        self._commit = commit
        self.status = WRITING
        self.failure: Failure | None = None
        self.defect: Exception | None = None
        self._ended = threading.Event()
        self._taken: tuple[states.Snapshot, dict[str, bytes]] | None = None

    def take(self, snapshot: states.Snapshot, meaning: Mapping[str, bytes]) -> None:
        """Set what to write: the states, the present states of the random generators, and the files of `meaning`."""
        generators = io.BytesIO()
        torch.save(dist.rng_state(), generators)
        self._taken = snapshot, {**meaning, generators_file(snapshot.rank): generators.getvalue()}

    def run(self) -> None:
        self.attempt(self._write)
        self.status = FAILED if self.failure else DONE

    def attempt(self, work: Callable[[], None]) -> None:
        """Do the work and record why it failed, if it did; errors other than OSError are defects, raised later."""
        try:
            work()
        except OSError as error:
            cause = f"{error.strerror or error}"
            self.failure = Failure(cause, REMEDIES.get(error.errno or 0, "check that disk"), is_defect=False)
        except Exception as error:
            self.defect = error
            self.failure = Failure(f"{type(error).__name__}: {error}", "that is a defect", is_defect=True)

    def end(self) -> None:
        """Stop waiting for other ranks' files, and wait for the thread's end."""
        self._ended.set()
        self.join()

    def _write(self) -> None:
        assert self._taken is not None, "take comes before start"
        partial = commit.partial_folder(self.folder, self.state.step)
        commit.write_part(partial, *self._taken)
        self._taken = None
        if self.is_main and self._all_written(partial):
            self._commit(self.folder, self.state)

    def _all_written(self, partial: Path) -> bool:
        """Wait for the files of all ranks; false if the save failed elsewhere, or the run ended without them."""
        deadline = None
        while not commit.has_parts(partial, self.state.world_size):
            if self._ended.wait(PATIENCE):
                return False
            if deadline is None and not threading.main_thread().is_alive():
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                return False
        return True
