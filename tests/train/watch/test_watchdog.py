"""Ranks that hang, are stopped, die or are slow are named, and the run ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine.errors import HANG_EXIT_CODE
from engine.train.watch.slow_ranks import POINTS, SlowRanks
from engine.train.watch.watchdog import Beat, Watchdog, behind, blame, is_broken_collective, unreachable
from tests.train.checkpoint.accidents import accident, heartbeat, start, tracebacks
from tests.train.runs import ROOT, environment


def beat(rank: int, *, count: int = 9, age: float = 0.0, ended: str | None = None) -> Beat:
    return Beat(rank, 4, "update", count, 1.0, f"node{rank}", 100 + rank, ended, age)


@pytest.mark.parametrize(
    ("beats", "size", "expected"),
    [
        ([beat(0), beat(1)], 2, []),
        ([beat(0), beat(1, count=8), beat(2)], 3, [1]),
        ([beat(0, count=8), beat(1, age=20.0)], 2, [1]),
        ([beat(0), beat(2)], 3, [1]),
        ([beat(0), beat(1, ended="disk full"), beat(2, age=20.0)], 3, [1, 2]),
    ],
)
def test_the_ranks_that_the_others_wait_for(beats: list[Beat], size: int, expected: list[int]) -> None:
    assert behind(beats, size, silence=10.0) == expected


def test_blame_names_rank_host_and_what_is_known() -> None:
    beats = [beat(0), beat(1, age=20.0), beat(2, ended="disk full"), beat(4, count=7)]
    words = blame(beats, [1, 2, 3, 4], silence=10.0)
    assert words == (
        "rank 1 on node1 has been silent for 20 s; rank 2 on node2 ended: disk full; rank 3 left no beat; "
        "rank 4 on node4 is behind, in 'update' of step 5"
    )
    assert blame(beats, list(range(9)), 10.0).endswith(" and 5 more")
    assert blame(beats, [], 10.0) == "all ranks are equally far"


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_what_a_broken_collective_says(error: Exception, broken: bool) -> None:
    assert is_broken_collective(error) == broken


def test_who_has_gone_is_found_at_once_and_told_by_one_rank(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    error = RuntimeError("Connection closed by peer")
    dogs = [Watchdog(tmp_path, rank, 3) for rank in range(3)]
    for dog in dogs:
        dog.feed("update", 6)
        dog.beat()
    path = tmp_path / "beats" / "rank-0"
    path.write_text(path.read_text().replace(f'"process": {os.getpid()}', f'"process": {dead.pid}'))
    told = [dog.lost_rank(error) for dog in dogs[1:]]
    assert [lost is not None and lost.speaks for lost in told] == [True, False]
    assert f"(process {dead.pid}, 6 steps done) has gone, so rank 1 can't go on in 'update' of step 7" in str(told[0])
    assert dogs[1].lost_rank(AssertionError("a defect")) is None
    dogs[0].end("out of memory")
    assert "which ended with 'out of memory', has gone" in str(dogs[1].lost_rank(error))


def test_the_host_is_told_where_only_an_address_is_known(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 2)
    dog.beat()
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.9]:25091")
    assert str(dog.lost_rank(error, patience=0.0)).startswith("a rank at 10.0.0.9 has gone, so rank 0 can't go on")
    assert str(dog.lost_rank(RuntimeError("Broken pipe"), patience=0.0)).startswith("another rank has gone")


def test_a_host_that_has_gone_leaves_the_word_to_the_first_rank_elsewhere(tmp_path: Path) -> None:
    """Of another host's rank 0 nobody here can know whether it lives; all ranks would wait for it to speak."""
    dogs = [Watchdog(tmp_path, rank, 4) for rank in (2, 3)]
    for rank in range(2):
        Watchdog(tmp_path, rank, 4).beat()
        path = tmp_path / "beats" / f"rank-{rank}"
        path.write_text(json.dumps({**json.loads(path.read_text()), "host": "localhost"}))
    error = RuntimeError("Connection closed by peer [127.0.0.1]:9")
    told = [dog.lost_rank(error, patience=0.0) for dog in dogs]
    assert [lost is not None and lost.speaks for lost in told] == [True, False]
    assert str(told[0]).startswith("a rank on localhost has gone, so rank 2 can't go on")


def test_a_host_that_refuses_answers_and_one_that_is_unknown_is_left_out() -> None:
    blocked, also = "255.255.255.255", "224.0.0.1"  # no TCP leads to broadcast and multicast addresses
    assert list(unreachable(["localhost", "no-such-host.invalid", blocked], patience=0.5)) == [blocked]
    assert list(unreachable([blocked, also], patience=0.5)) == [blocked, also]
    assert list(unreachable([blocked, also], patience=0.5, most=1)) == [blocked]


