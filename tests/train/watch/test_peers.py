"""A rank that is blocked outside of Python ends once another one of its machine has gone, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import dist
from engine.train.ranks.join import end_ranks
from engine.train.watch.peers import EXIT_CODE, Process, is_running, neighbours, own_process, told
from tests.train.runs import ROOT, environment
from tests.train.watch.peer_worker import GRACE
from tests.warm import SERVER

LATE = ("leaves", "lingers")
OWN = Process(0, "node1", "kernel pid:[1]", os.getpid(), 12)


def started(folder: Path, *hows: str) -> list[subprocess.Popen[str]]:
    """Ranks of a machine that look after one another, once all of them do."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.watch.peer_worker", str(folder), str(rank), str(len(hows)), how],
            cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for rank, how in enumerate(hows)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(folder.glob("watching-?"))) < len(hows):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return processes


@pytest.mark.slow
def test_ranks_that_wait_for_one_that_was_killed_end_and_the_first_of_them_says_why(tmp_path: Path) -> None:
    processes = started(tmp_path, "blocked", "blocked", "blocked")
    killed = processes.pop(1)
    began = time.monotonic()
    killed.kill()  # it stays a zombie until the end of the test
    printed = [process.communicate(timeout=30)[1] for process in processes]
    assert GRACE <= time.monotonic() - began < 15
    assert [process.returncode for process in processes] == [EXIT_CODE, EXIT_CODE]
    assert f"rank 1 (process {killed.pid}) on " in printed[0]
    assert "has gone, so rank 0 can't go on; " in printed[0]
    assert printed[0].startswith("error: ")
    assert printed[0].count("\n") == 1
    assert printed[1] == ""
    assert {file.name for file in tmp_path.glob("lost-*")} == {"lost-0", "lost-2"}
    killed.communicate()


def test_ranks_that_end_in_order_may_do_so_one_after_another(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "train" / "watch" / "peer_worker.py")
    commands = [[script, str(tmp_path), str(rank), str(len(LATE)), how] for rank, how in enumerate(LATE)]
    processes = [SERVER.start(command, [environment()], ROOT) for command in commands]
    assert [(process.communicate(timeout=30), process.returncode) for process in processes] == [(("", ""), 0)] * 2


def test_ranks_look_after_one_another_until_all_have_come_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(dist, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: order.append("destroy"))
    end_ranks(dist.World(size=2), met=lambda: order.append("met"))
    assert order == ["barrier", "met", "destroy"]


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    own = own_process(3)
    assert own is not None
    assert own.rank == 3
    assert is_running(own.number)
    assert is_running(own.number, own.started)
    assert not is_running(own.number, own.started - 1), "another process got the number"
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(child.pid), "a zombie"
    child.wait()
    assert not is_running(child.pid)


def test_ranks_whose_processes_cannot_be_seen_are_left_out() -> None:
    beside = replace(OWN, rank=1, number=77)
    elsewhere = replace(OWN, rank=2, machine="other kernel pid:[1]")
    in_a_container = replace(OWN, rank=3, machine="kernel pid:[2]")
    assert neighbours(OWN, [OWN, beside, elsewhere, in_a_container, None]) == [beside]
    assert neighbours(None, [OWN, beside, None]) == []


def test_the_line_names_all_that_have_gone() -> None:
    gone = [replace(OWN, rank=rank, number=70 + rank) for rank in (1, 3)]
    assert told(0, gone).startswith(
        "error: rank 1 (process 71), rank 3 (process 73) on node1 has gone, so rank 0 can't"
    )
