"""Spins are long alone and short beside other programs, unless the user said how to wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.train.ranks import neighbours
from engine.train.ranks.neighbours import LONGEST, PERIOD, SHORTEST, Patience, crowd_size, find_gomp, give_way, waited
from tests.train.runs import ROOT, SMALL, environment

needs_gomp = pytest.mark.skipif(find_gomp() is None, reason="torch uses another OpenMP runtime than libgomp")
needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")


def program(code: str, *arguments: str, **variables: str) -> str:
    """What a program prints that may use two OpenMP threads."""
    kept = {name: value for name, value in environment().items() if name not in neighbours.VARIABLES}
    command = [sys.executable, "-c", code, *arguments]
    env = kept | {"OMP_NUM_THREADS": "2"} | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=200).stdout


def test_threads_that_wait_make_spins_short_for_a_while() -> None:
    patience = Patience(threads=2)
    assert not patience.look(0.1, now=0.0)
    assert patience.look(0.6, now=0.5)
    assert patience.look(0.0, now=0.5 + SHORTEST - 0.1)
    assert not patience.look(0.6, now=0.5 + SHORTEST)  # measured with short spins: long ones are tried first
    assert not patience.look(0.1, now=1.0 + SHORTEST)


def test_a_neighbour_that_stays_is_asked_less_and_less_often() -> None:
    patience, now, pauses = Patience(threads=2), 0.0, []
    for _ in range(6):
        assert patience.look(0.6, now)
        pauses.append(patience.pause)
        now += patience.pause
        assert not patience.look(0.6, now)
        now += PERIOD
    assert pauses == [5.0, 10.0, 20.0, 40.0, LONGEST, LONGEST]
    assert not patience.look(0.0, now)
    assert patience.look(0.6, now + 100)
    assert patience.pause == SHORTEST  # it is another one


def test_many_threads_may_wait_a_little_each() -> None:
    assert Patience(threads=2).look(0.5, 0.0)
    assert not Patience(threads=64).look(0.5, 0.0)
    assert Patience(threads=64).look(2.0, 0.0)


@pytest.mark.parametrize(("threads", "cores", "size"), [(2, 2, 2), (4, 2, 2), (8, 16, 10), (2, 64, 64), (2, 128, None)])
def test_a_crowd_is_just_large_enough(threads: int, cores: int, size: int | None) -> None:
    assert crowd_size(threads, cores) == size
    assert size is None or threads + size - 1 > cores


def test_waits_are_summed_over_threads(tmp_path: Path) -> None:
    assert waited(tmp_path) is None
    for thread, line in (("7", "100 2000000000 3\n"), ("8", "100 500000000 3\n"), ("9", "")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(line)
    assert waited(tmp_path) == 2.5


@needs_gomp
@pytest.mark.parametrize("name", neighbours.VARIABLES)
def test_what_the_user_says_wins(name: str) -> None:
    assert give_way(2, {name: "passive"}) is None


@needs_gomp
def test_one_thread_waits_for_nobody() -> None:
    assert give_way(1, {}) is None


SPINS = """
import time, torch
from engine.train.ranks.neighbours import Crowd, crowd_size, find_gomp

torch.set_num_threads(2)
tensor = torch.zeros(1 << 16)

def busy_share():
    processor, wall = time.process_time(), time.perf_counter()
    for _ in range(100):
        tensor.add_(1)
        time.sleep(0.004)
    return (time.process_time() - processor) / (time.perf_counter() - wall)

import os
size = crowd_size(2, len(os.sched_getaffinity(0)))
before = busy_share()
crowd = Crowd(find_gomp(), size)
during = busy_share()
crowd.leave()
time.sleep(0.1)
print(before, during, busy_share())
"""


@pytest.mark.slow
@needs_gomp
@needs_cores
def test_a_crowd_makes_threads_sleep_while_they_wait() -> None:
    before, during, after = map(float, program(SPINS).split())
    assert during < 0.5 * before
    assert during < 0.5 * after


BESIDE = """
import os, subprocess, sys, threading, time
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
import torch
from engine.train.ranks import neighbours

neighbours.PERIOD, neighbours.SHORTEST, neighbours.LONGEST = 0.2, 0.5, 0.5
torch.set_num_threads(2)
tensor = torch.zeros(1 << 16)

def crowded():
    return any(thread.name == "crowd" for thread in threading.enumerate())

def until(wanted, seconds=60):
    end = time.monotonic() + seconds
    while crowded() != wanted and time.monotonic() < end:
        tensor.add_(1)
    return crowded() == wanted

over = neighbours.give_way(2, {})
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
try:
    print("gave way", until(True))
finally:
    for process in busy:
        process.kill()
print("went on", until(False))
over.set()
"""


@needs_gomp
@needs_cores
@pytest.mark.skipif(waited() is None, reason="this system doesn't tell what threads wait")
def test_a_process_gives_way_while_it_has_neighbours() -> None:
    assert program(BESIDE).splitlines() == ["gave way True", "went on True"]


RUN = """
import sys, threading
from launch.train import main
code = main(sys.argv[1:])
print("threads", *(thread.name for thread in threading.enumerate()))
sys.exit(code)
"""


@pytest.mark.slow
@needs_gomp
@pytest.mark.parametrize("variables", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}])
def test_a_run_watches_unless_the_user_said_how_to_wait(variables: dict[str, str], store: Path, tmp_path: Path) -> None:
    options = [f"--output={tmp_path / 'run'}", f"--data.path={store}", *SMALL, "--train.steps=1", "--train.threads=2"]
    last = program(RUN, *options, **variables).splitlines()[-1].split()
    assert last[0] == "threads"
    assert ("neighbours" in last) == (not variables)
