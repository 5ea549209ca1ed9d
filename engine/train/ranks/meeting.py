"""Before the ranks join their process group, each reports that it is ready, or its mistake; then all or none go on.

torch's rendezvous waits silently for a rank that never comes, and handles no signals meanwhile; so a mistake that one
rank alone has (its recipe doesn't exist, its folder can't be written) would leave all others waiting. Here they meet
first, at the key-value store of the rendezvous, which rank 0 opens at MASTER_ADDR:MASTER_PORT unless torchrun did:

    <attempt>/rank-N     rank N's report, JSON
    <attempt>/stop       the signal that a rank received while it waited
    <attempt>/verdict    rank 0's decision: all go on, or why none does
    <attempt>/left       number of ranks that have read the verdict

A thread talks to the store, whose calls may block; the main thread reports whom it waits for and handles signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from engine.dist import Report, own_reader, shared_mistake
from engine.errors import LateRanksError, LostRankError, RunError, SharedError, UserError, first_line
from engine.train.watch.preempt import Stop, Stopped

#: seconds between two lines that name the ranks that a rank waits for
TELL_INTERVAL = 10.0
#: seconds that a rank with a mistake waits for the others to learn of it
GRACE = 8.0
#: seconds to wait for a port in use to become free, and for MASTER_ADDR to become reachable
PATIENCE = 5.0
POLL = 0.05


@dataclass(frozen=True)
class Place:
    """This rank's number, the number of ranks, and the address at which they meet."""

    rank: int
    size: int
    host: str
    port: int
    """0: any free port, for a single rank"""
    served: bool = False
    """whether the launcher serves the store, as torchrun does"""
    attempt: str = "0"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def place_of(env: Mapping[str, str]) -> Place | None:
    """The place that torch's environment variables give; None where they are missing or invalid."""
    numbers = [env.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(text.isdecimal() for text in numbers) or not env.get("MASTER_ADDR"):
        return None
    rank, size, port = map(int, numbers)
    if rank >= size or port > 65535:
        return None
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, size, env["MASTER_ADDR"], port, served, env.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Meeting:
    """The meeting of one start; to be kept until the process group exists, which uses its store."""

    def __init__(
        self,
        *,
        check: Callable[[int], None] = lambda rank: None,
        asked: Callable[[], Stop | None] = lambda: None,
        alive: Callable[[], None] = lambda: None,
        limit: float | None = None,
        tell: Callable[[UserError], None] = lambda mistake: None,
    ) -> None:
        """
        Args:
            check: finds this rank's own mistakes, given its number.
            asked: returns the stop that this rank has been asked for, if any.
            alive: called again and again while this rank waits, to feed the watchdog.
            limit: seconds to wait for ranks that don't come; None waits without a limit.
            tell: prints rank 0's own mistake, before the others learn of it.
        """
        self._check, self._asked, self._alive, self._limit, self._tell = check, asked, alive, limit, tell
        self._store: Any = None

    def hold(self, place: Place, check: Callable[[], None] = lambda: None) -> None:
        """Meet the other ranks; collective.

        Args:
            place: this rank's number and the address.
            check: finds more of this rank's mistakes.

        Raises:
            UserError: a rank has a mistake, on every rank; or the ranks can't meet at this address.
            Stopped: a rank was asked to stop, on every rank.
            LateRanksError: ranks didn't come in time.
        """
        mistake = None
        try:
            self._check(place.rank)
            check()
        except UserError as error:
            mistake = error
        self.settle(place, mistake)

    def settle(self, place: Place, mistake: UserError | None) -> None:
        """Report this rank's mistake to the others, or that it has none; see `hold`."""
        if place.size == 1 and mistake is not None:
            raise mistake
        told_it = mistake is not None and place.rank == 0
        if mistake is not None and told_it:
            self._tell(mistake)
        report = Report(
            place.rank, socket.gethostname(), own_reader(os.environ), None if mistake is None else str(mistake)
        )
        talk = _Talk(place, report)
        talk.start()
        began = told = time.monotonic()
        try:
            while talk.is_alive():
                talk.join(POLL)
                self._alive()
                now = time.monotonic()
                self._mind(talk, began, now)
                if now - told >= TELL_INTERVAL and (mistake is None or place.rank == 0):
                    told = now
                    talk.tell()
        except KeyboardInterrupt:
            talk.stop = Stop("SIGINT", True)
            talk.join(1.0)
            raise
        self._store = talk.store
        if told_it:
            raise SharedError(str(mistake), speaks=False)
        if talk.error is not None:
            raise talk.error
        if talk.store is None:
            assert talk.stop is not None, "only a request to stop ends the search for the store"
            raise Stopped(talk.stop)
        talk.verdict.act_on(report)

    def _mind(self, talk: _Talk, began: float, now: float) -> None:
        """Act on a request to stop, and on the time limits."""
        if talk.stop is None and (stop := self._asked()) is not None:
            talk.stop = stop
            talk.join(2.0)  # time to pass the stop on to the others
            if talk.is_alive():
                raise Stopped(stop)
        mistake = talk.report.mistake
        if mistake is not None and now - began > GRACE and talk.place.rank != 0 and talk.is_alive():
            raise shared_mistake([talk.report], talk.place.rank)  # type: ignore[misc]
        if self._limit is not None and now - began > self._limit and talk.is_alive():
            raise LateRanksError(f"waited {self._limit:g} s in vain for {talk.missing()}; look for their errors")


@dataclass(frozen=True)
class Verdict:
    """Rank 0's decision: without a mistake or a stop, all go on."""

    reports: Sequence[Report] = ()
    """reports of the ranks that had come, if one has a mistake"""
    stop: Stop | None = None

    @property
    def goes_on(self) -> bool:
        return self.stop is None and not self.reports

    def act_on(self, own: Report) -> None:
        """Raise the error that ends this rank, if the verdict says so."""
        if self.stop is not None:
            raise Stopped(self.stop)
        others = [report for report in self.reports if report.rank != own.rank]
        mistake = shared_mistake([*others, own], own.rank)
        if mistake is not None:
            raise mistake

    def to_json(self) -> str:
        return json.dumps({"reports": [asdict(report) for report in self.reports], "stop": _plain(self.stop)})


def verdict_from(text: str) -> Verdict:
    """The inverse of `Verdict.to_json`."""
    values = json.loads(text)
    stop = values["stop"]
    return Verdict([Report(**report) for report in values["reports"]], None if stop is None else Stop(**stop))


def _plain(stop: Stop | None) -> dict[str, Any] | None:
    return None if stop is None else asdict(stop)


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Talk(threading.Thread):
    """One rank's communication with the store; a daemon thread, since the store's calls may never return."""

    def __init__(self, place: Place, report: Report) -> None:
        super().__init__(name="meeting", daemon=True)
        self.place, self.report = place, report
        self.stop: Stop | None = None
        self.store: Any = None
        self.error: Exception | None = None
        self.verdict = Verdict()
        self._waited_for: list[int] = [0] if place.rank else list(range(1, place.size))

    def run(self) -> None:
        try:
            self.store = self._opened() if self.place.rank == 0 and not self.place.served else self._joined()
            if self.store is not None:
                self._lead() if self.place.rank == 0 else self._follow()
        except (UserError, RunError) as error:
            self.error = error
        except Exception as error:
            who = "the launcher" if self.place.served else "rank 0"
            told = f"{who} at {self.place.address} has gone before the ranks met ({first_line(error)})"
            self.error = LostRankError(told, speaks=self.place.rank == 1 or _is_first_here())

    def missing(self) -> str:
        """The ranks that this one waits for, as a text."""
        ranks = list(self._waited_for)
        shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
        return f"{len(ranks)} of {self.place.size} ranks: {shown} (process group at {self.place.address})"

    def tell(self) -> None:
        """Print whom this rank waits for: on rank 0 and, while rank 0 is missing, on the first rank of each machine."""
        if self._waited_for and (self.place.rank == 0 or _is_first_here()):
            print(f"waiting for {self.missing()}", file=sys.stderr, flush=True)

    def _opened(self) -> Any:
        """Open the store on rank 0, once the port is free."""
        from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                store = TCPStore(
                    "127.0.0.1", self.place.port, is_master=True, wait_for_workers=False, multi_tenant=True,
                    timeout=timedelta(seconds=30),
                )  # fmt: skip
            except DistNetworkError as error:
                if time.monotonic() < deadline and self.stop is None:
                    time.sleep(0.2)
                    continue
                raise self._no_port(str(error)) from error
            if self.place.port == 0:
                os.environ["MASTER_PORT"] = str(store.port)
            elif not self._reachable(PATIENCE):
                raise UserError(
                    f"MASTER_ADDR: {self.place.host} is not {socket.gethostname()}, on which rank 0 listens at port "
                    f"{self.place.port}; set it to that host's address"
                )
            return store

    def _no_port(self, error: str) -> UserError:
        taken = "EADDRINUSE" in error or "address already in use" in error.lower()
        why = "is taken by another process" if taken else "can't be listened on"
        return UserError(
            f"MASTER_PORT: {self.place.port} {why} on {socket.gethostname()}; choose another: --master_port of "
            "deepspeed and torchrun, or the variable MASTER_PORT of every rank"
        )

    def _reachable(self, patience: float) -> bool:
        """Whether something answers at the store's address within so many seconds."""
        deadline = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError, UnicodeError):
                socket.create_connection((self.place.host, self.place.port), timeout=2.0).close()
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def _joined(self) -> Any:
        """Connect to the store of another process, once it exists; None if this rank is asked to stop before."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        began = time.monotonic()
        while self.stop is None:
            if self._reachable(0.0):
                with contextlib.suppress(RuntimeError):
                    return TCPStore(
                        self.place.host, self.place.port, is_master=False, wait_for_workers=False,
                        timeout=timedelta(seconds=30),
                    )  # fmt: skip
            if time.monotonic() - began > PATIENCE:
                self._check_address()
            time.sleep(0.1)
        return None

    def _check_address(self) -> None:
        try:
            socket.getaddrinfo(self.place.host, self.place.port)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"MASTER_ADDR: {self.place.host!r} leads to no address on {socket.gethostname()} ({reason}); set it "
                "to the host of rank 0"
            ) from error

    def _key(self, name: str) -> str:
        return f"zerobert/{self.place.attempt}/{name}"

    def _lead(self) -> None:
        """On rank 0: collect the reports, and publish the verdict."""
        reports = {0: self.report}
        stop: Stop | None = None
        while self._waited_for and stop is None and not any(report.mistake for report in reports.values()):
            for rank in self._waited_for:
                if self.store.check([self._key(f"rank-{rank}")]):
                    reports[rank] = Report(**json.loads(self.store.get(self._key(f"rank-{rank}"))))
            self._waited_for = [rank for rank in self._waited_for if rank not in reports]
            if self.store.check([self._key("stop")]):
                stop = Stop(**json.loads(self.store.get(self._key("stop"))))
            stop = stop or self.stop
            time.sleep(0 if not self._waited_for else POLL)
        mistaken = any(report.mistake for report in reports.values())
        self.verdict = Verdict([reports[rank] for rank in sorted(reports)] if mistaken else (), stop)
        self.store.set(self._key("verdict"), self.verdict.to_json())
        self._waited_for = []
        if not self.verdict.goes_on:
            self._see_off()
        self._leave()

    def _see_off(self) -> None:
        """Keep the store open until the others have read the verdict, or the time for it is over."""
        began = time.monotonic()
        while self.store.add(self._key("left"), 0) < self.place.size - 1:
            if time.monotonic() - began > (GRACE if self.stop is None else 1.0):
                return
            time.sleep(POLL)

    def _follow(self) -> None:
        """On other ranks: report, and wait for rank 0's verdict."""
        self.store.set(self._key(f"rank-{self.place.rank}"), json.dumps(asdict(self.report)))
        self._waited_for = []
        passed_on = False
        while not self.store.check([self._key("verdict")]):
            if self.stop is not None and not passed_on:
                passed_on = True
                self.store.set(self._key("stop"), json.dumps(_plain(self.stop)))
            time.sleep(POLL)
        self.verdict = verdict_from(self.store.get(self._key("verdict")).decode())
        self._leave()

    def _leave(self) -> None:
        """Count this rank as done; the last one deletes the keys, since a launcher reuses its store at a restart."""
        if self.store.add(self._key("left"), 1) < self.place.size:
            return
        for name in ("verdict", "stop", "left", *(f"rank-{rank}" for rank in range(self.place.size))):
            self.store.delete_key(self._key(name))
