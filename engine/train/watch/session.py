"""One start of a run on this rank: its requests to stop, its watchdog, and the files that tell how it went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engine import dist
from engine.config import RunConfig
from engine.train.checkpoint.folder import read_state
from engine.train.output import is_used
from engine.train.watch import heartbeat, preempt
from engine.train.watch.heartbeat import Heartbeat, Starts
from engine.train.watch.preempt import Stop, Stopped, StopRequest
from engine.train.watch.watchdog import Watchdog


class Session:
    """The parts of a start that exist before its model is built and after its training."""

    def __init__(self, config: RunConfig, world: dist.World, request: StopRequest, watchdog: Watchdog) -> None:
        self.config, self.world, self.request, self.watchdog = config.fault, world, request, watchdog
        self.output = Path(config.output)
        self.heartbeat = Heartbeat(self.output, enabled=False)
        self._starts = Starts()

    def count_start(self, resume: str, start: Path | None) -> None:
        """Count this start, refuse it if the last ones made no progress, and begin the heartbeat.

        Args:
            resume: the option `resume`. With auto the folder is made for the count, since already the first start may
                make no progress.
            start: the checkpoint that this start resumes from, if any.

        Raises:
            UserError: one start too many.
        """
        self.watchdog.feed("building the model")
        if not self.world.is_main:
            return
        step = 0 if start is None else read_state(start).step
        starts = heartbeat.read_starts(self.output)
        if resume == "auto":
            heartbeat.check_restart(starts, step, self.config, self.output)
            self.output.mkdir(parents=True, exist_ok=True)
        self.heartbeat = Heartbeat(self.output, enabled=False, ranks=self.world.size, restarts=starts.starts)
        self.watchdog.on_hang = lambda: self.heartbeat.update("failed")
        self._starts = starts.next(step)
        if resume == "auto" or is_used(self.output):
            self._show()

    def _show(self) -> None:
        """Once the folder exists: write the count of starts and the heartbeat."""
        heartbeat.write_starts(self.output, self._starts)
        (self.output / preempt.MARKER).unlink(missing_ok=True)
        self.heartbeat.enabled = True
        self.heartbeat.write()

    def built(self, step: int, total: int) -> None:
        """Called once the engine is built and the folder exists.

        Args:
            step: optimizer steps done.
            total: optimizer steps of the run.
        """
        self.heartbeat.update(step=step, total=total)
        if self.world.is_main:
            self._show()
        self.watchdog.feed("building the model", step)
        self.watchdog.beat()
        self.request.listen_to_interrupts()

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Records how the run ends: failed, unless `finished` or a stop comes first."""
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            self.heartbeat.update("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise

    def finished(self) -> None:
        """The run is done."""
        self.heartbeat.update("done")
        if self.world.is_main:
            heartbeat.forgive_start(self.output)

    def preempted(self, stop: Stop, step: int, saved: Path | None) -> str:
        """Record that the run has stopped at `step`, and ask the scheduler to requeue it.

        Args:
            stop: the request that it followed.
            step: steps done.
            saved: the checkpoint to resume from, None if there is none.

        Returns:
            The message for the user.
        """
        if self.world.is_main:
            heartbeat.forgive_start(self.output)
            if not stop.by_a_person:
                preempt.write_marker(self.output, step)
        self.heartbeat.update("interrupted" if stop.by_a_person else "preempted", step=step)
        where = f"checkpoint {saved}; --resume auto goes on" if saved is not None else "nothing was saved"
        return f"stopped by {stop.reason} at step {step}; {where}"