@pytest.mark.slow
def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from engine.train.watch.watchdog import Watchdog\n"
        "dog = Watchdog(pathlib.Path(sys.argv[1]), timeout=1.5); dog.start(); print('up', flush=True)\n"
        "time.sleep(float(sys.argv[2])); print('alive')"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), seconds],
            env=environment() | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seconds in ("60", "1.0")
    ]  # fmt: skip
    hangs, suspended = started
    assert suspended.stdout is not None
    suspended.stdout.readline()
    suspended.send_signal(signal.SIGSTOP)
    _, error = hangs.communicate(timeout=30)
    assert hangs.returncode == HANG_EXIT_CODE
    assert error.startswith(("error: no progress for 1", "error: no progress for 2"))
    report = (tmp_path / "hang" / "rank-0.txt").read_text()
    assert "rank 0 of 1" in report
    assert 'File "<string>", line 3 in <module>' in report
    suspended.send_signal(signal.SIGCONT)
    assert suspended.communicate(timeout=30)[0] == "alive\n"
    assert suspended.returncode == 0


def test_a_rank_is_slow_after_several_points_in_a_row_and_named_once() -> None:
    slow = SlowRanks(1.5, torch.device("cpu"))
    found = [slow.judge([1.0, times, 1.1]) for times in (2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0)]
    assert found == [[], [], [], [], [], [1], []]
    assert SlowRanks(None, torch.device("cpu")).judge([1.0, 9.0]) == []
    assert slow.tell(1, [1.0, 2.0], "node1").startswith("slow rank: rank 1 on node1 needs 2.0 times the ranks' median")


def test_own_time_is_what_happens_inside() -> None:
    slow = SlowRanks(1.5, torch.device("cpu"))
    with slow.measured():
        time.sleep(0.05)
    time.sleep(0.05)
    assert 0.05 <= slow.seconds() < 0.1
    assert slow.seconds() == 0.0


def options(store: Path) -> list[str]:
    return [f"--data.path={store}", "--train.steps=50", "--train.micro_batch=4", "--train.zero_stage=2"]


@pytest.mark.parametrize(
    ("launcher", "dead"),
    [
        (None, 0),
        pytest.param("deepspeed", 0, marks=pytest.mark.slow),
        pytest.param("torchrun", 1, marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_is_killed_all_end_at_once_and_one_line_names_it(
    store: Path, tmp_path: Path, launcher: str | None, dead: int
) -> None:
    process = start(tmp_path, *options(store), accidents=[accident(dead, 3, "kill", 9)], launcher=launcher)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None), printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert errors[0].startswith(f"error: rank {dead} on ")
    assert f"has gone, so rank {1 - dead} can't go on" in errors[0]
    assert "step 3" in errors[0]
    assert not [line for line in tracebacks(printed) if "engine/" in line], printed


@pytest.mark.slow
def test_a_defect_of_one_rank_is_told_as_its_last_word(store: Path, tmp_path: Path) -> None:
    process = start(
        tmp_path, *options(store), accidents=[accident(1, 2, "fail", "a broken thing")], launcher="deepspeed"
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "AssertionError: a broken thing" in printed
    assert "which ended with 'a broken thing', has gone" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "what", "blamed"),
    [
        ("torchrun", ("kill", int(signal.SIGSTOP)), "has been silent for"),
        pytest.param("deepspeed", ("kill", int(signal.SIGSTOP)), "has been silent for", marks=pytest.mark.slow),
        pytest.param("deepspeed", ("sleep", 600), "is behind, in 'forward pass' of step 7", marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named_and_one_that_stands_still_ends_the_run(
    store: Path, tmp_path: Path, launcher: str, what: tuple[str, int], blamed: str
) -> None:
    slow = [accident(1, batch, "sleep", 0.3) for batch in range(2, 2 + POINTS)]
    process = start(
        tmp_path,
        *options(store),
        "--fault.hang_timeout=10",
        accidents=[*slow, accident(1, 7, *what)],
        launcher=launcher,
    )
    report = tmp_path / "hang" / "rank-0.txt"
    deadline = time.monotonic() + 90
    while not report.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
        if child.status() == psutil.STATUS_STOPPED:  # the launcher would wait half a minute before it does so
            child.kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode in (1, HANG_EXIT_CODE)
    text = report.read_text()
    assert "rank 0 of 2" in text
    assert re.search(r"in '(update|forward pass|backward pass)' of step 7", text)
    assert 'trainer.py", line' in text
    told = [line for line in printed.splitlines() if line.startswith("error: no progress for ")]
    assert len(told) == 1, printed
    assert blamed in told[0]
    assert "rank 1 on " in told[0]
    assert heartbeat(tmp_path)["state"] == "failed"
    assert len([line for line in printed.splitlines() if line.startswith("slow rank: rank 1 on ")]) == 1, printed
