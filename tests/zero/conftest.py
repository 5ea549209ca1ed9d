"""A process that is the one rank of what is computed, for all tests of this folder: some change DeepSpeed in it."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.pool import Pool

import pytest

from tests.single_rank import single_rank
from tests.train.runs import free_port


@pytest.fixture(scope="session")
def rank() -> Iterator[Pool]:
    """Its `apply` takes functions of modules."""
    with single_rank(free_port()) as pool:
        yield pool
