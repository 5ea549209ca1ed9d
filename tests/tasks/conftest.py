"""What all tests of tasks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tasks.labels import MakeTask, maker


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only slow a model this small down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> MakeTask:
    """Makes tasks on texts."""
    return maker(tmp_path)
