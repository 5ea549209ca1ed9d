"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from engine.data.store.prepare import PrepareConfig, prepare
from launch import cli

ROOT = Path(__file__).resolve().parent.parent

# no test asks the hub; before any library reads it
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor has it more threads than one without asking: the workers share the cores, and threads that spin for a core that
# another worker has take twice the time. Before OpenMP reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is in a shell's background jobs, and the runs that tests start would inherit it and heed no interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# how long an example takes is the machine's affair
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

#: folders whose files train for minutes: a worker that starts the last of them late would end alone
LONG = ("tests/train/", "tests/zero/", "tests/launch/", "tests/kernels/")


class FilesApart(LoadFileScheduling):
    """A file's tests share fixtures and so a worker; those of tests/cluster share one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesApart:
    """Give whole files to workers, whatever order they are in."""
    return FilesApart(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take long."""
    rank = {folder: place for place, folder in enumerate(LONG)}
    items.sort(key=lambda item: next((place for folder, place in rank.items() if item.nodeid.startswith(folder)), 9))


def pytest_unconfigure() -> None:
    """Give the suite its own exit code: a command that a test ended in this process left its code for the exit."""
    atexit.unregister(cli._vanish)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded corpus with a vocabulary of 1,000 pieces, prepared once for every test of training."""
    folder = tmp_path_factory.mktemp("stores") / "embedded"
    prepare(PrepareConfig(source=["embedded"], output=str(folder), vocab_size=1000, workers=0))
    return folder


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Pool]:
    """A process that is the one rank of a run, for every test that trains in it; `apply` takes functions of modules."""
    from launch.launcher import free_port
    from tests.single_rank import single_rank

    with single_rank(free_port()) as pool:
        yield pool
