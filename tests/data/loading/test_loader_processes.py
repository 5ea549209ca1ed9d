"""The processes that make micro-batches: what they give, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.loading import loader
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.errors import RunError
from tests.data.loading.test_loader import Numbers, samples


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_give_the_same_batches_in_the_same_order(workers: int) -> None:
    source, layout = Numbers(11, 9), BatchLayout(6, 2, 1, 3)
    expected = list(islice(training_batches(source, layout, Cursor(), 0), 8))
    batches = training_batches(source, layout, Cursor(), workers)
    found = list(islice(batches, 8))
    batches.close()
    assert samples(found) == samples(expected)
    assert [(b.totals, b.cursor, b.dummy) for b in found] == [(b.totals, b.cursor, b.dummy) for b in expected]
    assert {int(b.inputs["process"]) for b in expected} == {os.getpid()}
    assert len({int(b.inputs["process"]) for b in found} - {os.getpid()}) == workers


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def batches_of_a_worker() -> Iterator[Generator[MicroBatch, None, None]]:
    batches = training_batches(Numbers(100), BatchLayout(4, 4), Cursor(), 1)
    yield batches
    batches.close()


def test_closing_the_iterator_ends_the_workers(batches_of_a_worker: Generator[MicroBatch, None, None]) -> None:
    worker = int(next(batches_of_a_worker).inputs["process"])
    assert running(worker)
    began = time.perf_counter()
    batches_of_a_worker.close()
    assert not running(worker)
    assert time.perf_counter() - began < 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_workers_survive_the_signals_of_a_preemption(
    batches_of_a_worker: Generator[MicroBatch, None, None], number: signal.Signals
) -> None:
    worker = int(next(batches_of_a_worker).inputs["process"])
    os.kill(worker, number)
    assert {int(next(batches_of_a_worker).inputs["process"]) for _ in range(10)} == {worker}


class StopsOnce(Numbers):
    """The process that first collates stops itself before it sends anything."""

    def __init__(self, mark: Path, *sizes: int) -> None:
        super().__init__(*sizes)
        self.mark = mark

    def collate(self, description: Any) -> dict[str, Tensor]:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return super().collate(description)
        self.mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError("it was killed")


def test_a_stuck_worker_is_replaced_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stopped process stands for one that hangs in its fork: neither heeds a signal but SIGKILL."""
    monkeypatch.setattr(loader, "PATIENCE", 1.0)
    layout = BatchLayout(6, 2, 1, 3)
    expected = samples(list(islice(training_batches(Numbers(11, 9), layout, Cursor(), 0), 12)))
    batches = training_batches(StopsOnce(tmp_path / "stopped", 11, 9), layout, Cursor(), 2)
    found = list(islice(batches, 12))
    batches.close()
    assert samples(found) == expected
    assert not running(int((tmp_path / "stopped").read_text()))


def test_workers_that_are_always_stuck_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PATIENCE", 0.2)
    monkeypatch.setattr(Numbers, "collate", lambda *_: time.sleep(60))
    with pytest.raises(RunError, match=r"the data.workers \(1\) gave no micro-batch, at last for 1.6 s"):
        next(training_batches(Numbers(8), BatchLayout(4, 4), Cursor(), 1))


CRASHING_RUN = """
import sys
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from tests.data.loading.test_loader import Broken, Numbers

source = {"loader": Broken, "trainer": Numbers}[sys.argv[1]](100)
batches = training_batches(source, BatchLayout(4, 4), Cursor(), 2)
next(batches)
raise RuntimeError("the trainer broke")
"""


KILLED_RUN = """
import os, signal
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from tests.data.loading.test_loader_processes import Large

batches = training_batches(Large(100), BatchLayout(4, 4), Cursor(), 1)
print(int(next(batches).inputs["process"]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Large(Numbers):
    """Micro-batches that no pipe holds."""

    def collate(self, description: Any) -> dict[str, Tensor]:
        return {**super().collate(description), "filling": torch.zeros(1 << 20)}


def test_a_trainer_that_is_killed_leaves_no_workers() -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILLED_RUN], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL
    worker, began = int(result.stdout), time.perf_counter()
    while running(worker) and time.perf_counter() - began < 10:
        time.sleep(0.05)
    assert not running(worker)


@pytest.mark.parametrize("where", [pytest.param("loader", marks=pytest.mark.slow), "trainer"])
def test_a_crash_does_not_wait_for_workers_that_ignore_its_signal(where: str) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", CRASHING_RUN, where]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert f"the {where} broke" in result.stderr
