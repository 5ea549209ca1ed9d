"""One SLURM cluster for all tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster of two nodes, or a visible skip."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    # munge wants every folder above its socket to belong to root and to be closed to others, or sticky like /tmp
    started = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")))
    started.root.chmod(0o755)
    try:
        started.start()
        yield started
    finally:
        started.stop()
