"""Progress of a preparation: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType

log = logging.getLogger(__name__)

MEGABYTE = 1_000_000
LOG_SECONDS = 30.0
TICK_SECONDS = 0.5
_SHARE_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
_TIME_BAR = "{desc}: {elapsed}"


class ReadingProgress:
    """How much of the text was read.

    Args:
        total: bytes of all sources; 0 where unknown.
        what: is done with it.
    """

    def __init__(self, total: int, what: str = "tokenize") -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._total, self._logged = total, time.monotonic()
        self._bar = tqdm(total=total or None, unit="B", unit_scale=True, desc=what, disable=not terminal)

    def update(self, done: int) -> None:
        """Show that `done` bytes were read."""
        self._bar.update(done - self._bar.n)
        if self._bar.disable and self._total and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("read %.0f%% of %.0f MB", 100 * done / self._total, self._total / MEGABYTE)

    def close(self) -> None:
        self._bar.close()


class LearningProgress:
    """Progress of learning a vocabulary: passes over the text, then the pieces; a context manager.

    A thread reports it, because `tokenizers` learns the pieces in one call that reports nothing.

    Args:
        passes: 2, or 1 where no characters are counted.
    """

    PHASES = ("count characters", "count words", "learn pieces")

    def __init__(self, passes: int = 2) -> None:
        from tqdm import tqdm

        self._phases = self.PHASES[2 - passes :]
        self._phase, self._share, self._begun = 0, 0.0, time.monotonic()
        self._passes = 0
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=1.0, desc=self._phases[0], bar_format=_SHARE_BAR, disable=not self._terminal)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> LearningProgress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()
        if kind is None:
            self._log_done()

    def begin_pass(self) -> None:
        """The text is read from its start."""
        self._passes += 1
        if self._passes > 1:
            self._next_phase()

    def update(self, share: float) -> None:
        """Show that this share of a pass, in [0, 1], is done."""
        self._share = min(share, 1.0)

    def end_pass(self) -> None:
        """The text was read to its end; after the last pass no text is read any more."""
        self._share = 1.0
        if self._passes == len(self._phases) - 1:
            self._next_phase()

    def _next_phase(self) -> None:
        self._log_done()
        self._phase, self._share, self._begun = self._phase + 1, 0.0, time.monotonic()

    def _log_done(self) -> None:
        if not self._terminal:
            log.info("%s: done in %.0f s", self._phases[self._phase], time.monotonic() - self._begun)

    def _speak(self) -> None:
        spoken = time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            if self._terminal:
                self._draw()
            elif time.monotonic() - spoken > LOG_SECONDS:
                spoken = time.monotonic()
                done = "" if self._is_last() else f"{100 * self._share:.0f}% "
                log.info("%s: %safter %.0f s", self._phases[self._phase], done, spoken - self._begun)

    def _draw(self) -> None:
        self._bar.bar_format = _TIME_BAR if self._is_last() else _SHARE_BAR
        self._bar.n = self._share
        self._bar.set_description(self._phases[self._phase])

    def _is_last(self) -> bool:
        return self._phase == len(self._phases) - 1
